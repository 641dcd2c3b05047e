"""Prompts that change along a film, and concepts that act in part: against the K and V that they are mixtures of."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from cdvideo.base.loader import Base
from cdvideo.concept.concept import Concept
from cdvideo.errors import UserError
from cdvideo.sampling.options import AS_TRAINED, Control
from cdvideo.sampling.prompt_kv import PromptKV, compile_prompts
from cdvideo.sampling.prompt_track import FilmPrompts, class_in_place, compile_film, read_films

PROMPT = "a photo of the sks dog"


def compiled(base: Base, prompts: dict[int, str], **options: Any) -> FilmPrompts:
    settings = {"concept": None, "control": AS_TRAINED, **options}
    return compile_film(base, prompts, "snow", **settings)


def read(film: FilmPrompts, frames: range, *, done: float = 0.0) -> PromptKV:
    return read_films([film], guided=True, done=done, frames=frames)


def assert_same(one: PromptKV, other: PromptKV, **tolerance: float) -> None:
    for name, pair in one.layers.items():
        for tensor, wanted in zip(pair, other.layers[name], strict=True):
            torch.testing.assert_close(tensor, wanted, **({"rtol": 0, "atol": 0} | tolerance))


def rows(prompt: PromptKV, indices: list[int]) -> PromptKV:
    return PromptKV({name: (keys[indices], values[indices]) for name, (keys, values) in prompt.layers.items()})


def difference(one: PromptKV, other: PromptKV) -> float:
    pairs = [(a, b) for name in one.layers for a, b in zip(one.layers[name], other.layers[name], strict=True)]
    return max((a - b).abs().max().item() for a, b in pairs)


def test_one_prompt_is_read_as_it_was_compiled(tiny_base: Base, tiny_concept: Concept) -> None:
    film = compiled(tiny_base, {0: PROMPT}, concept=tiny_concept)
    assert not film.varies and film.plain is None
    assert_same(read(film, range(9)), compile_prompts(tiny_base, ["snow", PROMPT], concept=tiny_concept))


def test_prompts_travel(tiny_base: Base) -> None:
    film = compiled(tiny_base, {2: "a dog", 6: "a cat in snow"})
    assert film.varies
    keys = compile_prompts(tiny_base, ["snow", "a dog", "a cat in snow"])
    assert_same(read(film, range(3)), rows(keys, [0, 1]))  # one row where all frames read the same
    assert_same(read(film, range(6, 9)), rows(keys, [0, 2]))

    travelling = read(film, range(2, 7))
    assert len(next(iter(travelling.layers.values()))[0]) == 10, "the negative prompt and the prompts, by frame"
    for name, pair in travelling.layers.items():
        for tensor, key in zip(pair, keys.layers[name], strict=True):
            assert all(torch.equal(tensor[f], key[0]) for f in range(5))
            for f, share in enumerate((0, 0.25, 0.5, 0.75, 1)):
                torch.testing.assert_close(tensor[5 + f], (1 - share) * key[1] + share * key[2], rtol=1e-5, atol=1e-6)


def test_films_of_different_prompts_and_concepts_in_one_batch(tiny_base: Base, tiny_concept: Concept) -> None:
    one = compiled(tiny_base, {0: PROMPT}, concept=tiny_concept)
    other = compiled(tiny_base, {0: "a dog", 4: "a cat"})
    both = read_films([one, other], guided=True, done=0, frames=range(3))
    alone, travelling = (read_films([film], guided=True, done=0, frames=range(3)) for film in (one, other))
    for name, (keys, _) in both.layers.items():
        assert len(keys) == 12
        first, second = alone.layers[name][0], travelling.layers[name][0]
        wanted = torch.cat([first[:1].expand(3, -1, -1, -1), second[:3], first[1:].expand(3, -1, -1, -1), second[3:]])
        assert torch.equal(keys, wanted), "negative prompts of both, then prompts of both"
    unguided = compile_film(tiny_base, {0: "a dog"}, None, concept=None, control=AS_TRAINED)
    assert_same(read_films([unguided], guided=False, done=0, frames=range(3)), compile_prompts(tiny_base, ["a dog"]))


def test_a_concept_in_part_lies_between_the_class_and_the_concept(tiny_base: Base, tiny_concept: Concept) -> None:
    whole = compile_prompts(tiny_base, ["snow", PROMPT], concept=tiny_concept)
    plain = compile_prompts(tiny_base, ["snow", PROMPT], concept=class_in_place(tiny_base, tiny_concept))
    assert difference(whole, plain) > 0.1

    control = Control(concept_strength="0%: 0 | 50%: 1", concept_frames="0: 1 | 4: 0.5", concept_up=0.5)
    film = compiled(tiny_base, {0: PROMPT}, concept=tiny_concept, control=control)
    assert film.varies
    assert_same(read(film, range(1)), plain, rtol=1e-6, atol=1e-6)
    halfway = read(film, range(0, 5, 4), done=0.25)  # frames 0 and 4
    for name, pair in halfway.layers.items():
        layer = 0.5 if name.startswith("up") else 1.0
        for tensor, of_whole, of_plain in zip(pair, whole.layers[name], plain.layers[name], strict=True):
            for row, frame in ((0, 1.0), (1, 0.5)):
                wanted = of_plain[0] + 0.5 * frame * layer * (of_whole[0] - of_plain[0])
                torch.testing.assert_close(tensor[row], wanted, rtol=1e-5, atol=1e-5)
    late = read(film, range(1), done=1.0)
    for name in (name for name in whole.layers if not name.startswith("up")):
        torch.testing.assert_close(late.layers[name][1], whole.layers[name][1])


def test_the_class_stands_in_the_tokens_place(tiny_base: Base, tiny_concept: Concept) -> None:
    """With as many rows: 'a photo of the dog dog dog' for a token of two rows before the class word."""
    plain = compile_prompts(tiny_base, [PROMPT], concept=class_in_place(tiny_base, tiny_concept))
    assert_same(plain, compile_prompts(tiny_base, ["a photo of the dog dog dog"]), rtol=1e-5, atol=1e-5)


def test_strength_that_can_not_be_given_is_refused(tiny_base: Base, tiny_concept: Concept) -> None:
    part = Control(concept_strength="0.5")
    with pytest.raises(UserError, match=r"where there is none[\s\S]*--concept"):
        compiled(tiny_base, {0: "a dog"}, control=part)
    nameless = dataclasses.replace(tiny_concept.metadata, class_words={"sks": ""})
    with pytest.raises(UserError, match="'sks', whose class is not known"):
        class_in_place(tiny_base, Concept(tiny_concept.tokens, {}, nameless))
