"""Frames in, one by one, from whatever holds moving or still pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image

from cdvideo.errors import UserError
from cdvideo.media.export import Frame


def read_frames(path: Path) -> Iterator[Frame]:
    """frame_HWC, uint8 RGB, of a film, an animation or a picture; no more than one is in memory.

    Raises:
        UserError: no such file, or one that can not be read.
    """
    allowed = "a film (mp4, webm, mov, ...), an animation (gif, webp) or a picture (png, jpg, ...)"
    if not path.is_file():
        raise UserError(f"no file {path}", allowed=allowed, do="check the path")
    try:
        for frame in iio.imiter(path):
            yield np.asarray(Image.fromarray(frame).convert("RGB"))
    except Exception as error:  # a broken file makes decoders raise nearly anything
        raise UserError(f"{path.name} can not be read ({error})", allowed=allowed, do="convert it to mp4") from error
