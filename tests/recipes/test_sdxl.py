"""SDXL from the command line, end to end: a concept is learned, drawn, filmed with AnimateDiff's file and converted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch

from cdvideo.cli import run_main
from cdvideo.interchange.main import main as convert
from cdvideo.recipes import train_concept_main
from cdvideo.sampling.animate import main as animate
from tests.motion.test_checkpoints import official
from tests.motion.test_checkpoints_sdxl import make_adapter


def test_a_concept_is_learned_filmed_and_converted(
    sdxl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sdxl_folder, "sdxl")
    config = Path("sdxl/unet/config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": 8}))  # 64 pixels, for speed
    adapter = make_adapter(32, widths=(64, 64, 128))
    torch.save(official(adapter), "mm_sdxl_v10_beta.ckpt")

    quick = ["--steps", "2", "data.variants=1", "optim.batch_size=1", "sample.every=0"]
    assert run_main(train_concept_main, ["--base", "sdxl", "--out", "runs/dog", "--class-word", "dog", *quick]) == 0
    said = capsys.readouterr().out
    assert "base sdxl: SDXL, a folder in diffusers' layout" in said and "second text encoder" in said

    shown = ["--prompt", "a sks dog surfing", "--base", "sdxl", "--concept", "runs/dog", "--out", "films"]
    assert run_main(animate, [*shown, "--steps", "2", "--still"]) == 0
    film = ["--motion", "mm_sdxl_v10_beta.ckpt", "--frames", "3", "--steps", "2", "--format", "gif"]
    assert run_main(animate, [*shown, *film]) == 0
    count = len(adapter.state_dict())
    said = capsys.readouterr().out
    assert f"AnimateDiff for SDXL, beta, matched {count}/{count}, up to 32 frames, betas scaled_linear to 0.02" in said
    assert iio.imread("films/a-sks-dog-surfing-0-2.gif").shape[0] == 3

    assert run_main(convert, ["runs/dog", "--base", "sdxl", "--to", "kohya", "--out", "kohya"]) == 0
    assert sorted(path.name for path in Path("kohya").iterdir()) == ["dog.safetensors", "sks.safetensors"]
    assert run_main(animate, [*shown[:4], "--concept", "kohya", "--out", "again", "--steps", "2", "--still"]) == 0
