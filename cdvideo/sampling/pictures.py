"""What films begin from: frames of a clip, one by one, or a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageOps

from cdvideo.errors import UserError
from cdvideo.media.export import Frame


def read_frames(path: Path) -> Iterator[Frame]:
    """frame_HWC, uint8 RGB, of a film or an animation; no more than one is in memory.

    Raises:
        UserError: a file that can not be read.
    """
    try:
        for frame in iio.imiter(path):
            yield np.asarray(Image.fromarray(frame).convert("RGB"))
    except Exception as error:  # a broken file makes decoders raise nearly anything
        raise _unreadable(path, error, "a film (mp4, webm, mov, ...) or an animation (gif, webp)") from error


def read_picture(path: Path) -> Frame:
    """frame_HWC, uint8 RGB: upright, and on white where it is transparent.

    Raises:
        UserError: a file that can not be read.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGBA")
    except Exception as error:
        raise _unreadable(path, error, "a picture (png, jpg, webp, ...)") from error
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def _unreadable(path: Path, error: Exception, allowed: str) -> UserError:
    return UserError(f"{path.name} can not be read ({error})", allowed=allowed, do="save it anew in another format")
