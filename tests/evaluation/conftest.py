"""What tests of measuring share."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from cdvideo.world.palette import COLOURS
from cdvideo.world.sprites import ARTISTS, SCENERY_CODES, SUBJECT_DRAWINGS, THING_CODES


@pytest.fixture(scope="session")
def sprites_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disc with a dot for every sprite: enough for what is drawn with them to have a fur and markings."""
    folder = tmp_path_factory.mktemp("sprites")
    names = [*SUBJECT_DRAWINGS, *THING_CODES, *SCENERY_CODES]
    for artist in ARTISTS:
        (folder / artist).mkdir()
        for i, name in enumerate(names):
            if name in SUBJECT_DRAWINGS and getattr(SUBJECT_DRAWINGS[name], artist) is None:
                continue
            picture = Image.new("RGBA", (64, 64))
            pen = ImageDraw.Draw(picture)
            pen.ellipse((2, 2, 61, 61), fill=(*list(COLOURS.values())[i % 6], 255))
            pen.ellipse((28, 28, 36, 36), fill=(20, 20, 20, 255))
            picture.save(folder / artist / f"{name}.png")
    return folder
