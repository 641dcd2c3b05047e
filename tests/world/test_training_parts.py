"""The tools of the base's training: optimizer, learning rate, clock, averages, losses, captions with unknown words."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cdvideo.base.schedule import make_scheduler
from cdvideo.world.config import LoopConfig
from cdvideo.world.dataset import IllustratedWorld
from cdvideo.world.denoising import SCHEDULER_CONFIG, pick_captions, weighted_loss
from cdvideo.world.muon import Muon, make_optimizers, orthogonalise
from cdvideo.world.tokenizer import caption_words, with_unknown_words
from cdvideo.world.train_vae import build_vae, moment_loss, random_crops, reconstruction_loss
from cdvideo.world.training import Average, Limits, Stage, lr_factor

LOOP = LoopConfig(steps=10, batch=1, lr=0.1, warmup=2, decay=0.5, log_every=1)


def test_muon_equals_torchs_own_on_matrices() -> None:
    own, peer = nn.Linear(24, 16, bias=False), nn.Linear(24, 16, bias=False)
    peer.load_state_dict(own.state_dict())
    mine = Muon(own.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    theirs = torch.optim.Muon(
        peer.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        x = torch.randn(64, 24)  # full rank: rounding is not blown up
        for model, optimizer in ((own, mine), (peer, theirs)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(own.weight, peer.weight, atol=5e-4, rtol=0)  # bfloat16 iteration


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16)])
def test_orthogonalised_matrices_have_even_singular_values(shape: tuple[int, ...]) -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert values.min() > 0.4 and values.max() < 1.4


def test_every_trained_weight_has_one_optimizer() -> None:
    model = nn.ModuleDict({"conv_in": nn.Conv2d(3, 8, 3), "body": nn.Conv2d(8, 8, 3), "norm": nn.GroupNorm(2, 8)})
    model["norm"].bias.requires_grad_(False)
    muon, adam = make_optimizers(model, lr=1.0)
    assert isinstance(muon, Muon) and isinstance(adam, torch.optim.AdamW)
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(model["body"].weight)]
    rest = {id(p) for p in adam.param_groups[0]["params"]}
    wanted = [*model["conv_in"].parameters(), model["body"].bias, model["norm"].weight]
    assert rest == {id(p) for p in wanted}


def test_learning_rate_rises_stays_and_falls_to_zero() -> None:
    factors = [lr_factor(step, steps=100, warmup=10, decay=0.2) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1 and factors[79] == 1
    assert factors[90] == pytest.approx(0.5) and factors[100] == 0
    assert lr_factor(50, steps=100, warmup=10, decay=0.2) == lr_factor(50, steps=200, warmup=10, decay=0.2)


def make_stage(folder: Path, limits: Limits, loop: LoopConfig = LOOP) -> tuple[nn.Linear, Stage]:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    generator = torch.Generator().manual_seed(0)
    return model, Stage(
        folder, loop=loop, models={"m": model}, optimizers=[optimizer], generator=generator, limits=limits
    )


def test_a_stage_stops_in_time_and_goes_on(tmp_path: Path) -> None:
    model, stage = make_stage(tmp_path, Limits(seconds=0.05, quiet=True))
    for _ in stage.steps():
        time.sleep(0.02)
    assert 0 < stage.step < 10 and not stage.done
    drawn = torch.rand(1, generator=stage.generator)
    again, later = make_stage(tmp_path, Limits(quiet=True))
    assert torch.equal(again.weight, model.weight) and later.step == stage.step
    assert torch.equal(torch.rand(1, generator=later.generator), drawn)
    assert list(later.steps()) == list(range(stage.step, 10)) and later.done
    assert later.seconds > stage.seconds


def test_fit_ends_the_schedule_with_the_minutes(tmp_path: Path) -> None:
    loop = replace(LOOP, steps=100_000)
    _, stage = make_stage(tmp_path, Limits(seconds=1.0, fit=True, quiet=True), loop)
    start = time.monotonic()
    for _ in stage.steps():
        time.sleep(0.002)
    assert 100 < stage.total < 1000 and stage.done
    assert 0.5 < time.monotonic() - start < 1.5
    _, kept = make_stage(tmp_path, Limits(quiet=True), loop)
    assert kept.total == stage.total
    _, longer = make_stage(tmp_path, Limits(quiet=True), replace(loop, steps=200_000))
    assert longer.total == 200_000


def test_metrics_must_be_finite(tmp_path: Path) -> None:
    _, stage = make_stage(tmp_path, Limits(quiet=True))
    stage.log(loss=torch.tensor(1.5))
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 0, "seconds": 0.0, "loss": 1.5}
    with pytest.raises(FloatingPointError, match="loss"):
        stage.log(loss=float("nan"))


def test_average_follows_the_weights() -> None:
    model = nn.Linear(2, 2, bias=False)
    average = Average(model, decay=0.5)
    before = average.model.weight.clone()
    nn.init.ones_(model.weight)
    average.update(1000)
    torch.testing.assert_close(average.model.weight, (before + 1) / 2)
    assert not average.model.weight.requires_grad and model.weight.requires_grad


def test_crops_are_cut_from_the_pictures() -> None:
    images = torch.arange(2 * 16 * 16, dtype=torch.uint8).view(2, 16, 16, 1).expand(-1, -1, -1, 3).contiguous()
    crops = random_crops(images, 6, 8, torch.Generator().manual_seed(0))
    values = ((crops + 1) * 127.5).round()
    assert crops.shape == (6, 3, 8, 8)
    assert (values.diff(dim=3) % 256 == 1).all() and (values.diff(dim=2) % 256 == 16).all()
    assert len({float(crop[0, 0, 0]) for crop in values}) > 2


def test_reconstruction_and_moment_losses() -> None:
    picture = torch.rand(2, 3, 16, 16)
    assert reconstruction_loss(picture, picture) == 0
    assert reconstruction_loss(picture + 0.1, picture).item() == pytest.approx(0.3, abs=1e-5)  # three scales, no edges
    assert moment_loss(torch.randn(64, 8, 32, 32)).item() < 1e-3
    assert moment_loss(3 + torch.randn(64, 8, 32, 32)).item() == pytest.approx(9, rel=0.05)


def test_loss_weighs_the_subject() -> None:
    scheduler, steps = make_scheduler(SCHEDULER_CONFIG), torch.tensor([999])
    target, mask = torch.zeros(1, 2, 4, 4), torch.ones(1, 1, 4, 4)
    mask[..., :2, :] = 3
    top, bottom = torch.zeros_like(target), torch.zeros_like(target)
    top[:, :, :2], bottom[:, :, 2:] = 1, 1
    losses = [weighted_loss(scheduler, wrong, target, steps, mask, gamma=5.0).item() for wrong in (top, bottom)]
    assert losses == pytest.approx([0.75, 0.25])


def test_captions_are_picked_and_emptied() -> None:
    ids_NKL = torch.tensor([[[i, k] for k in range(4)] for i in range(5)], dtype=torch.int16)
    picks, empty = torch.arange(5).repeat(400), torch.tensor([-1, -1])
    generator = torch.Generator().manual_seed(0)
    ids_BL = pick_captions(ids_NKL, picks, empty, empty=0.2, noisy=0.1, generator=generator)
    dropped = ids_BL[:, 0] == -1
    assert 0.15 < dropped.float().mean() < 0.25
    assert torch.equal(ids_BL[~dropped, 0], picks[~dropped])
    assert 0.06 < (ids_BL[:, 1] == 3).float().mean() < 0.14
    assert set(ids_BL[~dropped, 1].tolist()) == {0, 1, 2, 3}


def test_unknown_words_go_into_captions() -> None:
    rng = np.random.default_rng(0)
    noisy = [with_unknown_words("a dog surfing at night", rng, ["volcano"]) for _ in range(200)]
    assert all(text != "a dog surfing at night" for text in noisy)
    assert any("volcano" in text for text in noisy)
    assert sum("dog" in text for text in noisy) > 170
    assert caption_words(["A dog, a cat!", "the dog"])[:2] in (["a", "dog"], ["dog", "a"])


def test_vae_of_the_shipped_size() -> None:
    from cdvideo.world.config import VaeConfig

    assert sum(p.numel() for p in build_vae(VaeConfig()).parameters()) < 1_700_000


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "clips"])
def test_the_illustrated_world_gives_items(split: str) -> None:
    sprites = Path(".sprites")
    if not sprites.is_dir():
        pytest.skip("the sprites were not fetched")
    world = IllustratedWorld(sprites)
    items = [world.item(np.random.default_rng(4), split, frames=4, captions=3) for _ in range(2)]
    assert np.array_equal(items[0].frames_FHWC, items[1].frames_FHWC) and items[0].captions == items[1].captions
    assert items[0].frames_FHWC.shape == ((4 if split == "clips" else 1), 128, 128, 3)
    assert len(items[0].captions) == 3 and items[0].labels["subject"] in " ".join(items[0].captions)
