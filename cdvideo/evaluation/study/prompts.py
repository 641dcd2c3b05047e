"""What the study asks of every concept: prompts of four kinds, none in a place of the concept's own pictures."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cdvideo.concept.phrases import SEMANTIC_PHRASES, fill
from cdvideo.world.captions import BARE_THINGS, SETTING_WORDS, article
from cdvideo.world.doings import DOINGS
from cdvideo.world.heldout import HELDOUT_INDIVIDUALS, is_heldout
from cdvideo.world.places import PLACES
from cdvideo.world.samples import SAMPLE_SETTINGS
from cdvideo.world.scenes import THINGS

Kind = Literal["worn", "scene", "doing", "worn and doing"]
KINDS: tuple[Kind, ...] = ("worn", "scene", "doing", "worn and doing")
SCENES_ASKED = tuple(setting for setting in PLACES if setting not in SAMPLE_SETTINGS)
DOINGS_ASKED = tuple(setting for setting in DOINGS if setting not in SAMPLE_SETTINGS)


@dataclass(frozen=True)
class StudyPrompt:
    """A prompt for any phrase, and what a picture of it must show; None was not asked for."""

    kind: Kind
    subject: str
    thing: str | None
    setting: str | None

    @property
    def template(self) -> str:
        """The prompt with {} for the phrase: `a {} wearing headphones surfing`."""
        worn = "" if self.thing is None else self.thing if self.thing in BARE_THINGS else article(self.thing)
        where = "" if self.setting is None else SETTING_WORDS[self.setting][0]
        return " ".join(part for part in ("a {}", worn and f"wearing {worn}", where) if part)

    def text(self, phrase: str) -> str:
        """The prompt for "sks dog" or for "dog"."""
        return fill(self.template, phrase)

    @property
    def held_out(self) -> bool:
        """Whether the base never saw this subject, thing and doing together."""
        return bool(self.thing and self.setting) and is_heldout(self.subject, self.thing or "", self.setting or "")

    @property
    def semantic_phrase(self) -> bool:
        """Whether the semantic preservation loss compares this very sentence in training."""
        return self.template in SEMANTIC_PHRASES


def study_prompts(concept: str, count: int, *, seed: int) -> list[StudyPrompt]:
    """`count` prompts of each kind, kind by kind. A longer list of a kind begins with the shorter one.

    Of those that ask for two things at once every other one is a held-out triple, as far as the class has any.
    """
    subject = HELDOUT_INDIVIDUALS[concept].subject
    rng = np.random.default_rng([seed, zlib.crc32(concept.encode())])
    things = [str(thing) for thing in rng.permutation(THINGS)]
    scenes = [str(scene) for scene in rng.permutation(SCENES_ASKED)]
    doings = [str(doing) for doing in rng.permutation(DOINGS_ASKED)]
    pairs = [(thing, doing) for thing in THINGS for doing in DOINGS_ASKED]
    order = [pairs[i] for i in rng.permutation(len(pairs))]
    unseen = [pair for pair in order if is_heldout(subject, *pair)]
    seen = [pair for pair in order if not is_heldout(subject, *pair)]
    both = [pair for two in zip(unseen, seen, strict=False) for pair in two]
    prompts = [
        *(StudyPrompt("worn", subject, thing, None) for thing in things[:count]),
        *(StudyPrompt("scene", subject, None, scene) for scene in scenes[:count]),
        *(StudyPrompt("doing", subject, None, doing) for doing in doings[:count]),
        *(StudyPrompt("worn and doing", subject, thing, doing) for thing, doing in both[:count]),
    ]
    assert len(prompts) == count * len(KINDS), f"{len(prompts)} prompts for {concept}"
    return prompts
