"""What prompts of web UIs and ComfyUI hold besides words, which has no meaning here (no torch)."""

from __future__ import annotations

import re
from collections.abc import Iterable

# What stands in a prompt, by its form, and what to write in its place.
_FORMS = (
    (r"<(?:lora|lyco|hypernet):[^<>]*>", "no file is loaded so: give it as --concept FILE:STRENGTH"),
    (r"\bembedding:\S+", "an embedding is given as --concept FILE, and its word alone stands in the prompt"),
    (r"\([^()]*[^()\d\s]\s*:\s*-?\d*\.?\d+\s*\)", "it is read as these very letters: words have no weights here"),
    (
        r"\[[^\[\]]*:[^\[\]]*:?\s*\d*\.?\d+\s*\]",
        "words do not change within a picture; over a film they do: 0: a dog | 24: a cat",
    ),
    (r"\bBREAK\b", "it is read as a word: a prompt is one text here"),
)


def foreign_syntax(prompts: Iterable[str]) -> list[str]:
    """A line for each form that prompts elsewhere have and that does nothing here, with the first that stands there.

    >>> foreign_syntax(["a (red:1.3) dog"])
    ['(red:1.3) in the prompt: it is read as these very letters: words have no weights here']
    """
    text = "\n".join(prompts)
    matches = ((re.search(pattern, text), meaning) for pattern, meaning in _FORMS)
    return [f"{match[0][:60]} in the prompt: {meaning}" for match, meaning in matches if match]
