"""What tests of whole commands share."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageDraw

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
