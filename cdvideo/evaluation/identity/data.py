"""Pictures to train identity on: individuals in pairs of look-alikes, each seen in several scenes.

A look-alike is of the same class and drawing and differs in its fur or its marking alone. None of those trained on has
the fur and the marking of an individual that is held out for concepts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cdvideo.evaluation.identity.config import IdentityConfig
from cdvideo.world.dataset import Item, Split, read_labels, render_split
from cdvideo.world.heldout import HELDOUT_INDIVIDUALS, is_heldout_individual
from cdvideo.world.individuals import MARKINGS, Individual, paint_face, sample_individual
from cdvideo.world.palette import COLOURS, random_shade, shade
from cdvideo.world.samples import heldout_individual
from cdvideo.world.scenes import SETTINGS, SUBJECTS, THINGS, compose, render_scene
from cdvideo.world.sprites import Sprites, load_sprites

NOTHING_WORN = 0.3  # of the views
MIN_CHANGE = 0.03  # mean change of a look-alike's face, of 1: less is not seen at 128 pixels
PROPORTIONS = 0.05  # by which width and height vary from view to view: drawn figures are never exact

_loaded: dict[Path, Sprites] = {}


@dataclass(frozen=True)
class IdentityWorld:
    """Items are pairs of look-alikes: the first half of the frames shows one individual, the second half the other.

    Pickles, for the processes that render.
    """

    sprites: Path

    def item(self, rng: np.random.Generator, split: Split, *, frames: int, captions: int) -> Item:
        assert split == "clips" and frames % 2 == 0, "a pair's views are stored as a clip of both"
        if self.sprites not in _loaded:  # once per process
            _loaded[self.sprites] = load_sprites(self.sprites)
        sprites = _loaded[self.sprites]
        individual = sample_member(rng, str(rng.choice(SUBJECTS)), sprites)
        frames_FHWC = render_pair(rng, individual, sprites, views=frames // 2)
        return Item(frames_FHWC, np.zeros(frames_FHWC.shape[1:3], dtype=np.uint8), [], {"subject": individual.subject})


def sample_member(rng: np.random.Generator, subject: str, sprites: Sprites) -> Individual:
    """A random member of the class, none of those held out."""
    while True:
        individual = sample_individual(rng, subject, sprites.artists(subject))
        if not is_heldout_individual(subject, individual.fur, individual.marking):
            return individual


def look_alike(rng: np.random.Generator, individual: Individual, sprites: Sprites) -> Individual:
    """The individual with another fur, or with another marking or marking's colour; the change can be seen."""
    face = _opaque_face(individual, sprites)
    while True:
        if rng.random() < 0.4:
            fur = str(rng.choice(list(COLOURS)))
            other = replace(individual, fur=fur, fur_rgb=shade(rng, fur))
        else:
            other = replace(individual, marking=str(rng.choice(MARKINGS)), marking_rgb=random_shade(rng))
        seen = bool(np.abs(_opaque_face(other, sprites) - face).mean() >= MIN_CHANGE)
        if seen and not is_heldout_individual(other.subject, other.fur, other.marking):
            return other


def _opaque_face(individual: Individual, sprites: Sprites) -> NDArray[np.floating]:
    """Colours in [0, 1] of the face's opaque pixels, (N, 3)."""
    face_HWC = np.asarray(paint_face(individual, sprites)[0])
    return face_HWC[face_HWC[..., 3] > 128][:, :3].astype(np.float32) / 255


def render_pair(rng: np.random.Generator, individual: Individual, sprites: Sprites, *, views: int) -> NDArray[np.uint8]:
    """Views of the individual, then as many of a look-alike: (2 * views, 128, 128, 3)."""
    pair = individual, look_alike(rng, individual, sprites)
    return np.stack([render_view(rng, member, sprites) for member in pair for _ in range(views)])


def render_view(rng: np.random.Generator, individual: Individual, sprites: Sprites) -> NDArray[np.uint8]:
    """The individual somewhere, wearing anything or nothing: (128, 128, 3)."""
    width, height = rng.uniform(1 - PROPORTIONS, 1 + PROPORTIONS, 2)
    member = replace(individual, width=individual.width * float(width), height=individual.height * float(height))
    thing = "" if rng.random() < NOTHING_WORN else str(rng.choice(THINGS))
    scene = compose(rng, member, thing=thing, setting=str(rng.choice(SETTINGS)))
    return render_scene(scene, sprites)[0]


def render(config: IdentityConfig, sprites: Path) -> None:
    """Renders the pairs to train on and to check on, and those held out, where they are not there yet."""
    for i, (name, count) in enumerate((("train", config.pairs), ("check", config.check_pairs))):
        render_split(
            IdentityWorld(sprites),
            config.cache / name,
            "clips",
            count,
            size=128,
            frames=2 * config.views,
            captions=0,
            seed=config.seed + i,
            workers=config.workers,
        )


def render_heldout(sprites: Sprites, *, views: int, seed: int) -> tuple[NDArray[np.uint8], list[str]]:
    """images_NVHWC of the ten individuals held out for concepts, each followed by a look-alike; subjects."""
    rng = np.random.default_rng([seed, 9])
    members = [heldout_individual(name) for name in HELDOUT_INDIVIDUALS]
    pairs = [render_pair(rng, member, sprites, views=views) for member in members]
    return unpair(np.stack(pairs)), [member.subject for member in members for _ in range(2)]


def load_views(folder: Path) -> tuple[NDArray[np.uint8], list[str]]:
    """images_NVHWC, memory-mapped, and the subject of each of the N individuals; look-alikes are neighbours."""
    images = np.load(folder / "pixels.npy", mmap_mode="r")
    return unpair(images), [str(line["subject"]) for line in read_labels(folder) for _ in range(2)]


def unpair(images_PFHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pairs' frames to individuals' views: (P, 2 V, H, W, 3) to (2 P, V, H, W, 3), a view of the same memory."""
    pairs, frames, *picture = images_PFHWC.shape
    return images_PFHWC.reshape(2 * pairs, frames // 2, *picture)
