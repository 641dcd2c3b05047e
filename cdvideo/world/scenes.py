"""Scenes: somebody, wearing something, somewhere. A still is the clip's frame at its own moment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cdvideo.world.doings import DOINGS
from cdvideo.world.drawing import Point, place
from cdvideo.world.figures import COLOURED_THINGS, FEET, SIZE, THINGS, UNIT, draw_figure
from cdvideo.world.heldout import HELDOUT_TRIPLES, SETTINGS, is_heldout, is_heldout_individual
from cdvideo.world.individuals import Individual, sample_individual
from cdvideo.world.motions import move
from cdvideo.world.palette import COLOURS, RGB, shade
from cdvideo.world.places import PLACES
from cdvideo.world.sprites import ARTISTS, SUBJECT_DRAWINGS, SUBJECTS, Sprites
from cdvideo.world.stage import SIDE, Stage

FPS = 8  # frames of a clip per second of the world's time
VEHICLE_OF = {
    "surfing": "surfboard",
    "skateboarding": "skateboard",
    "skiing": "skis",
    "driving": "car",
    "sailing": "boat",
}


@dataclass(frozen=True)
class Scene:
    """Everything that a renderer and a caption need.

    thing "" means that nothing is worn. size: of the figure, about 1. at: its offset in pixels from the usual place.
    phase: where its own swing begins, in radians. start: the still's moment, in seconds.
    """

    individual: Individual
    thing: str
    thing_colour: str
    thing_rgb: RGB
    thing_artist: str
    setting: str
    backdrop_colour: str
    vehicle_rgb: RGB
    seed: int
    size: float
    at: Point
    flip: bool
    phase: float
    speed: float
    start: float

    @property
    def subject(self) -> str:
        return self.individual.subject


def sample_scene(rng: np.random.Generator, *, split: Literal["train", "heldout", "any"] = "train") -> Scene:
    """A random scene. `train` holds no held-out triple, `heldout` always does; none shows a held-out individual."""
    subject, thing, setting = _sample_triple(rng, split)
    drawing = SUBJECT_DRAWINGS[subject]
    artists = tuple(a for a in ARTISTS if getattr(drawing, a) is not None)
    individual = sample_individual(rng, subject, artists)
    while is_heldout_individual(subject, individual.fur, individual.marking):
        individual = sample_individual(rng, subject, artists)
    return compose(rng, individual, thing=thing, setting=setting)


def _sample_triple(rng: np.random.Generator, split: str) -> tuple[str, str, str]:
    if split == "heldout":
        return HELDOUT_TRIPLES[rng.integers(len(HELDOUT_TRIPLES))]
    while True:
        thing = "" if rng.random() < 0.22 else str(rng.choice(THINGS))
        triple = str(rng.choice(SUBJECTS)), thing, str(rng.choice(SETTINGS))
        if split == "any" or not is_heldout(*triple):
            return triple


def compose(rng: np.random.Generator, individual: Individual, *, thing: str, setting: str) -> Scene:
    """Puts an individual somewhere; everything else is drawn from `rng`."""
    thing_colour = str(rng.choice(list(COLOURS))) if thing in COLOURED_THINGS else ""
    large = rng.random()
    size = (
        rng.uniform(0.55, 0.72) if large < 0.07 else rng.uniform(1.25, 1.5) if large < 0.14 else rng.uniform(0.86, 1.14)
    )
    return Scene(
        individual=individual,
        thing=thing,
        thing_colour=thing_colour,
        thing_rgb=shade(rng, thing_colour or "grey"),
        thing_artist=str(rng.choice(ARTISTS)),
        setting=setting,
        backdrop_colour=str(rng.choice(list(COLOURS))),
        vehicle_rgb=shade(rng, str(rng.choice(list(COLOURS)))),
        seed=int(rng.integers(2**31)),
        size=float(size),
        at=(float(rng.uniform(-14, 14)), float(rng.uniform(-4, 4))),
        flip=bool(rng.random() < 0.5),
        phase=float(rng.uniform(0, 2 * math.pi)),
        speed=float(rng.uniform(0.8, 1.25)),
        start=float(rng.uniform(0, 4)),
    )


def render_frame(scene: Scene, sprites: Sprites, time: float) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The scene at a moment: pixels (128, 128, 3) and the figure's mask (128, 128), 0 to 255."""
    stage = Stage(sprites, scene.seed, time, scene.speed, scene.backdrop_colour)
    back, front = (DOINGS | PLACES)[scene.setting](stage)
    motion = move(scene.setting, 2 * math.pi * time * scene.speed + scene.phase)
    figure = draw_figure(
        scene.individual, sprites, thing=scene.thing, thing_rgb=scene.thing_rgb, thing_artist=scene.thing_artist,
        vehicle=VEHICLE_OF.get(scene.setting, ""), vehicle_rgb=scene.vehicle_rgb, pose=motion.pose,
    )  # fmt: skip
    layer = Image.new("RGBA", (SIDE, SIDE))
    # The figure's picture is placed by its middle; its feet should stand at about y = 110 and turn with it.
    angle = motion.angle if not scene.flip else -motion.angle
    scale = scene.size / UNIT
    up = (FEET[1] - SIZE[1] / 2) * scene.size
    ground = 109 + 4 * (scene.size - 1) + scene.at[1] + motion.offset[1]
    x = SIDE / 2 + scene.at[0] + (-motion.offset[0] if scene.flip else motion.offset[0])
    middle = x + up * math.sin(math.radians(angle)), ground - up * math.cos(math.radians(angle))
    place(layer, figure, middle, scale=scale, angle=angle, flip=scene.flip)
    back.alpha_composite(layer)
    if front is not None:
        back.alpha_composite(front)
    return np.array(back.convert("RGB")), np.array(layer.getchannel("A"))


def render_scene(scene: Scene, sprites: Sprites) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The still: pixels (128, 128, 3) and the figure's mask (128, 128), 0 to 255."""
    return render_frame(scene, sprites, scene.start)


def render_clip(scene: Scene, sprites: Sprites, *, num_frames: int = 16) -> NDArray[np.uint8]:
    """Frames (F, 128, 128, 3) at FPS; the first is the still."""
    return np.stack([render_frame(scene, sprites, scene.start + f / FPS)[0] for f in range(num_frames)])


__all__ = [
    "FPS",
    "SETTINGS",
    "SUBJECTS",
    "THINGS",
    "Scene",
    "compose",
    "render_clip",
    "render_frame",
    "render_scene",
    "sample_scene",
]
