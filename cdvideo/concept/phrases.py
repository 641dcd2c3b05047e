"""The sentences of concept training: prompts for the pictures, phrases for the semantic preservation loss, and phrases
that no loss ever sees, to measure drift on. Imports no torch."""

from __future__ import annotations

import re
from typing import Literal

_STYLES = {
    "photo": ("a photo of a {}", "a photo of the {}", "a good photo of a {}", "a photo of one {}"),
    "picture": ("a picture of a {}", "a photo of a {}", "a {}", "an illustration of a {}", "a nice picture of a {}"),
}
CLOSE_UP = "a close up of a {}"
FAR_AWAY = " far away"

# What a person may ask of a concept: alone, described, dressed, placed, doing something, several at once.
SEMANTIC_PHRASES = (
    "a {}",
    "the {}",
    "a picture of a {}",
    "a photo of a {}",
    "a drawing of a {}",
    "a close up of a {}",
    "a {} far away",
    "a cute {}",
    "a small {}",
    "a red {}",
    "a blue {}",
    "a white {}",
    "a {} wearing sunglasses",
    "a {} wearing a top hat",
    "a {} wearing a crown",
    "a {} wearing a helmet",
    "a {} with a bow tie",
    "a {} in a party hat",
    "a {} wearing a cape",
    "a {} wearing a hat",
    "a {} on the beach",
    "a {} in the snow",
    "a {} in the city",
    "a {} in space",
    "a {} on the grass",
    "a {} in a garden with flowers",
    "a {} in the mountains",
    "a {} in the street",
    "a {} in front of a blue wall",
    "a {} on a yellow background",
    "a {} skateboarding",
    "a {} flying in the sky",
    "a {} dancing",
    "a {} driving a car",
    "a {} swimming",
    "a {} running",
    "a {} wearing sunglasses on the beach",
    "a {} wearing a crown in the snow",
    "a {} with a bow tie in the city",
    "a {} wearing a helmet skateboarding",
)

# Described, worn, placed, doing something, several at once: as wide as what a person may ask, and never trained on.
HELD_OUT_PHRASES = (
    "one {}",
    "this is a {}",
    "an image of a {}",
    "a painting of a {}",
    "a rendering of a {}",
    "a photograph of a {}",
    "a sketch of a {}",
    "a cartoon of a {}",
    "a portrait of a {}",
    "a funny {}",
    "a happy {}",
    "a big {}",
    "a little {}",
    "a smiling {}",
    "a lovely {}",
    "a sweet {}",
    "a green {}",
    "a black {}",
    "a yellow {}",
    "a purple {}",
    "a brown {}",
    "an orange {}",
    "a {} wearing headphones",
    "a {} wearing glasses",
    "a {} wearing a cap",
    "a {} wearing a straw hat",
    "a {} wearing a santa hat",
    "a {} in a graduation cap",
    "a {} wearing a medal",
    "a {} in a wizard hat",
    "a {} with a medal",
    "a {} with a scarf",
    "a {} with a bow",
    "a {} in the rain",
    "a {} in the forest",
    "a {} in the desert",
    "a {} in the park",
    "a {} in a meadow",
    "a {} in the clouds",
    "a {} in the sea",
    "a {} under the trees",
    "a {} underwater",
    "a {} at night",
    "a {} at a party",
    "a {} among the stars",
    "a {} on a purple background",
    "a {} in front of a green wall",
    "a {} surfing",
    "a {} skiing",
    "a {} sailing a boat",
    "a {} going for a walk",
    "a {} riding a bike",
    "a {} riding a wave",
    "a {} sleeping",
    "a {} jumping",
    "a {} sitting",
    "a {} wearing headphones surfing",
    "a {} with a scarf in the rain",
    "a {} wearing a scarf skiing",
    "a {} wearing glasses at night",
    "a {} with a medal in the forest",
    "a {} with a bow underwater",
    "a happy {} sailing a boat",
    "a yellow {} wearing headphones",
)


def training_prompts(style: Literal["picture", "photo"]) -> tuple[str, ...]:
    """The prompts that the pictures are learned under; {} stands for the concept's phrase."""
    return _STYLES[style]


def fill(template: str, phrase: str) -> str:
    """Puts a phrase into a template, with the right article: fill("a {}", "owl") is "an owl"."""
    article = "an" if phrase[:1].lower() in "aeiou" else "a"
    return re.sub(r"\ba \{\}", f"{article} {{}}", template).replace("{}", phrase)
