"""Concepts in the UNet's weights, at parts of their strength."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.concept.adapters import parameter_changes
from cdvideo.concept.concept import Concept
from cdvideo.errors import UserError
from cdvideo.motion.modules import MotionModules
from cdvideo.sampling.folded import Folded, folded_concept
from cdvideo.sampling.options import Control, FilmSettings
from cdvideo.sampling.prompt_track import class_in_place
from cdvideo.sampling.speed import EXACT, PLAIN
from cdvideo.sampling.video import Film, sample_latents
from tests.interchange.parts import ADAPTERS, learned


@pytest.fixture
def lora(tiny_base: Base) -> Concept:
    return learned(tiny_base, ADAPTERS["lora"])


def film(base: Base, motion: MotionModules, concept: Concept, strength: str, **options: Any) -> Tensor:
    """latents_FCHW"""
    control = Control(concept_strength=strength)
    asked = Film(prompt="a sks dog surfing", seed=3, concept=concept, control=control)
    return next(iter(sample_latents(base, motion, [asked], FilmSettings(frames=3, steps=4, **options))))


def test_a_part_of_the_change_is_in_the_weights(tiny_base: Base, lora: Concept) -> None:
    before = {name: parameter.detach().clone() for name, parameter in tiny_base.unet.named_parameters()}
    changes = parameter_changes(tiny_base.unet, lora)
    folded = Folded(lora, Control(concept_strength="0%: 0 | 50%: 1", concept_frames="0.8", concept_up=0.5))
    assert folded.varies and {name.split("_")[0] for name in changes} >= {"down", "mid", "up"}
    with folded.acting(tiny_base.unet, done=0.25):
        for name, parameter in tiny_base.unet.named_parameters():
            strength = 0.5 * 0.8 * (0.5 if name.startswith("up_") else 1)
            wanted = before[name] + strength * changes.get(name, torch.zeros(()))
            torch.testing.assert_close(parameter, wanted, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(before[name], parameter) for name, parameter in tiny_base.unet.named_parameters())


def test_films_with_a_strength_over_the_denoising(tiny_base: Base, tiny_motion: MotionModules, lora: Concept) -> None:
    whole, none = film(tiny_base, tiny_motion, lora, "1"), film(tiny_base, tiny_motion, lora, "0%: 0 | 100%: 0")
    plain = film(tiny_base, tiny_motion, class_in_place(tiny_base, lora), "1")
    rising = film(tiny_base, tiny_motion, lora, "0%: 0 | 50%: 1")
    nearly = film(tiny_base, tiny_motion, lora, "0%: 1 | 100%: 0.9999")  # by the way that folds at every step
    torch.testing.assert_close(none, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(nearly, whole, rtol=1e-3, atol=1e-3)
    assert min((rising - other).abs().max() for other in (whole, plain)) > 0.02


def test_exact_and_plain_blocks_agree_while_the_weights_change(
    tiny_base: Base, tiny_motion: MotionModules, lora: Concept
) -> None:
    fast, plain = (film(tiny_base, tiny_motion, lora, "0%: 0.2 | 50%: 1", speed=speed) for speed in (EXACT, PLAIN))
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)


def test_what_one_set_of_weights_can_not_hold_is_refused(lora: Concept) -> None:
    def asked(strength: float | str = 1.0, concept: Concept = lora, **control: Any) -> tuple[Concept, Control]:
        return concept, Control(concept_strength=strength, **control)

    other = dataclasses.replace(lora)
    assert folded_concept([asked(), asked()], compiled=True) == Folded(lora, Control())
    for films, compiled, told in (
        ([asked(), asked(concept=other)], False, r"different concepts in one batch[\s\S]*batch of 1"),
        ([asked("0.5"), asked()], False, r"different strengths of a concept of kind lora[\s\S]*batch of 1"),
        ([asked(concept_frames="0: 0 | 4: 1")], False, r"changes over frames[\s\S]*adapter\.kind=kv"),
        ([asked("0%: 0 | 50%: 1")], True, r"with --compile"),
    ):
        with pytest.raises(UserError, match=told):
            folded_concept(films, compiled=compiled)
