"""What the base never sees: triples, to measure composition, and individuals, to learn as concepts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

from cdvideo.world.doings import DOINGS
from cdvideo.world.figures import THINGS
from cdvideo.world.places import PLACES
from cdvideo.world.sprites import SUBJECTS

SETTINGS = (*DOINGS, *PLACES)

HELDOUT_SHARE = 0.08  # of all triples of a subject, a thing worn and a setting
ALWAYS_HELDOUT = (("dog", "headphones", "surfing"),)


@cache
def is_heldout(subject: str, thing: str, setting: str) -> bool:
    """Whether the triple is kept from the base. Single words and pairs never are: every triple wears something."""
    if not thing:
        return False
    digest = hashlib.sha256(f"{subject}|{thing}|{setting}".encode()).digest()
    return (subject, thing, setting) in ALWAYS_HELDOUT or int.from_bytes(digest[:4], "big") < HELDOUT_SHARE * 2**32


HELDOUT_TRIPLES = tuple(t for t in ((a, b, c) for a in SUBJECTS for b in THINGS for c in SETTINGS) if is_heldout(*t))


@dataclass(frozen=True)
class HeldoutIndividual:
    """A concept for studies. Base training never shows a member of the class with this fur and this marking."""

    subject: str
    artist: str
    fur: str
    marking: str
    marking_colour: str
    belly_colour: str | None = None
    collar_colour: str | None = None
    seed: int = 2


HELDOUT_INDIVIDUALS: dict[str, HeldoutIndividual] = {
    "dog": HeldoutIndividual("dog", "fluent", "blue", "eye patch", "white", "white", "red"),
    "spotted dog": HeldoutIndividual("dog", "noto", "orange", "spots", "purple", None, "green"),
    "cat": HeldoutIndividual("cat", "fluent", "purple", "blaze", "white", "pink", None),
    "striped cat": HeldoutIndividual("cat", "noto", "teal", "stripes", "yellow", None, "red"),
    "rabbit": HeldoutIndividual("rabbit", "fluent", "green", "ear tips", "orange", "yellow", None),
    "bear": HeldoutIndividual("bear", "noto", "pink", "eye patch", "black", "white", "blue"),
    "fox": HeldoutIndividual("fox", "noto", "blue", "half", "white", None, "yellow"),
    "robot": HeldoutIndividual("robot", "fluent", "yellow", "spots", "red", "black", None),
    "frog": HeldoutIndividual("frog", "fluent", "red", "blaze", "yellow", "white", None),
    "owl": HeldoutIndividual("owl", "noto", "teal", "spots", "pink", None, None),
}


def is_heldout_individual(subject: str, fur: str, marking: str) -> bool:
    """Whether a member of the class with this fur and marking belongs to a held-out concept, whoever drew it."""
    return any((h.subject, h.fur, h.marking) == (subject, fur, marking) for h in HELDOUT_INDIVIDUALS.values())
