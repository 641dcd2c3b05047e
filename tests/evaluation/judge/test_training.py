"""Training on drawn stand-ins for stills: a colour for each setting, a bright square for each subject and thing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from cdvideo.evaluation.config import JudgeConfig
from cdvideo.evaluation.judge.model import CLASSES, HEADS, WEIGHTS_FILE, Judge, load_judge
from cdvideo.evaluation.judge.training import fit_temperatures, load_stills, measure, train_judge
from cdvideo.world.config import LoopConfig
from cdvideo.world.training import Limits

CPU = torch.device("cpu")


def write_stills(folder: Path, count: int, *, seed: int) -> None:
    """Stills of 32 pixels of two subjects, two things and two settings, each plain to see."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(2, size=(count, 3))
    pixels = np.zeros((count, 32, 32, 3), dtype=np.uint8)
    pixels += np.where(picks[:, 2, None, None, None] == 1, 200, 60).astype(np.uint8)
    pixels[:, 16:28, 8:24, 0] = np.where(picks[:, 0, None, None] == 1, 250, 10)
    pixels[:, 4:12, 8:24, 2] = np.where(picks[:, 1, None, None] == 1, 250, 10)
    folder.mkdir(parents=True)
    np.save(folder / "pixels.npy", pixels)
    np.save(folder / "masks.npy", np.full((count, 4, 4), 255, dtype=np.uint8))
    lines = [{head: CLASSES[head][pick] for head, pick in zip(HEADS, row, strict=True)} for row in picks]
    (folder / "labels.jsonl").write_text("".join(json.dumps({**line, "captions": []}) + "\n" for line in lines))


@pytest.fixture
def config(tmp_path: Path) -> JudgeConfig:
    write_stills(tmp_path / "stills" / "train", 128, seed=1)
    write_stills(tmp_path / "stills" / "heldout", 64, seed=2)
    return JudgeConfig(
        out=tmp_path / "judge",
        cache=tmp_path / "stills",
        widths=(8, 8, 16, 16),
        blocks=(0, 1, 1, 0),
        side=32,
        dtype="fp32",
        scenes=128,
        check_scenes=64,
        loop=LoopConfig(steps=60, batch=32, lr=5e-3, warmup=5, ema=0.9, log_every=10),
    )


def test_the_judge_learns_and_writes_down_how_well(config: JudgeConfig) -> None:
    facts = train_judge(config, CPU, Limits(quiet=True))
    metrics = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]
    assert facts["renders"]["n"] == 32
    assert all(facts["renders"][head]["accuracy"] >= 0.9 for head in HEADS)
    assert facts == json.loads((config.out / "training.json").read_text())
    assert facts["bytes"] == (config.out / WEIGHTS_FILE).stat().st_size
    assert "round_trip" not in facts

    card = (config.out / "README.md").read_text()
    accuracy = f"{100 * facts['renders']['setting']['accuracy']:.2f} %"
    assert f"| new renders (n = 32) | setting | {accuracy} |" in card
    assert "autoencoder" not in card.partition("## Figures")[0]

    images_NHWC, _, labels_NH = load_stills(config.cache / "heldout", CPU)
    again = measure(load_judge(config.out, device=CPU), images_NHWC[32:], labels_NH[32:])
    assert again == facts["renders"]


def test_training_goes_on_where_it_was(config: JudgeConfig) -> None:
    train_judge(config, CPU, Limits(seconds=0.0, quiet=True))
    first = torch.load(config.out / "state.pt", weights_only=True)
    assert first["step"] == 0
    facts = train_judge(config, CPU, Limits(quiet=True))
    assert facts["steps"] == 60


def test_with_a_vae_round_trips_are_trained_on_and_measured(
    config: JudgeConfig, tiny_vae: AutoencoderTiny, tmp_path: Path
) -> None:
    tiny_vae.save_pretrained(tmp_path / "vae")
    loop = LoopConfig(steps=3, batch=8, lr=1e-3, warmup=1, log_every=1)
    shared = {name: getattr(config, name) for name in ("out", "cache", "widths", "blocks", "side", "dtype")}
    facts = train_judge(JudgeConfig(**shared, vae=tmp_path / "vae", loop=loop), CPU, Limits(quiet=True))
    assert facts["round_trip"]["n"] == 32
    card = (config.out / "README.md").read_text()
    assert "| new renders through the autoencoder (n = 32) | subject |" in card
    assert "round trips through the base's autoencoder" in " ".join(card.split())


def test_temperatures_undo_a_scale_of_the_logits(config: JudgeConfig) -> None:
    images_NHWC, _, labels_NH = load_stills(config.cache / "heldout", CPU)
    torch.manual_seed(5)
    judge = Judge(widths=config.widths, blocks=config.blocks, side=config.side).eval()
    plain_H = fit_temperatures(judge, images_NHWC, labels_NH)
    for head in judge.heads.values():
        head.weight.data *= 1.5
        head.bias.data *= 1.5
    scaled_H = fit_temperatures(judge, images_NHWC, labels_NH)
    inside_H = (plain_H < 2.6) & (plain_H > 0.26)  # elsewhere the search ends at its border
    assert inside_H.any()
    assert torch.allclose(scaled_H[inside_H], 1.5 * plain_H[inside_H], rtol=0.02)
