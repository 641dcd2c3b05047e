from __future__ import annotations

import numpy as np
import pytest

from cdvideo.evaluation.prompts import SYLLABLES, choose_asks, class_phrases, made_up_word, with_unknown_words
from cdvideo.world.captions import article
from cdvideo.world.heldout import HELDOUT_TRIPLES, is_heldout
from cdvideo.world.sprites import SUBJECTS


@pytest.mark.parametrize("split", ["trained", "heldout"])
def test_triples_are_of_their_split_and_each_comes_once(split: str) -> None:
    asks = choose_asks(split, 300, seed=1)
    assert len({ask.triple for ask in asks}) == 300
    assert all(is_heldout(*ask.triple) == (split == "heldout") for ask in asks)


def test_a_longer_list_begins_with_the_shorter_one_and_the_seed_shuffles() -> None:
    assert choose_asks("heldout", 50, seed=1)[:20] == choose_asks("heldout", 20, seed=1)
    assert choose_asks("heldout", 20, seed=2) != choose_asks("heldout", 20, seed=1)
    assert len(choose_asks("heldout", len(HELDOUT_TRIPLES), seed=1)) == len(HELDOUT_TRIPLES)


def test_prompts_say_the_triple() -> None:
    for ask in choose_asks("trained", 300, seed=1):
        assert ask.prompt.startswith(article(ask.subject))
        assert ask.thing in ask.prompt
        assert ("wearing" in ask.prompt) == bool(ask.thing)


def test_unknown_words_leave_the_known_ones_whole() -> None:
    rng = np.random.default_rng(0)
    for ask in choose_asks("trained", 100, seed=1):
        changed = with_unknown_words(ask, rng)
        unknown = [word for word in changed.prompt.split() if word not in ask.prompt.split()]
        assert len(unknown) == 3
        assert " ".join(word for word in changed.prompt.split() if word not in unknown) == ask.prompt
        assert article(ask.subject) in changed.prompt
        assert ask.thing in changed.prompt
        assert changed.triple == ask.triple


def test_made_up_words_are_no_words_of_the_world() -> None:
    known = {word for phrases in class_phrases().values() for phrase in phrases for word in phrase.split()}
    words = {made_up_word(np.random.default_rng(seed)) for seed in range(200)}
    assert len(words) > 150
    assert not words & known
    assert all(any(word.startswith(syllable) for syllable in SYLLABLES) for word in words)


def test_every_subject_has_phrases_of_its_own() -> None:
    phrases = class_phrases()
    assert tuple(phrases) == SUBJECTS
    assert "a puppy" in phrases["dog"] and "a photo of a dog" in phrases["dog"]
    assert min(len(texts) for texts in phrases.values()) >= 2
