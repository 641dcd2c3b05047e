"""scripts/animate.py on the files that people own: a base in one file, AnimateDiff's motion modules, a motion LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from safetensors.torch import save_file

from cdvideo.cli import run_main
from cdvideo.motion.config import MotionConfig
from cdvideo.motion.modules import MotionModules
from cdvideo.sampling.animate import main, motion_loras
from tests.base.ldm_names import make_text_encoder, make_unet, make_vae, official

QUICK = ["--frames", "2", "--steps", "2", "--format", "gif", "width=64", "height=64", "--concept", "none"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sd.safetensors, mm.ckpt and zoom.ckpt."""
    folder = tmp_path_factory.mktemp("files")
    unet = make_unet(1)
    tensors = official(1, unet, make_vae(), make_text_encoder(1))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "sd.safetensors")
    motion = MotionModules(MotionConfig(block_out_channels=unet.config["block_out_channels"], motion_max_seq_length=24))
    for parameter in motion.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    names = {
        name: name.replace(".pos_embed.", ".attention_blocks.0.pos_encoder.")
        .replace(".attn1.", ".attention_blocks.0.")
        .replace(".attn2.", ".attention_blocks.1.")
        for name in motion.state_dict()
    }
    torch.save({names[name]: tensor for name, tensor in motion.state_dict().items()}, folder / "mm.ckpt")
    stem = "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.processor"
    width = unet.config["block_out_channels"][0]
    lora = {
        f"{stem}.to_v_lora.down.weight": torch.randn(2, width),
        f"{stem}.to_v_lora.up.weight": torch.randn(width, 2),
    }
    torch.save(lora, folder / "zoom.ckpt")
    return folder


@pytest.fixture
def films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "films"


def call(*flags: str | Path) -> int:
    return run_main(main, [str(flag) for flag in ["--prompt", "a dog", *QUICK, *flags]])


def test_a_film_from_files_alone(files: Path, films: Path, capsys: pytest.CaptureFixture[str]) -> None:
    owned = ["--base", files / "sd.safetensors", "--motion", files / "mm.ckpt"]
    assert call(*owned) == 0
    said = capsys.readouterr().out
    assert "Stable Diffusion 1.x in one file" in said and "matched UNet 686/686" in said
    assert "AnimateDiff v2, matched" in said and "up to 24 frames, betas linear" in said
    plain = iio.imread(films / "a-dog-0.gif")
    assert len(plain) == 2
    assert call(*owned, "--motion-lora", f"{files / 'zoom.ckpt'}:0.5") == 0
    assert "motion LoRA" in (said := capsys.readouterr().out) and "matched 2/2, strength 0.5" in said
    assert (plain != iio.imread(films / "a-dog-0-2.gif")).any()
    settings = (films / "a-dog-0-2.json").read_text()
    assert json.loads(settings)["motion_lora"] == "zoom.ckpt:0.5"
    assert str(files) not in settings, "no folders of the user's machine in a film"


def test_mistaken_files_and_long_films_end_with_the_code_for_bad_input(
    files: Path, films: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--base", files / "sd.safetensors"]
    assert call(*base) == 2
    assert "no motion modules of its own" in capsys.readouterr().err
    assert call(*base, "--motion", files / "zoom.ckpt") == 2
    assert "a motion LoRA" in capsys.readouterr().err
    assert call(*base, "--motion", files / "sd.safetensors") == 2
    assert "an image model" in capsys.readouterr().err
    assert call(*base, "--motion", files / "mm.ckpt", "--frames", "30", "--window-size", "25") == 2
    assert "2 to 24 frames" in capsys.readouterr().err
    assert not list(films.glob("*.gif"))


def test_motion_loras_are_written_with_their_strengths() -> None:
    assert motion_loras("none") == []
    assert motion_loras("zoom.ckpt, pan.safetensors:0.7,C:\\tilt.ckpt:-1") == [
        (Path("zoom.ckpt"), 1.0),
        (Path("pan.safetensors"), 0.7),
        (Path("C:\\tilt.ckpt"), -1.0),
    ]
