"""Drawing with smooth edges: sprites placed at fractions of a pixel, and shapes drawn large and brought down."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw

from cdvideo.world.palette import RGB, mix

Point: TypeAlias = tuple[float, float]
SUPERSAMPLE = 2


def place(
    canvas: Image.Image,
    sprite: Image.Image,
    centre: Point,
    *,
    scale: float = 1.0,
    angle: float = 0.0,
    flip: bool = False,
) -> None:
    """Pastes `sprite` with its middle at `centre` (pixels, fractions count), scaled, then turned by `angle` degrees."""
    sprite = sprite.convert("RGBa")  # premultiplied once, not in each of the steps
    if scale < 0.9:  # an affine transform alone would alias
        size = max(1, round(sprite.width * scale)), max(1, round(sprite.height * scale))
        sprite, scale = sprite.resize(size, Image.Resampling.HAMMING), 1.0
    if flip:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    half_w = (abs(sprite.width * cos) + abs(sprite.height * sin)) * scale / 2 + 2
    half_h = (abs(sprite.width * sin) + abs(sprite.height * cos)) * scale / 2 + 2
    left, top = max(0, math.floor(centre[0] - half_w)), max(0, math.floor(centre[1] - half_h))
    right, bottom = min(canvas.width, math.ceil(centre[0] + half_w)), min(canvas.height, math.ceil(centre[1] + half_h))
    if right <= left or bottom <= top:
        return
    a, b = cos / scale, sin / scale
    dx, dy = left - centre[0], top - centre[1]
    data = (a, b, a * dx + b * dy + sprite.width / 2, -b, a, -b * dx + a * dy + sprite.height / 2)
    turned = sprite.transform((right - left, bottom - top), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
    canvas.alpha_composite(turned.convert("RGBA"), (left, top))


def smooth(size: tuple[int, int], draw: Callable[[ImageDraw.ImageDraw, float], None]) -> Image.Image:
    """An RGBA picture of `size` drawn SUPERSAMPLE times larger by `draw(pen, factor)` and brought down.

    Colours are premultiplied: an opaque one is itself, and a see-through one comes from `glass`.
    """
    large = Image.new("RGBA", (size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE))
    draw(ImageDraw.Draw(large), SUPERSAMPLE)
    return Image.frombytes("RGBa", large.size, large.tobytes()).reduce(SUPERSAMPLE).convert("RGBA")


def glass(rgb: RGB, alpha: int) -> tuple[int, int, int, int]:
    """A see-through colour to fill with, premultiplied; alpha in [0, 255]."""
    return (*mix((0, 0, 0), rgb, alpha / 255), alpha)


def gradient(size: int, top: RGB, bottom: RGB) -> Image.Image:
    """A square RGBA picture fading from `top` to `bottom`."""
    share = np.linspace(0, 1, size, dtype=np.float32)[:, None]
    column = np.array(top, dtype=np.float32) * (1 - share) + np.array(bottom, dtype=np.float32) * share
    rgb = np.broadcast_to(column[:, None], (size, size, 3))
    return Image.fromarray((rgb + 0.5).astype(np.uint8)).convert("RGBA")


def ellipse(pen: ImageDraw.ImageDraw, k: float, centre: Point, radii: Point, rgb: RGB) -> None:
    """A filled ellipse, in units of `k` pixels."""
    (x, y), (rx, ry) = centre, radii
    pen.ellipse([(x - rx) * k, (y - ry) * k, (x + rx) * k, (y + ry) * k], fill=(*rgb, 255))


def shaded(pen: ImageDraw.ImageDraw, k: float, centre: Point, radii: Point, rgb: RGB) -> None:
    """An ellipse with a soft light from above: three nested ellipses."""
    (x, y), (rx, ry) = centre, radii
    ellipse(pen, k, centre, radii, mix(rgb, (40, 20, 50), 0.18))
    ellipse(pen, k, (x, y - ry * 0.06), (rx * 0.95, ry * 0.93), rgb)
    ellipse(pen, k, (x - rx * 0.15, y - ry * 0.3), (rx * 0.6, ry * 0.5), mix(rgb, (255, 255, 255), 0.12))


def polygon(pen: ImageDraw.ImageDraw, k: float, points: list[Point], rgb: RGB) -> None:
    """A filled polygon, in units of `k` pixels."""
    pen.polygon([(x * k, y * k) for x, y in points], fill=(*rgb, 255))


def line(pen: ImageDraw.ImageDraw, k: float, points: list[Point], rgb: RGB, width: float) -> None:
    """A line with round joints, in units of `k` pixels."""
    pen.line([(x * k, y * k) for x, y in points], fill=(*rgb, 255), width=max(1, round(width * k)), joint="curve")
