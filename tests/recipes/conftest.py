"""What tests of whole commands share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from cdvideo.base.loader import load_base
from cdvideo.motion.files import save_motion
from cdvideo.motion.modules import MotionModules
from cdvideo.world.sprites import ARTISTS, SCENERY_CODES, SUBJECT_DRAWINGS, THING_CODES


@pytest.fixture(scope="module")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ellipses in place of the artists' pictures."""
    folder = tmp_path_factory.mktemp("sprites")
    for artist in ARTISTS:
        (folder / artist).mkdir()
        for i, name in enumerate([*SUBJECT_DRAWINGS, *THING_CODES, *SCENERY_CODES]):
            if name in SUBJECT_DRAWINGS and getattr(SUBJECT_DRAWINGS[name], artist) is None:
                continue
            picture = Image.new("RGBA", (60, 64))
            ImageDraw.Draw(picture).ellipse([1, 1, 58, 62], fill=(90 + i * 37 % 150, 80 + i * 61 % 160, 120, 255))
            picture.save(folder / artist / f"{name}.png")
    return folder


@pytest.fixture
def base_folder(tmp_path: Path, tiny_base_folder: Path) -> Path:
    """The tiny base with motion modules that reach 8 frames."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base_folder, folder)
    base = load_base(str(folder), device=torch.device("cpu"))
    motion = MotionModules.for_unet(
        base.unet, motion_num_attention_heads=2, motion_max_seq_length=8, norm_mode="diffusers", trained_for=base.hash
    )
    for parameter in motion.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    save_motion(motion, folder / "motion")
    return folder


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the command is called in."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder
