"""The judge's own view of the world: its own seed, all triples, individuals kept from the base, wider proportions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cdvideo.evaluation.config import JudgeConfig
from cdvideo.world.dataset import Item, Split, render_split
from cdvideo.world.heldout import HELDOUT_INDIVIDUALS
from cdvideo.world.samples import heldout_individual
from cdvideo.world.scenes import Scene, compose, render_scene, sample_scene
from cdvideo.world.sprites import Sprites, load_sprites

HELDOUT_SHARE = 0.05  # of the training stills: individuals that only concepts show

_loaded: dict[Path, Sprites] = {}


@dataclass(frozen=True)
class JudgeWorld:
    """Scenes to train the judge on ("train": wider than the world), and to check it on ("heldout": the world as it is).

    Pickles, for the processes that render.
    """

    sprites: Path

    def item(self, rng: np.random.Generator, split: Split, *, frames: int, captions: int) -> Item:
        assert split != "clips" and frames == 1, "the judge sees stills"
        if self.sprites not in _loaded:  # once per process
            _loaded[self.sprites] = load_sprites(self.sprites)
        scene = sample_scene(rng, split="any")
        if split == "train":
            scene = widen(rng, scene)
        pixels_HWC, mask_HW = render_scene(scene, _loaded[self.sprites])
        labels = {"subject": scene.subject, "thing": scene.thing, "setting": scene.setting}
        return Item(pixels_HWC[None], mask_HW, [], labels)


def widen(rng: np.random.Generator, scene: Scene) -> Scene:
    """The scene with other proportions, or with an individual that the base never sees."""
    if rng.random() < HELDOUT_SHARE:
        individual = heldout_individual(str(rng.choice(list(HELDOUT_INDIVIDUALS))))
        return compose(rng, individual, thing=scene.thing, setting=scene.setting)
    width, height = rng.uniform(0.88, 1.14, 2)
    return replace(scene, individual=replace(scene.individual, width=float(width), height=float(height)))


def render(config: JudgeConfig, sprites: Path) -> None:
    """Renders the stills to train and to check on into config.cache, where they are not there yet."""
    counts: dict[Split, int] = {"train": config.scenes, "heldout": config.check_scenes}
    for split, count in counts.items():
        render_split(
            JudgeWorld(sprites),
            config.cache / split,
            split,
            count,
            size=128,
            frames=1,
            captions=0,
            seed=config.seed,
            workers=config.workers,
        )
