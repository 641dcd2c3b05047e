"""What backdrops are made of: the stage with its own time, sky, clouds, hills and sea.

Everything that moves is a smooth function of the stage's time, so that a still is a frame of a clip.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from cdvideo.world.drawing import Point, gradient, place, polygon, smooth
from cdvideo.world.palette import RGB, mix
from cdvideo.world.sprites import ARTISTS, Sprites

SIDE = 128
WHITE: RGB = (255, 255, 255)
SKIES: tuple[tuple[RGB, RGB], ...] = (
    ((105, 180, 240), (200, 232, 250)),
    ((140, 205, 245), (225, 242, 250)),
    ((250, 170, 120), (255, 225, 180)),
    ((150, 150, 230), (250, 200, 215)),
)


@dataclass(frozen=True)
class Stage:
    """Where and when a backdrop is drawn. seed: everything random in it. speed: of what moves, about 1."""

    sprites: Sprites
    seed: int
    time: float
    speed: float
    colour: str = "blue"

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def picture(self, rng: np.random.Generator, name: str) -> Image.Image:
        return Image.fromarray(self.sprites.get(name, str(rng.choice(ARTISTS))))


Backdrop = Callable[[Stage], tuple[Image.Image, Image.Image | None]]  # what lies behind, and before, the figure


def stand(
    canvas: Image.Image, picture: Image.Image, x: float, foot: float, height: float, *, flip: bool = False
) -> None:
    """Places a picture standing on `foot`."""
    place(canvas, picture, (x, foot - height / 2), scale=height / picture.height, flip=flip)


def draw_smooth(canvas: Image.Image, draw: Callable[[ImageDraw.ImageDraw, float], None]) -> None:
    """Draws smooth shapes on top of the canvas."""
    canvas.alpha_composite(smooth(canvas.size, draw))


def empty() -> Image.Image:
    return Image.new("RGBA", (SIDE, SIDE))


def wrap(x: float, margin: float = 30) -> float:
    """Brings x into [-margin, SIDE + margin): what leaves on one side comes in on the other."""
    return (x + margin) % (SIDE + 2 * margin) - margin


def sky(rng: np.random.Generator) -> Image.Image:
    top, bottom = SKIES[rng.choice(len(SKIES), p=(0.4, 0.35, 0.15, 0.10))]
    return gradient(SIDE, top, bottom)


def clouds(
    stage: Stage, canvas: Image.Image, rng: np.random.Generator, count: int, speed: float, band: Point, size: Point
) -> None:
    picture = stage.picture(rng, "cloud")
    for _ in range(count):
        x, y, width = rng.uniform(-20, 148), rng.uniform(*band), rng.uniform(*size)
        place(canvas, picture, (wrap(x - speed * stage.speed * stage.time), y), scale=width / picture.width)


def hill(pen: ImageDraw.ImageDraw, k: float, height: float, wave: Point, rgb: RGB, shift: float = 0.0) -> None:
    """A wavy line of ground: (amplitude, wave length) in pixels, filled down to the lower edge."""
    crest = [(x, height + wave[0] * math.sin(2 * math.pi * (x + shift) / wave[1])) for x in range(-2, SIDE + 4, 3)]
    polygon(pen, k, [*crest, (SIDE + 4, SIDE + 2), (-2, SIDE + 2)], rgb)


def sea(stage: Stage, canvas: Image.Image, horizon: float, blue: RGB, layers: int, swell: float) -> None:
    """Layers of waves, nearer ones larger, darker and faster."""

    def paint(pen: ImageDraw.ImageDraw, k: float) -> None:
        for i in range(layers):
            near = i / max(1, layers - 1)
            height = horizon + (SIDE - horizon) * near * 0.62
            shift = stage.time * stage.speed * (14 + 30 * near) * (1 if i % 2 else -0.6) + 37 * i
            colour = mix(mix(blue, WHITE, 0.35), blue, near)
            hill(pen, k, height - 1.2, (swell * (0.4 + near), 30 + 22 * near), mix(colour, WHITE, 0.45), shift)
            hill(pen, k, height + 0.6, (swell * (0.4 + near), 30 + 22 * near), colour, shift)

    draw_smooth(canvas, paint)
