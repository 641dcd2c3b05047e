"""What the base is asked for: triples that it was trained on, triples held out, unknown words, phrases of a class."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cdvideo.world.captions import BARE_THINGS, SETTING_WORDS, SUBJECT_WORDS, article, plain_caption
from cdvideo.world.heldout import HELDOUT_TRIPLES, SETTINGS, is_heldout
from cdvideo.world.palette import COLOURS
from cdvideo.world.scenes import SUBJECTS, THINGS

SYLLABLES = "ba dro fi ga glo ka kli lu mo ne pra quo ri sna ta tru vo wex yi zu".split()
TEMPLATES = ("a {}", "the {}", "a photo of a {}", "a picture of a {}", "a cute {}", "one {}")


class Ask(NamedTuple):
    """A prompt, and what a picture of it must show."""

    prompt: str
    subject: str
    thing: str
    setting: str

    @property
    def triple(self) -> tuple[str, str, str]:
        return self.subject, self.thing, self.setting


def choose_asks(split: str, count: int, *, seed: int) -> list[Ask]:
    """The first `count` triples of a shuffled list of all "trained" or all "heldout" ones, plainly worded.

    A longer list begins with the shorter one. The colour of a plain background is drawn for each.
    """
    triples = [(a, b, c) for a in SUBJECTS for b in ("", *THINGS) for c in SETTINGS]
    chosen = HELDOUT_TRIPLES if split == "heldout" else tuple(t for t in triples if not is_heldout(*t))
    rng = np.random.default_rng([seed, split == "heldout"])
    order, colours = rng.permutation(len(chosen)), rng.choice(list(COLOURS), len(chosen))
    return [
        Ask(plain_caption(*chosen[i], colour=str(colour)), *chosen[i])
        for i, colour in zip(order[:count], colours[:count], strict=True)
    ]


def with_unknown_words(ask: Ask, rng: np.random.Generator, *, count: int = 3) -> Ask:
    """The ask with made-up words before, between or after subject, thing worn and setting, never within one of them."""
    parts = [article(ask.subject)]
    if ask.thing:
        parts.append(f"wearing {ask.thing if ask.thing in BARE_THINGS else article(ask.thing)}")
    setting = ask.prompt[len(" ".join(parts)) + 1 :]
    assert setting.split()[0] == SETTING_WORDS[ask.setting][0].split()[0], ask
    parts.append(setting)
    for _ in range(count):
        parts.insert(int(rng.integers(len(parts) + 1)), made_up_word(rng))
    return ask._replace(prompt=" ".join(parts))


def made_up_word(rng: np.random.Generator) -> str:
    """Three syllables that make no word."""
    return "".join(str(s) for s in rng.choice(SYLLABLES, 3))


def class_phrases() -> dict[str, list[str]]:
    """Phrases that name each subject, by its own name and by other words for it."""
    return {
        subject: [
            template.format(name) for name in (subject, *SUBJECT_WORDS.get(subject, ())) for template in TEMPLATES
        ]
        for subject in SUBJECTS
    }
