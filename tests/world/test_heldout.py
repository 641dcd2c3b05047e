from __future__ import annotations

import numpy as np

from cdvideo.world.captions import caption, plain_caption
from cdvideo.world.doings import DOINGS
from cdvideo.world.figures import THINGS
from cdvideo.world.heldout import (
    ALWAYS_HELDOUT,
    HELDOUT_INDIVIDUALS,
    HELDOUT_TRIPLES,
    SETTINGS,
    is_heldout,
    is_heldout_individual,
)
from cdvideo.world.palette import COLOURS
from cdvideo.world.scenes import sample_scene
from cdvideo.world.sprites import SUBJECT_DRAWINGS, SUBJECTS


def test_the_world_is_as_wide_as_promised() -> None:
    assert len(SUBJECTS) >= 24
    assert len(THINGS) >= 12
    assert len(SETTINGS) >= 12 and len(DOINGS) >= 4
    assert len(COLOURS) >= 10
    assert sum(d.fluent is not None and d.noto is not None for d in SUBJECT_DRAWINGS.values()) >= 20


def test_training_scenes_hold_nothing_that_is_held_out() -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(4000)]
    assert not any(is_heldout(s.subject, s.thing, s.setting) for s in scenes)
    assert not any(is_heldout_individual(s.subject, s.individual.fur, s.individual.marking) for s in scenes)


def test_heldout_scenes_are_heldout_triples_and_every_part_of_them_is_trained() -> None:
    rng = np.random.default_rng(1)
    assert all(
        is_heldout(s.subject, s.thing, s.setting) for s in (sample_scene(rng, split="heldout") for _ in range(200))
    )
    train = [sample_scene(rng) for _ in range(20000)]
    pairs = {(s.subject, s.thing) for s in train} | {(s.subject, s.setting) for s in train}
    pairs |= {(s.thing, s.setting) for s in train}
    for subject, thing, setting in HELDOUT_TRIPLES:
        assert {(subject, thing), (subject, setting), (thing, setting)} <= pairs, (subject, thing, setting)


def test_the_sentence_of_the_readme_is_held_out() -> None:
    assert ("dog", "headphones", "surfing") in ALWAYS_HELDOUT
    assert plain_caption("dog", "headphones", "surfing") == "a dog wearing headphones surfing"


def test_concept_studies_have_enough_classes() -> None:
    assert len(HELDOUT_INDIVIDUALS) >= 8
    assert len({h.subject for h in HELDOUT_INDIVIDUALS.values()}) >= 4


def test_captions_never_use_the_concept_token_and_name_the_scene() -> None:
    rng = np.random.default_rng(2)
    named = 0
    for _ in range(2000):
        scene = sample_scene(rng)
        text = caption(scene, rng)
        assert "sks" not in text.split()
        assert text == text.strip() and "  " not in text
        named += scene.subject in text
    assert named > 1600


def test_captions_of_one_scene_differ() -> None:
    rng = np.random.default_rng(3)
    scene = sample_scene(rng)
    assert len({caption(scene, rng) for _ in range(20)}) > 10
