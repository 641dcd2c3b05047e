"""Individuals: one particular dog, not just any dog.

Every class is wide, so that a new individual lies inside of what the base has seen: two artists, free recolouring, six
kinds of markings, bellies, collars and proportions, most of it never mentioned in a caption.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cdvideo.world.palette import COLOURS, RGB, luma, mix, random_shade, repaint, shade
from cdvideo.world.sprites import SUBJECT_DRAWINGS, Anchors, Sprites

MARKINGS = ("eye patch", "spots", "stripes", "blaze", "ear tips", "half")


@dataclass(frozen=True)
class Individual:
    """What tells one member of a class from another.

    fur: colour word, or "" for the artist's own colours; fur_rgb its exact shade. marking: one of MARKINGS or "".
    width and height: proportions of the head, about 1. seed: places the spots and stripes.
    """

    subject: str
    artist: str
    fur: str = ""
    fur_rgb: RGB | None = None
    marking: str = ""
    marking_rgb: RGB = (255, 255, 255)
    belly_rgb: RGB | None = None
    collar_rgb: RGB | None = None
    width: float = 1.0
    height: float = 1.0
    seed: int = 0

    @property
    def anchors(self) -> Anchors:
        anchors = getattr(SUBJECT_DRAWINGS[self.subject], self.artist)
        assert isinstance(anchors, Anchors)
        return anchors


def sample_individual(rng: np.random.Generator, subject: str, sprites_by: tuple[str, ...]) -> Individual:
    """A random member of the class, drawn by one of the artists `sprites_by`."""
    fur = str(rng.choice(list(COLOURS))) if rng.random() < 0.55 else ""
    marking = str(rng.choice(MARKINGS)) if rng.random() < 0.5 else ""
    return Individual(
        subject=subject,
        artist=str(rng.choice(sprites_by)),
        fur=fur,
        fur_rgb=shade(rng, fur) if fur else None,
        marking=marking,
        marking_rgb=random_shade(rng),
        belly_rgb=random_shade(rng) if rng.random() < 0.3 else None,
        collar_rgb=random_shade(rng) if rng.random() < 0.25 else None,
        width=float(rng.uniform(0.93, 1.08)),
        height=float(rng.uniform(0.93, 1.08)),
        seed=int(rng.integers(2**31)),
    )


def paint_face(individual: Individual, sprites: Sprites) -> tuple[Image.Image, RGB]:
    """The individual's face (or whole figure, where the sprite is one), and the colour of its fur."""
    picture = sprites.get(individual.subject, individual.artist)
    fur, mask = sprites.furs[individual.subject, individual.artist]
    fur_rgb: RGB = tuple(round(float(c) * 255) for c in fur)  # type: ignore[assignment]
    reference = float(luma(fur))
    if individual.fur_rgb is not None:
        picture = repaint(picture, mask, individual.fur_rgb, reference=reference)
        fur_rgb = individual.fur_rgb
        reference = max(float(luma(np.array(fur_rgb, dtype=np.float32) / 255)), 0.2)
    if individual.marking:
        area = _marking_area(individual, picture)
        light = luma(picture[..., :3].astype(np.float32) / 255)
        skin = np.clip((light - 0.14) / 0.1, 0, 1) if individual.marking in ("eye patch", "half") else mask
        picture = repaint(picture, area * skin, individual.marking_rgb, reference=reference)
    return Image.fromarray(picture), fur_rgb


def _soft(distance: NDArray[np.float32], edge: float = 0.02) -> NDArray[np.float32]:
    """1 inside (distance < 0), 0 outside, with a soft edge."""
    return np.clip(0.5 - distance / edge, 0, 1).astype(np.float32)


def _marking_area(individual: Individual, picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Where the marking lies, (H, W) in [0, 1]. Lengths are fractions of the sprite's box."""
    height, width = picture.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = x / width - 0.5, y / height
    a, rng = individual.anchors, np.random.default_rng(individual.seed)
    side = 1 if individual.seed % 2 else -1
    face = a.chin
    if individual.marking == "eye patch":
        return _soft(np.hypot((x - side * a.spread) / 0.19, (y - a.eyes) / (0.20 * face)) - 1, 0.12)
    if individual.marking == "blaze":
        return _soft(np.abs(x) - 0.07 - 0.05 * y) * _soft(y - 0.62 * face)
    if individual.marking == "half":
        return _soft(-side * x)
    if individual.marking == "ear tips":
        return _soft(y - (a.top + 0.08 * face)) * _soft(0.24 - np.abs(x), 0.06)
    area = np.zeros_like(x)
    if individual.marking == "spots":
        for cx, cy, r in rng.uniform((-0.45, 0.05, 0.045), (0.45, 0.95, 0.085), (9, 3)):
            area = np.maximum(area, _soft(np.hypot(x - cx, y - cy) - r))
        return area
    assert individual.marking == "stripes", individual.marking
    wave = np.sin((np.abs(x) * 0.7 + y) * rng.uniform(34, 46) + rng.uniform(0, 6.28))
    return _soft(-(wave - 0.35).astype(np.float32), 0.5) * _soft(0.12 - np.abs(x), 0.05)


def belly_colour(individual: Individual, fur_rgb: RGB) -> RGB:
    """The belly: its own colour, or a lighter shade of the fur."""
    return individual.belly_rgb or mix(fur_rgb, (255, 255, 255), 0.45)
