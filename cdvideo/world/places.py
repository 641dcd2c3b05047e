"""The backdrops of places: what lies behind the figure, and what before it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cdvideo.world.drawing import ellipse, glass, gradient, line, place, smooth
from cdvideo.world.palette import mix, shade
from cdvideo.world.stage import SIDE, WHITE, Backdrop, Stage, clouds, draw_smooth, empty, hill, sky, stand, wrap


def snow(stage: Stage) -> tuple[Image.Image, Image.Image]:
    """Winter: snow falls behind and before."""
    rng = stage.rng()
    back, front = gradient(SIDE, (150, 170, 200), (215, 225, 238)), empty()
    draw_smooth(back, lambda pen, k: hill(pen, k, 84, (4, 110), (228, 236, 245), rng.uniform(0, 99)))
    for _ in range(3):
        stand(back, stage.picture(rng, "pine"), rng.uniform(2, 126), 92, rng.uniform(32, 52))
    draw_smooth(back, lambda pen, k: hill(pen, k, 92, (2.5, 80), (246, 249, 253), 40))
    for canvas, count, radius, speed in ((back, 34, 1.1, 26), (front, 16, 1.9, 40)):
        draw_smooth(canvas, _flakes(stage, rng.uniform((0, 0, 0.6), (SIDE, SIDE, 1.2), (count, 3)), radius, speed))
    return back, front


def _flakes(
    stage: Stage, flakes: NDArray[np.float64], radius: float, speed: float
) -> Callable[[ImageDraw.ImageDraw, float], None]:
    """Snow at the stage's moment; `flakes` holds x, y and relative size of each."""

    def paint(pen: ImageDraw.ImageDraw, k: float) -> None:
        for x, y, size in flakes:
            drift = 4 * math.sin(stage.time * 1.7 + y)
            fallen = stage.time * stage.speed * speed * size
            ellipse(pen, k, ((x + drift) % SIDE, (y + fallen) % SIDE), (radius * size, radius * size), WHITE)

    return paint


def rain(stage: Stage) -> tuple[Image.Image, Image.Image]:
    """A grey day: streaks of rain and rings on the ground."""
    rng = stage.rng()
    back, front = gradient(SIDE, (70, 82, 105), (130, 142, 160)), empty()
    clouds(stage, back, rng, 5, 6, (2, 22), (36, 60))
    ground = (82, 96, 100)
    draw_smooth(back, lambda pen, k: pen.rectangle([0, 94 * k, SIDE * k, SIDE * k], fill=(*ground, 255)))
    ripples = rng.uniform((5, 98, 0), (123, 124, 1), (6, 3))
    drops = rng.uniform((0, 0, 0.8), (SIDE, SIDE, 1.3), (46, 3))

    def puddles(pen: ImageDraw.ImageDraw, k: float) -> None:
        for x, y, phase in ripples:
            grow = (phase + stage.time * stage.speed * 1.1) % 1.0
            box = [(x - 9 * grow - 2) * k, (y - 3 * grow - 0.7) * k, (x + 9 * grow + 2) * k, (y + 3 * grow + 0.7) * k]
            pen.ellipse(box, outline=(165, 180, 195, 255), width=round(k))

    def streaks(pen: ImageDraw.ImageDraw, k: float) -> None:
        fall = stage.time * stage.speed * 130
        for x, y, s in drops:
            top = (y + fall * s) % (SIDE + 12) - 12
            line(pen, k, [(x, top), (x - 1.6, top + 9 * s)], (188, 205, 228), 1.0)

    draw_smooth(back, puddles)
    draw_smooth(front, streaks)
    return back, front


def space(stage: Stage) -> tuple[Image.Image, None]:
    """Drifting stars and planets."""
    rng = stage.rng()
    back = gradient(SIDE, (12, 10, 35), mix((45, 25, 85), (15, 35, 80), rng.random()))
    stars = rng.uniform((0, 0, 0.5), (SIDE, SIDE, 1.3), (60, 3))

    def paint(pen: ImageDraw.ImageDraw, k: float) -> None:
        for x, y, s in stars:
            glow = 0.7 + 0.3 * math.sin(stage.time * 4 + x)
            ellipse(pen, k, ((x - 9 * s * stage.speed * stage.time) % SIDE, y), (s * glow, s * glow), (255, 250, 225))

    draw_smooth(back, paint)
    for name in rng.choice(["saturn", "earth", "moon", "star"], 2, replace=False):
        picture, size = stage.picture(rng, str(name)), rng.uniform(18, 40)
        x = wrap(rng.uniform(0, SIDE) - 7 * stage.speed * stage.time)
        place(back, picture, (x, rng.uniform(12, 112)), scale=size / picture.width, angle=4 * stage.time)
    return back, None


def beach(stage: Stage) -> tuple[Image.Image, None]:
    """Sand, palm and a sea that laps."""
    rng = stage.rng()
    back = sky(rng)
    sun = stage.picture(rng, "sun")
    place(back, sun, (rng.uniform(14, 114), rng.uniform(10, 22)), scale=18 / sun.width)
    clouds(stage, back, rng, 2, 4, (10, 34), (18, 32))
    sea = mix((45, 150, 205), (50, 180, 195), rng.random())
    lap = 3 * math.sin(stage.time * stage.speed * 2.2)

    def paint(pen: ImageDraw.ImageDraw, k: float) -> None:
        pen.rectangle([0, 58 * k, SIDE * k, 90 * k], fill=(*sea, 255))
        for i in range(4):
            x = wrap(i * 45 + 10 * stage.speed * stage.time, 20)
            line(pen, k, [(x, 65 + 5 * (i % 2)), (x + 15, 65 + 5 * (i % 2))], mix(sea, WHITE, 0.5), 1.3)
        hill(pen, k, 80 + lap, (1.8, 60), WHITE, 8 * stage.time)
        hill(pen, k, 83 + lap, (1.8, 60), (240, 214, 160), 8 * stage.time)

    draw_smooth(back, paint)
    side = bool(rng.random() < 0.5)
    stand(back, stage.picture(rng, "palm"), 14 if side else 114, 100, rng.uniform(62, 80), flip=side)
    if rng.random() < 0.6:
        stand(back, stage.picture(rng, "parasol"), 106 if side else 22, 106, 36)
    return back, None


def forest(stage: Stage) -> tuple[Image.Image, Image.Image]:
    """Trees in two rows, falling leaves."""
    rng = stage.rng()
    back, front = gradient(SIDE, (70, 125, 85), (150, 195, 120)), empty()
    for foot, height, count in ((84, 60, 5), (96, 76, 4)):
        for i in range(count):
            x = (i + rng.uniform(0.1, 0.9)) * SIDE / count
            stand(
                back, stage.picture(rng, str(rng.choice(["tree", "pine"]))), x, foot, height * rng.uniform(0.85, 1.15)
            )
        if foot == 84:
            draw_smooth(back, lambda pen, k: pen.rectangle([0, 84 * k, SIDE * k, SIDE * k], fill=(62, 105, 58, 255)))
    draw_smooth(back, lambda pen, k: hill(pen, k, 97, (1.5, 50), (52, 92, 52)))
    for _ in range(2):
        stand(back, stage.picture(rng, "mushroom"), rng.uniform(6, 122), rng.uniform(104, 122), rng.uniform(12, 18))
    leaves = rng.uniform((0, 0, 0.6), (SIDE, SIDE, 1.4), (9, 3))

    def paint(pen: ImageDraw.ImageDraw, k: float) -> None:
        for x, y, s in leaves:
            sway = 7 * math.sin(stage.time * 2.4 * s + y)
            ellipse(
                pen, k, ((x + sway) % SIDE, (y + 20 * s * stage.speed * stage.time) % SIDE), (2.3, 1.3), (215, 150, 50)
            )

    draw_smooth(front, paint)
    return back, front


def desert(stage: Stage) -> tuple[Image.Image, None]:
    """Dunes, cactuses and blown dust."""
    rng = stage.rng()
    back = gradient(SIDE, (120, 190, 235), (252, 228, 180))
    sun = stage.picture(rng, "sun")
    place(back, sun, (rng.uniform(16, 112), 16), scale=22 / sun.width, angle=10 * stage.time)
    sand = mix((235, 180, 100), (222, 150, 85), rng.random())
    draw_smooth(back, lambda pen, k: hill(pen, k, 78, (7, 105), mix(sand, WHITE, 0.22), rng.uniform(0, 100)))
    draw_smooth(back, lambda pen, k: hill(pen, k, 90, (5, 84), sand, 30))
    for _ in range(int(rng.integers(2, 4))):
        side = rng.uniform(4, 38) if rng.random() < 0.5 else rng.uniform(90, 124)
        stand(back, stage.picture(rng, "cactus"), side, rng.uniform(92, 106), rng.uniform(26, 44))
    dust = rng.uniform((0, 88, 0.5), (SIDE, 124, 1.3), (10, 3))

    def paint(pen: ImageDraw.ImageDraw, k: float) -> None:
        for x, y, s in dust:
            start = wrap(x + 46 * s * stage.speed * stage.time, 15)
            line(pen, k, [(start, y), (start + 10 * s, y)], mix(sand, WHITE, 0.4), 1.0)

    draw_smooth(back, paint)
    return back, None


def city(stage: Stage) -> tuple[Image.Image, None]:
    """Night: lit windows that change, and cars."""
    rng = stage.rng()
    back = gradient(SIDE, (18, 22, 58), (70, 60, 115))
    crescent = stage.picture(rng, "crescent")
    place(back, crescent, (rng.uniform(14, 114), 16), scale=20 / crescent.width)
    blocks = [(x, rng.uniform(18, 26), rng.uniform(30, 66)) for x in range(-6, 132, 21)]
    lights = rng.random((len(blocks), 7, 3))

    def paint(pen: ImageDraw.ImageDraw, k: float) -> None:
        for i, (x, width, height) in enumerate(blocks):
            tone = mix((34, 38, 70), (60, 52, 98), (i * 0.37) % 1)
            pen.rectangle([x * k, (98 - height) * k, (x + width) * k, 98 * k], fill=(*tone, 255))
            for row in range(int(height // 9)):
                for col in range(3):
                    on = math.sin(lights[i, row, col] * 40 + stage.time * stage.speed * 3 * lights[i, row, col]) > -0.2
                    wx, wy = x + 3 + col * 6, 98 - height + 4 + row * 9
                    pen.rectangle(
                        [wx * k, wy * k, (wx + 3.4) * k, (wy + 4.2) * k],
                        fill=(255, 214, 110, 255) if on else (*mix(tone, (0, 0, 0), 0.3), 255),
                    )
        pen.rectangle([0, 98 * k, SIDE * k, SIDE * k], fill=(52, 52, 68, 255))
        for i in range(3):
            car = wrap(i * 63 + 75 * stage.speed * stage.time, 15)
            line(pen, k, [(car, 103), (car + 12, 103)], (255, 240, 190), 1.6)

    draw_smooth(back, paint)
    return back, None


def underwater(stage: Stage) -> tuple[Image.Image, Image.Image]:
    """Rays of light, corals, fish and rising bubbles."""
    rng = stage.rng()
    back, front = gradient(SIDE, (60, 170, 215), (10, 55, 120)), empty()
    rays = empty()

    def shine(pen: ImageDraw.ImageDraw, k: float) -> None:
        for i in range(4):
            x = 12 + 34 * i + 6 * math.sin(stage.time * 1.3 + i)
            pen.polygon(
                [(x * k, 0), ((x + 10) * k, 0), ((x - 12) * k, SIDE * k), ((x - 34) * k, SIDE * k)],
                fill=glass(WHITE, 26),
            )

    rays.alpha_composite(smooth(rays.size, shine))
    back.alpha_composite(rays)
    draw_smooth(back, lambda pen, k: hill(pen, k, 112, (3, 70), (205, 185, 135), 20))
    for x in (rng.uniform(0, 34), rng.uniform(94, 128)):
        stand(back, stage.picture(rng, "coral"), x, 120, rng.uniform(26, 42))
    for _ in range(3):
        fish = stage.picture(rng, str(rng.choice(["fish", "tropical fish"])))
        x, y, size, right = rng.uniform(0, 128), rng.uniform(14, 100), rng.uniform(14, 22), bool(rng.random() < 0.5)
        x = wrap(x + (26 if right else -26) * stage.speed * stage.time, 20)
        place(back, fish, (x, y + 2 * math.sin(3 * stage.time + y)), scale=size / fish.width, flip=right)
    bubbles = rng.uniform((4, 0, 0.7), (124, SIDE, 2.8), (13, 3))

    def paint(pen: ImageDraw.ImageDraw, k: float) -> None:
        for x, y, r in bubbles:
            top = (y - (14 + 9 * r) * stage.speed * stage.time) % (SIDE + 8) - 4
            middle = x + 2 * math.sin(stage.time * 3 + y)
            ellipse(pen, k, (middle, top), (r, r), (205, 238, 250))
            ellipse(pen, k, (middle + r * 0.2, top + r * 0.2), (r * 0.6, r * 0.6), (120, 195, 225))

    draw_smooth(front, paint)
    return back, front


def meadow(stage: Stage) -> tuple[Image.Image, None]:
    """Grass with swaying flowers."""
    rng = stage.rng()
    back = sky(rng)
    clouds(stage, back, rng, 3, 5, (8, 34), (20, 34))
    green = mix((125, 200, 85), (95, 180, 75), rng.random())
    draw_smooth(back, lambda pen, k: hill(pen, k, 76, (5, 120), mix(green, WHITE, 0.2), rng.uniform(0, 100)))
    draw_smooth(back, lambda pen, k: hill(pen, k, 88, (2, 90), green, 55))
    for i in range(9):
        picture = stage.picture(rng, str(rng.choice(["daisy", "tulip"])))
        x, foot, size = (i + rng.uniform(0, 1)) * SIDE / 9, rng.uniform(94, 126), rng.uniform(14, 21)
        lean = 8 * math.sin(2.6 * stage.time * stage.speed + x * 0.15)
        place(back, picture, (x + lean * 0.12, foot - size / 2), scale=size / picture.height, angle=lean)
    return back, None


def plain(stage: Stage) -> tuple[Image.Image, None]:
    """One colour."""
    rng = stage.rng()
    rgb = shade(rng, stage.colour)
    return gradient(SIDE, mix(rgb, WHITE, rng.uniform(0, 0.18)), mix(rgb, (0, 0, 0), rng.uniform(0, 0.12))), None


PLACES: dict[str, Backdrop] = {
    f.__name__: f for f in (snow, rain, space, beach, forest, desert, city, underwater, meadow, plain)
}
