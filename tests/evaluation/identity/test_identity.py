"""The identity encoder: its loss and batches by hand, and a training on drawn stand-ins for sprites."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cdvideo.errors import UserError
from cdvideo.evaluation.identity.config import IdentityConfig
from cdvideo.evaluation.identity.data import load_views, look_alike, render, render_heldout, sample_member, unpair
from cdvideo.evaluation.identity.model import MAX_BYTES, IdentityNet, load_identity, save_identity
from cdvideo.evaluation.identity.training import draw_views, supervised_contrastive, train_identity
from cdvideo.evaluation.judge.model import Judge, save_judge
from cdvideo.world.config import LoopConfig
from cdvideo.world.heldout import is_heldout_individual
from cdvideo.world.sprites import load_sprites
from cdvideo.world.training import Limits

CPU = torch.device("cpu")
TINY = {"widths": (8, 8, 16, 16), "blocks": (0, 0, 1, 0)}


@pytest.fixture
def config(tmp_path: Path) -> IdentityConfig:
    save_judge(Judge(**TINY, side=32), tmp_path / "start")
    return IdentityConfig(
        out=tmp_path / "identity",
        cache=tmp_path / "views",
        start=tmp_path / "start",
        **TINY,
        width=16,
        side=32,
        pairs=12,
        check_pairs=3,
        views=3,
        heldout_views=2,
        workers=1,
        dtype="fp32",
        loop=LoopConfig(steps=12, batch=16, lr=5e-3, warmup=2, ema=0.8, log_every=1),
    )


def test_contrastive_loss_by_hand() -> None:
    features_BD = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]]), dim=1)
    labels_B = torch.tensor([5, 5, 7, 7])
    cosine = features_BD @ features_BD.T / 0.5
    expected = 0.0
    for i, positive in ((0, 1), (1, 0), (2, 3), (3, 2)):
        others = torch.tensor([float(cosine[i, j].exp()) for j in range(4) if j != i])
        expected -= float(cosine[i, positive] - others.sum().log()) / 4
    assert float(supervised_contrastive(features_BD, labels_B, temperature=0.5)) == pytest.approx(expected, abs=1e-5)


def test_contrastive_loss_averages_over_all_of_a_label() -> None:
    features_BD = F.normalize(torch.randn(6, 4), dim=1)
    labels_B = torch.tensor([0, 0, 0, 1, 1, 1])
    log_share_BB = (features_BD @ features_BD.T / 0.1).fill_diagonal_(-torch.inf).log_softmax(dim=1)
    rows = [log_share_BB[i, [j for j in range(6) if j != i and labels_B[j] == labels_B[i]]].mean() for i in range(6)]
    loss = supervised_contrastive(features_BD, labels_B, temperature=0.1)
    assert torch.allclose(loss, -torch.stack(rows).mean(), atol=1e-5)


def test_a_batch_holds_two_views_of_both_look_alikes_of_few_classes() -> None:
    config = IdentityConfig(classes=2, loop=LoopConfig(steps=1, batch=32, lr=1e-3))
    subject_P = torch.arange(40) % 8
    members_B, views_B = draw_views(subject_P, 5, config, torch.Generator().manual_seed(0))
    assert members_B.shape == views_B.shape == (32,)
    assert torch.equal(members_B[:16], members_B[16:])
    assert bool((views_B[:16] != views_B[16:]).all())
    assert set(members_B.tolist()) == {member ^ 1 for member in members_B.tolist()}
    assert len(set(subject_P[members_B // 2].tolist())) == 2


def test_look_alikes_differ_in_fur_or_marking_alone(sprites_folder: Path) -> None:
    sprites, rng = load_sprites(sprites_folder), np.random.default_rng(1)
    changed = set()
    for _ in range(20):
        individual = sample_member(rng, "dog", sprites)
        other = look_alike(rng, individual, sprites)
        assert other != individual
        assert not is_heldout_individual("dog", other.fur, other.marking)
        fur, marking = (other.fur, other.fur_rgb), (other.marking, other.marking_rgb)
        kept = replace(other, fur=individual.fur, fur_rgb=individual.fur_rgb)
        if fur != (individual.fur, individual.fur_rgb):
            changed.add("fur")
            assert kept == individual
        else:
            changed.add("marking")
            assert replace(other, marking=individual.marking, marking_rgb=individual.marking_rgb) == individual
            assert marking != (individual.marking, individual.marking_rgb)
    assert changed == {"fur", "marking"}


def test_pairs_come_apart_as_neighbours() -> None:
    frames_PFHWC = np.arange(2 * 6).reshape(2, 6, 1, 1, 1).astype(np.uint8)
    assert unpair(frames_PFHWC)[:, :, 0, 0, 0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def test_training_learns_and_writes_down_how_well(config: IdentityConfig, sprites_folder: Path) -> None:
    render(config, sprites_folder)
    images_NVHWC, subjects = load_views(config.cache / "train")
    assert images_NVHWC.shape == (24, 3, 128, 128, 3)
    assert subjects[::2] == subjects[1::2]

    train_identity(config, sprites_folder, CPU, Limits(seconds=0.0, quiet=True))
    assert torch.load(config.out / "state.pt", weights_only=True)["step"] == 0
    facts = train_identity(config, sprites_folder, CPU, Limits(quiet=True))
    assert facts["steps"] == 12
    losses = [json.loads(line)["loss"] for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert facts["heldout"]["same"]["n"] == 20  # ten individuals, two ordered pairs of two views
    assert facts["heldout"]["look_alike"]["n"] == 40
    assert facts["from_judge"] == facts["tensors"]
    assert facts == json.loads((config.out / "training.json").read_text())
    card = (config.out / "README.md").read_text()
    assert f"| unseen individuals | itself | {facts['unseen']['same']['cosine']:.3f} |" in card
    assert "autoencoder" not in card


def test_heldout_individuals_are_followed_by_their_look_alikes(sprites_folder: Path) -> None:
    images_NVHWC, subjects = render_heldout(load_sprites(sprites_folder), views=2, seed=3)
    assert images_NVHWC.shape == (20, 2, 128, 128, 3)
    assert subjects[:4] == ["dog"] * 4
    assert subjects[::2] == subjects[1::2]


def test_a_saved_encoder_encodes_the_same(tmp_path: Path) -> None:
    net = IdentityNet(**TINY, width=8, side=32).eval()
    pixels_BCHW = torch.rand(3, 3, 48, 48) * 2 - 1
    save_identity(net, tmp_path)
    loaded = load_identity(tmp_path, device=CPU)
    features_BD = loaded(pixels_BCHW)
    assert torch.allclose(features_BD, net(pixels_BCHW), atol=1e-2)
    assert torch.allclose(features_BD.norm(dim=1), torch.ones(3), atol=1e-5)
    with pytest.raises(UserError, match="no identity encoder"):
        load_identity(tmp_path / "nothing", device=CPU)


def test_the_encoder_of_the_default_sizes_may_ship_and_starts_from_the_judge(tmp_path: Path) -> None:
    config = IdentityConfig()
    net = IdentityNet(widths=config.widths, blocks=config.blocks, width=config.width, side=config.side)
    judge = Judge(widths=(32, 64, 128, 160), blocks=(1, 2, 2, 1), side=128)
    assert net.start_from(judge) == 78  # all stages but the last
    assert torch.equal(net.stages[0].weight, judge.stages[0].weight)
    assert save_identity(net, tmp_path).stat().st_size <= MAX_BYTES


def test_the_command_is_told_wrong_settings_before_torch_is_imported() -> None:
    code = (
        "import sys; from cdvideo.evaluation.main import main\n"
        "try: main(['train-identity', 'views=1'])\n"
        "except ValueError as error: print(error, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "views=1: must be at least 2" in out
    assert out.strip().endswith("False")
