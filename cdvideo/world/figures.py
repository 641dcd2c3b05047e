"""A figure: an individual with a body, the thing it wears and what it rides, drawn upright as one RGBA picture.

Lengths are units: one pixel of a 128-pixel scene at scale 1. The picture is drawn at UNIT pixels a unit, and
scenes bring it down when they place it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from cdvideo.world.drawing import Point, ellipse, line, place, polygon, shaded, smooth
from cdvideo.world.individuals import Individual, belly_colour, paint_face
from cdvideo.world.palette import RGB, luma, mix, repaint
from cdvideo.world.sprites import SUBJECT_DRAWINGS, Sprites

UNIT = 2
SIZE = (112, 136)  # units
FEET: Point = (56.0, 112.0)  # where the figure stands
FACE, FIGURE_HEIGHT = 53.0, 78.0  # side of a face of square shape; height of a sprite that has a body of its own
WHITE: RGB = (250, 250, 250)

# fmt: off
# Hats: width in skulls, and how far the lower edge sits below the top of the skull, in heights of the face.
HATS = {
    "top hat": (0.95, 0.10), "crown": (0.85, 0.10), "cap": (1.05, 0.17), "straw hat": (1.30, 0.16),
    "helmet": (1.08, 0.22), "graduation cap": (1.10, 0.18), "bow": (0.72, 0.12),
    "party hat": (0.60, 0.10), "santa hat": (0.95, 0.20), "wizard hat": (1.10, 0.14),
}
# fmt: on
GLASSES = ("sunglasses", "glasses")
NECKWEAR = ("scarf", "bow tie", "medal")
THINGS = ("headphones", *HATS, *GLASSES, *NECKWEAR, "cape")
COLOURED_THINGS = ("headphones", "cap", "helmet", "bow", "party hat", "wizard hat", "scarf", "bow tie", "cape")


@dataclass(frozen=True)
class Pose:
    """arms: angles of left and right arm in degrees (0 hangs down, 90 is level, 180 is up). steps: how high each foot
    is lifted, in units. sway: how far a cape or scarf is blown to the side, in units. turn: of the head, in degrees."""

    arms: tuple[float, float] = (30.0, 30.0)
    steps: tuple[float, float] = (0.0, 0.0)
    sway: float = 0.0
    turn: float = 0.0


@dataclass(frozen=True)
class _Face:
    """Where the face lies in the figure's picture, in units."""

    left: float
    top: float
    width: float
    height: float
    individual: Individual

    def at(self, x: float, y: float) -> Point:
        """The point at fractions of the face's box; x counts from the middle."""
        return self.left + self.width * (0.5 + x), self.top + self.height * y

    @property
    def skull(self) -> float:
        return 2 * self.individual.anchors.side * self.width


def draw_figure(
    individual: Individual,
    sprites: Sprites,
    *,
    thing: str,
    thing_rgb: RGB,
    thing_artist: str,
    vehicle: str,
    vehicle_rgb: RGB,
    pose: Pose,
) -> Image.Image:
    """The whole figure, RGBA, SIZE units at UNIT pixels; its feet stand at FEET."""
    picture, fur_rgb = paint_face(individual, sprites)
    own_body = SUBJECT_DRAWINGS[individual.subject].figure
    side = FIGURE_HEIGHT / picture.height if own_body else FACE / math.sqrt(picture.width * picture.height)
    width, height = picture.width * side * individual.width, picture.height * side * individual.height
    face = _Face(FEET[0] - width / 2, FEET[1] - height - (0 if own_body else 25), width, height, individual)

    canvas = Image.new("RGBA", (SIZE[0] * UNIT, SIZE[1] * UNIT))
    if vehicle == "boat":
        _add(canvas, lambda pen, k: _sail(pen, k, vehicle_rgb))
    if thing == "cape":
        _add(canvas, lambda pen, k: _cape(pen, k, face, thing_rgb, pose.sway))
    if not own_body:
        _add(canvas, lambda pen, k: _body(pen, k, fur_rgb, belly_colour(individual, fur_rgb), individual, pose))
    picture = picture.resize((max(1, round(width * UNIT)), max(1, round(height * UNIT))), Image.Resampling.HAMMING)
    head = Image.new("RGBA", canvas.size)
    head.alpha_composite(picture, (max(0, round(face.left * UNIT)), max(0, round(face.top * UNIT))))
    _wear_on_head(head, face, sprites, thing, thing_rgb, thing_artist)
    if pose.turn and not own_body:
        pivot = (FEET[0] * UNIT, (face.top + face.height) * UNIT)
        head = head.rotate(pose.turn, Image.Resampling.BILINEAR, center=pivot)
    canvas.alpha_composite(head)
    if individual.collar_rgb is not None and thing not in NECKWEAR:
        collar = individual.collar_rgb
        _add(canvas, lambda pen, k: _collar(pen, k, face, collar))
    _wear_on_neck(canvas, face, sprites, thing, thing_rgb, thing_artist, pose.sway)
    if vehicle:
        _add(canvas, lambda pen, k: _VEHICLES[vehicle](pen, k, vehicle_rgb))
    return canvas


def _add(canvas: Image.Image, draw: Callable[[ImageDraw.ImageDraw, float], None]) -> None:
    """Draws in units on top of the canvas."""
    canvas.alpha_composite(smooth(canvas.size, lambda pen, k: draw(pen, k * UNIT)))


def _body(pen: ImageDraw.ImageDraw, k: float, fur: RGB, belly: RGB, individual: Individual, pose: Pose) -> None:
    x, y = FEET
    limb = mix(fur, (40, 20, 50), 0.12)
    for side, lift in zip((-1, 1), pose.steps, strict=True):
        shaded(pen, k, (x + side * 8.5, y - 4 - lift), (6.5, 5.5), limb)
    shaded(pen, k, (x, y - 18), (16 * individual.width, 14.5 * individual.height), fur)
    ellipse(pen, k, (x, y - 15), (9.5, 9.5), belly)
    if individual.marking in ("spots", "stripes"):
        rng = np.random.default_rng(individual.seed)
        for side in (-1, 1):
            ellipse(
                pen,
                k,
                (x + side * rng.uniform(10.5, 12.5), y - rng.uniform(14, 22)),
                (2.4, 3.2),
                individual.marking_rgb,
            )
    for side, angle in zip((-1, 1), pose.arms, strict=True):
        shoulder = x + side * 12.5, y - 26
        hand = (
            shoulder[0] + side * 14 * math.sin(math.radians(angle)),
            shoulder[1] + 14 * math.cos(math.radians(angle)),
        )
        line(pen, k, [shoulder, hand], limb, 8)
        for end in (shoulder, hand):
            ellipse(pen, k, end, (4, 4), limb)


def _wear_on_head(head: Image.Image, face: _Face, sprites: Sprites, thing: str, rgb: RGB, artist: str) -> None:
    a = face.individual.anchors
    if thing == "headphones":
        _add(head, lambda pen, k: _headphones(pen, k, face, rgb))
    elif thing in GLASSES:
        width = max(2 * a.spread + 0.30, 0.52) * face.width
        _put(head, Image.fromarray(sprites.get(thing, artist)), face.at(0, a.eyes + 0.01), width)
    elif thing in HATS:
        share, sink = HATS[thing]
        picture = _hat(sprites, thing, rgb, artist)
        width = min(share * face.skull, 46.0, 34.0 * picture.width / picture.height)
        x, edge = face.at(0, a.top + sink * a.chin)
        _put(head, picture, (x, edge - picture.height * width / picture.width / 2), width)


def _put(canvas: Image.Image, picture: Image.Image, centre: Point, width: float) -> None:
    """Places a picture by its middle and width, in units."""
    place(canvas, picture, (centre[0] * UNIT, centre[1] * UNIT), scale=width * UNIT / picture.width)


def _hat(sprites: Sprites, thing: str, rgb: RGB, artist: str) -> Image.Image:
    if thing in _DRAWN_HATS:
        return smooth((100, 110), lambda pen, k: _DRAWN_HATS[thing](pen, k, rgb))
    picture = sprites.get(thing, artist)
    if thing in COLOURED_THINGS:
        colour, mask = sprites.furs[thing, artist if (thing, artist) in sprites.furs else sprites.artists(thing)[0]]
        picture = repaint(picture, mask, rgb, reference=float(luma(colour)))
    image = Image.fromarray(picture)
    return image.crop((0, 0, image.width, round(image.height * 0.62))) if thing == "helmet" else image


def _party_hat(pen: ImageDraw.ImageDraw, k: float, rgb: RGB) -> None:
    polygon(pen, k, [(50, 8), (88, 108), (12, 108)], rgb)
    for x, y in ((50, 45), (38, 75), (64, 72), (28, 98), (52, 96), (74, 99)):
        ellipse(pen, k, (x, y), (6, 6), WHITE)
    ellipse(pen, k, (50, 10), (10, 10), mix(rgb, WHITE, 0.7))


def _santa_hat(pen: ImageDraw.ImageDraw, k: float, rgb: RGB) -> None:
    polygon(pen, k, [(12, 95), (22, 50), (52, 22), (84, 38), (94, 70), (80, 60), (88, 95)], (205, 35, 45))
    ellipse(pen, k, (92, 72), (9, 9), WHITE)
    pen.rounded_rectangle([4 * k, 84 * k, 96 * k, 108 * k], radius=12 * k, fill=(*WHITE, 255))


def _wizard_hat(pen: ImageDraw.ImageDraw, k: float, rgb: RGB) -> None:
    ellipse(pen, k, (50, 96), (49, 12), mix(rgb, (0, 0, 0), 0.25))
    polygon(pen, k, [(58, 2), (80, 96), (20, 96)], rgb)
    pen.rectangle([22 * k, 82 * k, 78 * k, 92 * k], fill=(235, 200, 70, 255))
    for x, y, r in ((52, 40, 6), (44, 66, 5), (62, 68, 4)):
        ellipse(pen, k, (x, y), (r, r), (250, 225, 110))


_DRAWN_HATS = {"party hat": _party_hat, "santa hat": _santa_hat, "wizard hat": _wizard_hat}


def _headphones(pen: ImageDraw.ImageDraw, k: float, face: _Face, rgb: RGB) -> None:
    a = face.individual.anchors
    left, y = face.at(-a.side, a.eyes)
    right = face.at(a.side, a.eyes)[0]
    top = face.at(0, a.top)[1] - 3.5
    band = [(left - 1, top), (right + 1, 2 * y - top)]
    box = [band[0][0] * k, band[0][1] * k, band[1][0] * k, band[1][1] * k]
    pen.arc(box, 180, 360, fill=(*mix(rgb, (20, 20, 30), 0.35), 255), width=round(5.5 * k))
    pen.arc(box, 200, 340, fill=(*mix(rgb, WHITE, 0.2), 255), width=round(2.5 * k))
    for x, side in ((left, -1), (right, 1)):
        ellipse(pen, k, (x - side * 1.0, y + 1), (5.5, 10), mix(rgb, (20, 20, 30), 0.55))
        shaded(pen, k, (x + side * 2.5, y + 1), (5.5, 9), rgb)


def _neck(face: _Face) -> Point:
    x, chin = face.at(0, face.individual.anchors.chin)
    return x, chin - (1.5 if face.individual.anchors.chin == 1.0 else 0.0)


def _neck_width(face: _Face) -> float:
    return 12.5 if face.individual.anchors.chin == 1.0 else face.skull * 0.42


def _collar(pen: ImageDraw.ImageDraw, k: float, face: _Face, rgb: RGB) -> None:
    (x, y), w = _neck(face), _neck_width(face)
    pen.rounded_rectangle([(x - w) * k, (y - 1) * k, (x + w) * k, (y + 4) * k], radius=2.5 * k, fill=(*rgb, 255))
    ellipse(pen, k, (x, y + 5), (3, 3), (245, 205, 70))


def _wear_on_neck(
    canvas: Image.Image, face: _Face, sprites: Sprites, thing: str, rgb: RGB, artist: str, sway: float
) -> None:
    x, y = _neck(face)
    if thing == "scarf":
        _add(canvas, lambda pen, k: _scarf(pen, k, (x, y), _neck_width(face) + 2, rgb, sway))
    elif thing == "bow tie":
        _add(canvas, lambda pen, k: _bow_tie(pen, k, (x, y + 2), rgb))
    elif thing == "medal":
        _put(canvas, Image.fromarray(sprites.get("medal", artist)), (x, y + 8), 17)


def _scarf(pen: ImageDraw.ImageDraw, k: float, neck: Point, w: float, rgb: RGB, sway: float) -> None:
    x, y = neck
    dark = mix(rgb, (30, 10, 40), 0.25)
    tail = [(x + 4, y + 2), (x + 12, y + 2), (x + 13 + sway, y + 20), (x + 4 + sway, y + 20)]
    polygon(pen, k, tail, dark)
    for i in (0, 1, 2):
        line(pen, k, [(x + 5.5 + 3 * i + sway, y + 20), (x + 5.5 + 3 * i + sway, y + 23)], dark, 1.4)
    pen.rounded_rectangle([(x - w) * k, (y - 3) * k, (x + w) * k, (y + 6) * k], radius=4.5 * k, fill=(*rgb, 255))
    line(pen, k, [(x - w + 3, y + 0.5), (x + w - 3, y + 0.5)], mix(rgb, WHITE, 0.35), 1.6)


def _bow_tie(pen: ImageDraw.ImageDraw, k: float, centre: Point, rgb: RGB) -> None:
    x, y = centre
    for side in (-1, 1):
        polygon(pen, k, [(x, y), (x + side * 12, y - 7), (x + side * 12, y + 7)], rgb)
        polygon(pen, k, [(x, y), (x + side * 7, y - 2), (x + side * 7, y + 2)], mix(rgb, (0, 0, 0), 0.3))
    ellipse(pen, k, (x, y), (3.6, 4.2), mix(rgb, (0, 0, 0), 0.2))


def _cape(pen: ImageDraw.ImageDraw, k: float, face: _Face, rgb: RGB, sway: float) -> None:
    x, y = _neck(face)
    foot = FEET[1] - 3
    left, right = x - 30 + sway, x + 30 + sway
    polygon(pen, k, [(x - 14, y - 4), (x + 14, y - 4), (right, foot), (x + sway / 2, foot - 5), (left, foot)], rgb)
    for side in (-1, 0, 1):
        line(pen, k, [(x + side * 8, y), (x + side * 17 + sway, foot - 5)], mix(rgb, (20, 0, 30), 0.3), 1.6)


def _surfboard(pen: ImageDraw.ImageDraw, k: float, rgb: RGB) -> None:
    x, y = FEET
    ellipse(pen, k, (x, y + 2.5), (39, 5), mix(rgb, (20, 20, 40), 0.35))
    ellipse(pen, k, (x, y + 1), (39, 4.6), rgb)
    ellipse(pen, k, (x, y + 0.5), (30, 1.7), WHITE)


def _skateboard(pen: ImageDraw.ImageDraw, k: float, rgb: RGB) -> None:
    x, y = FEET
    for side in (-1, 1):
        ellipse(pen, k, (x + side * 15, y + 6), (4.2, 4.2), (50, 50, 55))
        ellipse(pen, k, (x + side * 15, y + 6), (1.8, 1.8), (230, 230, 230))
    line(pen, k, [(x - 27, y - 2.5), (x - 20, y + 1.5), (x + 20, y + 1.5), (x + 27, y - 2.5)], rgb, 4.5)


def _skis(pen: ImageDraw.ImageDraw, k: float, rgb: RGB) -> None:
    x, y = FEET
    for side, dy in ((-1, 2.5), (1, -0.5)):
        line(
            pen,
            k,
            [(x - 34, y + dy), (x + 32, y + dy), (x + 39, y + dy - 4)],
            mix(rgb, (0, 0, 0), 0.15 * (side + 1)),
            3,
        )
        hand = x + side * 21
        line(pen, k, [(hand, y - 24), (hand + side * 6, y + 2)], (90, 90, 100), 1.6)


def _car(pen: ImageDraw.ImageDraw, k: float, rgb: RGB) -> None:
    x, y = FEET
    dark = mix(rgb, (20, 0, 30), 0.3)
    pen.rounded_rectangle([(x - 43) * k, (y - 20) * k, (x + 43) * k, (y + 3) * k], radius=9 * k, fill=(*rgb, 255))
    pen.rounded_rectangle([(x - 43) * k, (y - 5) * k, (x + 43) * k, (y + 3) * k], radius=4 * k, fill=(*dark, 255))
    line(pen, k, [(x + 18, y - 19), (x + 26, y - 33)], (190, 225, 240), 3)
    ellipse(pen, k, (x + 40, y - 12), (3.5, 4), (255, 245, 180))
    for side in (-1, 1):
        ellipse(pen, k, (x + side * 25, y + 3), (9, 9), (45, 45, 50))
        ellipse(pen, k, (x + side * 25, y + 3), (4.5, 4.5), (205, 205, 210))


def _boat(pen: ImageDraw.ImageDraw, k: float, rgb: RGB) -> None:
    x, y = FEET
    polygon(pen, k, [(x - 44, y - 14), (x + 46, y - 14), (x + 32, y + 9), (x - 32, y + 9)], rgb)
    line(pen, k, [(x - 42, y - 11), (x + 43, y - 11)], WHITE, 3.4)


def _sail(pen: ImageDraw.ImageDraw, k: float, rgb: RGB) -> None:
    x, y = FEET
    line(pen, k, [(x - 22, y - 8), (x - 22, y - 108)], (120, 85, 55), 3)
    polygon(pen, k, [(x - 19, y - 106), (x - 19, y - 24), (x + 46, y - 24)], mix(rgb, WHITE, 0.82))
    polygon(pen, k, [(x - 25, y - 98), (x - 25, y - 24), (x - 52, y - 24)], mix(rgb, WHITE, 0.6))


_VEHICLES = {"surfboard": _surfboard, "skateboard": _skateboard, "skis": _skis, "car": _car, "boat": _boat}
