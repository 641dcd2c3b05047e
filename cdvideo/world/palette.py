"""Named colours of the world, and the recolouring of sprites."""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray

# Middle shades; `shade` varies each a little, so that a colour word means a range and not one value.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "orange": (240, 140, 45),
    "yellow": (246, 205, 60),
    "green": (70, 170, 85),
    "teal": (40, 165, 165),
    "blue": (66, 120, 225),
    "purple": (140, 85, 205),
    "pink": (240, 130, 175),
    "brown": (135, 90, 60),
    "black": (58, 58, 66),
    "white": (240, 240, 243),
    "grey": (150, 152, 160),
}

RGB = tuple[int, int, int]


def shade(rng: np.random.Generator, name: str) -> RGB:
    """A random shade of the named colour: hue within 0.02 turns, saturation and value within 12 %."""
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in COLOURS[name]))
    h = (h + rng.uniform(-0.02, 0.02)) % 1.0
    s, v = np.clip([s * rng.uniform(0.88, 1.12), v * rng.uniform(0.88, 1.12)], 0, 1)
    r, g, b = colorsys.hsv_to_rgb(h, float(s), float(v))
    return round(r * 255), round(g * 255), round(b * 255)


def random_shade(rng: np.random.Generator) -> RGB:
    """A random shade of a random named colour."""
    return shade(rng, str(rng.choice(list(COLOURS))))


def mix(a: RGB, b: RGB, share: float) -> RGB:
    """The colour `share` of the way from a to b, share in [0, 1]."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def luma(rgb: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rec. 601 luma of (..., 3) colours in [0, 1]."""
    return np.asarray(rgb @ np.array([0.299, 0.587, 0.114], dtype=np.float32), dtype=np.float32)


def dominant_colour(rgba_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The most common colour in [0, 1] among opaque pixels that are not dark (eyes, noses): the fur of a face."""
    rgb = rgba_HWC[..., :3].reshape(-1, 3)[rgba_HWC[..., 3].reshape(-1) > 200].astype(np.float32) / 255
    rgb = rgb[luma(rgb) > 0.25]
    bins = (rgb * 5.999).astype(int)
    codes = bins @ np.array([36, 6, 1])
    return np.asarray(rgb[codes == np.bincount(codes).argmax()].mean(axis=0), dtype=np.float32)


def fur_mask(rgba_HWC: NDArray[np.uint8], fur: NDArray[np.float32]) -> NDArray[np.float32]:
    """How much each pixel belongs to the fur, in [0, 1]: near to its colour, shading (luma) counting half."""
    rgb = rgba_HWC[..., :3].astype(np.float32) / 255
    opponent = np.stack([rgb[..., 0] - rgb[..., 1], rgb[..., 1] - rgb[..., 2], 0.5 * luma(rgb)], axis=-1)
    centre = np.array([fur[0] - fur[1], fur[1] - fur[2], 0.5 * luma(fur)], dtype=np.float32)
    distance = np.linalg.norm(opponent - centre, axis=-1)
    mask = np.clip(1.7 - distance / 0.17, 0, 1) * np.clip((luma(rgb) - 0.18) / 0.12, 0, 1)
    return np.asarray(mask, dtype=np.float32)


def repaint(
    rgba_HWC: NDArray[np.uint8], mask_HW: NDArray[np.float32], rgb: RGB, *, reference: float
) -> NDArray[np.uint8]:
    """Paints `rgb` where the mask is, keeping the shading: luma relative to `reference`, the luma of the old colour."""
    old = rgba_HWC[..., :3].astype(np.float32) / 255
    light = np.clip(luma(old) / max(reference, 0.05), 0.35, 1.35)[..., None]
    new = np.clip(np.array(rgb, dtype=np.float32) / 255 * light, 0, 1)
    out = rgba_HWC.copy()
    out[..., :3] = ((old + (new - old) * mask_HW[..., None]) * 255 + 0.5).astype(np.uint8)
    return out
