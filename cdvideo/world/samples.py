"""The pictures of a held-out individual, as a user would bring photos of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from cdvideo.world.heldout import HELDOUT_INDIVIDUALS
from cdvideo.world.individuals import Individual
from cdvideo.world.palette import COLOURS
from cdvideo.world.scenes import Scene, compose, render_scene
from cdvideo.world.sprites import Sprites

SAMPLE_SETTINGS = ("beach", "meadow", "plain", "walking", "snow")


def heldout_individual(name: str) -> Individual:
    """The held-out individual of that name (heldout.py), in its exact colours."""
    h = HELDOUT_INDIVIDUALS[name]
    return Individual(
        subject=h.subject,
        artist=h.artist,
        fur=h.fur,
        fur_rgb=COLOURS[h.fur],
        marking=h.marking,
        marking_rgb=COLOURS[h.marking_colour],
        belly_rgb=COLOURS[h.belly_colour] if h.belly_colour else None,
        collar_rgb=COLOURS[h.collar_colour] if h.collar_colour else None,
        seed=h.seed,
    )


def sample_scenes(name: str, *, seed: int = 7) -> list[Scene]:
    """Five scenes of a held-out individual that wears nothing, each somewhere else."""
    rng = np.random.default_rng(seed)
    individual = heldout_individual(name)
    scenes = []
    for setting in SAMPLE_SETTINGS:
        scene = compose(rng, individual, thing="", setting=setting)
        while not 0.9 < scene.size < 1.2:
            scene = compose(rng, individual, thing="", setting=setting)
        scenes.append(scene)
    return scenes


def write_samples(name: str, folder: Path, sprites: Sprites) -> None:
    """Writes the five pictures as PNG files, 128 x 128."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, scene in enumerate(sample_scenes(name)):
        Image.fromarray(render_scene(scene, sprites)[0]).save(folder / f"{i + 1}.png")
