"""The backdrops of doings, each moving in a way of its own: what lies behind the figure, and what before it."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from cdvideo.world.drawing import ellipse, glass, gradient, place, polygon, smooth
from cdvideo.world.palette import RGB, mix, shade
from cdvideo.world.stage import SIDE, WHITE, Backdrop, Stage, clouds, draw_smooth, empty, hill, sea, sky, stand, wrap


def surfing(stage: Stage) -> tuple[Image.Image, Image.Image]:
    """A sea with a curling wave behind and a crest before the board."""
    rng = stage.rng()
    back, front = sky(rng), empty()
    sun = stage.picture(rng, "sun")
    place(back, sun, (rng.uniform(12, 116), rng.uniform(10, 24)), scale=rng.uniform(16, 24) / sun.width)
    clouds(stage, back, rng, int(rng.integers(1, 4)), 5, (8, 36), (18, 36))
    blue = mix((25, 110, 200), (20, 165, 190), rng.random())
    horizon = rng.uniform(52, 62)
    sea(stage, back, horizon, blue, 4, 2.2)
    wave, side = stage.picture(rng, "wave"), bool(rng.random() < 0.5)
    height = rng.uniform(46, 64)
    x = (rng.uniform(100, 122) if side else rng.uniform(6, 28)) + 5 * math.sin(2.2 * stage.time * stage.speed)
    stand(back, wave, x, 108 + 2 * math.sin(2 * stage.time), height, flip=side)
    shift = stage.time * stage.speed * 52

    def paint(pen: ImageDraw.ImageDraw, k: float) -> None:
        hill(pen, k, 114, (3.0, 46), mix(blue, WHITE, 0.75), shift)
        hill(pen, k, 116.5, (3.0, 46), mix(blue, (10, 20, 80), 0.1), shift)

    draw_smooth(front, paint)
    return back, front


def sailing(stage: Stage) -> tuple[Image.Image, Image.Image]:
    """A calm sea, now and then with an island."""
    rng = stage.rng()
    back, front = sky(rng), empty()
    clouds(stage, back, rng, int(rng.integers(2, 5)), 4, (8, 45), (20, 40))
    blue = mix((40, 95, 175), (45, 135, 190), rng.random())
    horizon = rng.uniform(70, 80)
    if rng.random() < 0.5:
        x = rng.uniform(-10, 138) - 3 * stage.speed * stage.time
        draw_smooth(back, lambda pen, k: ellipse(pen, k, (x, horizon), (24, 9), (95, 150, 85)))
        stand(back, stage.picture(rng, "palm"), x, horizon - 6, 26)
    sea(stage, back, horizon, blue, 3, 1.2)
    shift = stage.time * stage.speed * 24

    def paint(pen: ImageDraw.ImageDraw, k: float) -> None:
        hill(pen, k, 109, (1.8, 40), mix(blue, WHITE, 0.5), shift)
        hill(pen, k, 110.8, (1.8, 40), blue, shift)

    draw_smooth(front, paint)
    return back, front


def _street(stage: Stage, rng: np.random.Generator, names: tuple[str, ...], ground: RGB, pace: float) -> Image.Image:
    """Sky, a row of scenery passing by, and ground with passing marks."""
    back = sky(rng)
    clouds(stage, back, rng, 2, 6, (6, 28), (20, 32))
    passed = pace * stage.speed * stage.time
    foot = 88.0
    for i in range(5):
        x = wrap(i * 46 + rng.uniform(-8, 8) - passed * 0.6, 51)
        stand(back, stage.picture(rng, str(rng.choice(names))), x, foot + 1, rng.uniform(34, 56))

    def paint(pen: ImageDraw.ImageDraw, k: float) -> None:
        pen.rectangle([0, foot * k, SIDE * k, SIDE * k], fill=(*ground, 255))
        pen.rectangle([0, foot * k, SIDE * k, (foot + 3) * k], fill=(*mix(ground, WHITE, 0.3), 255))
        for i in range(6):
            x = wrap(i * 31.4 - passed)
            polygon(pen, k, [(x, 106), (x + 14, 106), (x + 11, 109), (x - 3, 109)], mix(ground, WHITE, 0.6))

    draw_smooth(back, paint)
    return back


def skateboarding(stage: Stage) -> tuple[Image.Image, None]:
    """A street of houses passing by."""
    rng = stage.rng()
    grey = int(rng.integers(105, 150))
    return _street(stage, rng, ("building", "house", "building"), (grey, grey, grey + 8), 62), None


def driving(stage: Stage) -> tuple[Image.Image, None]:
    """A country road passing by, fast."""
    rng = stage.rng()
    back = _street(stage, rng, ("tree", "mountain", "pine"), (88, 88, 96), 85)
    return back, None


def walking(stage: Stage) -> tuple[Image.Image, None]:
    """A path in a park passing by, slowly."""
    rng = stage.rng()
    back = sky(rng)
    clouds(stage, back, rng, 2, 3, (6, 28), (20, 32))
    passed = 20 * stage.speed * stage.time
    green = mix((110, 190, 80), (70, 160, 80), rng.random())
    draw_smooth(back, lambda pen, k: hill(pen, k, 80, (4, 90), mix(green, WHITE, 0.25), passed * 0.3))
    for i in range(4):
        x = wrap(i * 52 + rng.uniform(-10, 10) - passed * 0.7, 40)
        stand(back, stage.picture(rng, "tree"), x, 92, rng.uniform(38, 56))

    def paint(pen: ImageDraw.ImageDraw, k: float) -> None:
        pen.rectangle([0, 90 * k, SIDE * k, SIDE * k], fill=(*green, 255))
        pen.rectangle([0, 99 * k, SIDE * k, 116 * k], fill=(222, 196, 150, 255))
        for i in range(8):
            ellipse(pen, k, (wrap(i * 24 - passed), 104 + 8 * (i % 2)), (2.2, 1.2), (190, 162, 118))

    draw_smooth(back, paint)
    return back, None


def flying(stage: Stage) -> tuple[Image.Image, Image.Image]:
    """The sky: clouds pass behind and before."""
    rng = stage.rng()
    back, front = gradient(SIDE, (70, 150, 235), (190, 228, 252)), empty()
    if rng.random() < 0.4:
        rainbow = stage.picture(rng, "rainbow")
        place(back, rainbow, (rng.uniform(10, 118), rng.uniform(30, 90)), scale=0.4, flip=bool(rng.random() < 0.5))
    clouds(stage, back, rng, 4, 30, (8, 120), (20, 38))
    clouds(stage, front, rng, 2, 75, (98, 126), (36, 56))
    return back, front


def skiing(stage: Stage) -> tuple[Image.Image, Image.Image]:
    """A white slope, pines passing by, snow thrown up."""
    rng = stage.rng()
    back, front = sky(rng), empty()
    for _ in range(2):
        stand(back, stage.picture(rng, "mountain"), rng.uniform(0, 128), 84, rng.uniform(48, 66))
    slope = 0.26

    def paint(pen: ImageDraw.ImageDraw, k: float) -> None:
        polygon(pen, k, [(0, 74), (SIDE, 74 + slope * SIDE), (SIDE, SIDE), (0, SIDE)], (240, 246, 252))
        polygon(pen, k, [(0, 96), (SIDE, 96 + slope * SIDE), (SIDE, SIDE), (0, SIDE)], (222, 234, 246))

    draw_smooth(back, paint)
    passed = 60 * stage.speed * stage.time
    for i in range(4):
        x = wrap(i * 47 + rng.uniform(-9, 9) - passed, 30)
        stand(back, stage.picture(rng, "pine"), x, 80 + slope * x, rng.uniform(28, 44))

    def spray(pen: ImageDraw.ImageDraw, k: float) -> None:
        for _ in range(14):
            life = (rng.random() + stage.time * stage.speed * 1.6) % 1.0
            x, y = 46 - life * 40 + rng.uniform(-3, 3), 108 - 16 * math.sin(life * 3.1) * rng.uniform(0.4, 1) - life * 8
            ellipse(pen, k, (x, y), (2.2 * (1 - life) + 0.6,) * 2, WHITE)

    draw_smooth(front, spray)
    return back, front


def dancing(stage: Stage) -> tuple[Image.Image, None]:
    """A disco: swinging lights and a floor that changes with the beat."""
    rng = stage.rng()
    base = mix((60, 20, 90), (25, 25, 80), rng.random())
    back = gradient(SIDE, mix(base, (0, 0, 0), 0.35), base)
    hues = [
        shade(rng, str(c)) for c in rng.choice(["red", "yellow", "green", "blue", "pink", "teal"], 4, replace=False)
    ]
    beams = empty()

    def light(pen: ImageDraw.ImageDraw, k: float) -> None:
        for i, rgb in enumerate(hues):
            swing = 40 * math.sin(stage.time * stage.speed * 2.4 + i * 1.7)
            foot = 16 + i * 32 + swing
            pen.polygon(
                [(64 * k, 10 * k), ((foot - 13) * k, 100 * k), ((foot + 13) * k, 100 * k)], fill=glass(rgb, 105)
            )

    beams.alpha_composite(smooth(beams.size, light))
    back.alpha_composite(beams)
    ball = stage.picture(rng, "disco ball")
    place(back, ball, (64, 14), scale=26 / ball.width)
    beat = int(stage.time * stage.speed * 3)

    def floor(pen: ImageDraw.ImageDraw, k: float) -> None:
        for row in range(3):
            y0, y1 = 96 + row * 11, 107 + row * 11
            for col in range(-1, 9):
                rgb = hues[(row + col + beat) % 4]
                skew = (col - 3.5) * 3
                x0, x1 = col * 18 - 8 + skew * row, col * 18 - 8 + skew * (row + 1)
                polygon(
                    pen,
                    k,
                    [(x0, y0), (x0 + 18 + 3 * row, y0), (x1 + 18 + 3 * (row + 1), y1), (x1, y1)],
                    mix(rgb, base, 0.45),
                )

    draw_smooth(back, floor)
    return back, None


DOINGS: dict[str, Backdrop] = {
    f.__name__: f for f in (surfing, skateboarding, flying, skiing, dancing, driving, sailing, walking)
}
