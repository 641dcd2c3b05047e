"""Pictures of every mode as what a viewer shows: opaque, 8-bit sRGB."""

from __future__ import annotations

import io
import logging
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

logger = logging.getLogger(__name__)

_NEGLIGIBLE = 2  # levels by which one profile of sRGB differs from another


def to_rgb(image: Image.Image, *, name: str = "a picture") -> Image.Image:
    """A picture as it is seen: its colour profile applied, transparency laid on white, in RGB.

    A profile that can not be used is said, with the picture's name, and its colours are taken as sRGB.
    """
    profile = image.info.get("icc_profile")
    alpha = None
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    elif image.has_transparency_data:
        grey, image = image.mode in ("L", "LA", "La"), image.convert("RGBA")
        alpha, image = image.getchannel("A"), image.convert("RGB")
        image = image.getchannel("R") if grey else image
    if image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if isinstance(profile, bytes) and image.mode != "LAB":
        image = _as_shown(image, profile, name)
    image = image.convert("RGB")
    if alpha is not None:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow's own conversion clips at 255. Integers are 16-bit pictures; floats are in [0, 1] or [0, 255]."""
    values = np.asarray(image)
    white = 65535.0 if image.mode != "F" else 1.0 if values.max() <= 1 else 255.0
    levels = np.empty(values.shape, np.uint8)
    for row, target in zip(values, levels, strict=True):  # row by row, or a large picture takes 24 bytes a pixel
        target[:] = np.clip(row.astype(np.float64) * (255 / white) + 0.5, 0, 255)
    return Image.fromarray(levels)


def _as_shown(image: Image.Image, profile: bytes, name: str) -> Image.Image:
    transform = _transform(profile, image.mode, name)
    if transform is None:
        return image
    if image.mode == "L" and transform.input_mode == "RGB":
        image = image.convert("RGB")
    return transform.apply(image)


@lru_cache(maxsize=8)  # an animation's frames all have the same; and what is wrong with it is said once
def _transform(profile: bytes, mode: str, name: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where it is sRGB already, or can not be used."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if mode == "L" and space == "RGB":  # many programs put their profile of colours on grey pictures
            mode = "RGB"
        if space != {"L": "GRAY"}.get(mode, mode):
            raise ValueError(f"it is for {space}, the picture is {mode}")
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (OSError, ValueError, TypeError, ImportError, ImageCms.PyCMSError) as error:
        logger.warning("%s: its colour profile can not be used (%s): its colours are taken as sRGB", name, error)
        return None
    if mode == "RGB":
        levels = np.linspace(0, 255, 9).astype(np.uint8)
        probe = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
        moved = np.abs(np.asarray(transform.apply(Image.fromarray(probe))).astype(int) - probe)
        if moved.max() <= _NEGLIGIBLE:
            return None
    return transform
