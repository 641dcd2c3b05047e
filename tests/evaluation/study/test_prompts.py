"""What the study asks of a concept."""

from __future__ import annotations

import pytest

from cdvideo.evaluation.study.prompts import KINDS, study_prompts
from cdvideo.world.heldout import HELDOUT_INDIVIDUALS, HELDOUT_TRIPLES
from cdvideo.world.samples import SAMPLE_SETTINGS


@pytest.mark.parametrize("concept", HELDOUT_INDIVIDUALS)
def test_every_kind_has_as_many_and_none_is_in_a_place_of_the_pictures(concept: str) -> None:
    prompts = study_prompts(concept, 6, seed=0)
    assert [prompt.kind for prompt in prompts] == [kind for kind in KINDS for _ in range(6)]
    assert len({prompt.template for prompt in prompts}) == 24
    assert not {prompt.setting for prompt in prompts} & {*SAMPLE_SETTINGS}
    assert {prompt.subject for prompt in prompts} == {HELDOUT_INDIVIDUALS[concept].subject}


def test_every_other_pair_is_held_out() -> None:
    for concept in HELDOUT_INDIVIDUALS:
        both = study_prompts(concept, 5, seed=0)[-5:]
        held_out = [(p.subject, p.thing, p.setting) in HELDOUT_TRIPLES for p in both]
        assert held_out == [True, False, True, False, True] == [p.held_out for p in both]


def test_a_longer_list_begins_with_the_shorter_one() -> None:
    short, long = study_prompts("owl", 2, seed=3), study_prompts("owl", 5, seed=3)
    assert [p for i, p in enumerate(long) if i % 5 < 2] == short
    assert study_prompts("owl", 2, seed=4) != short
    assert study_prompts("bear", 2, seed=3) != short


def test_the_wording() -> None:
    prompts = [p for seed in range(20) for p in study_prompts("owl", 6, seed=seed)]
    texts = {p.template: p for p in prompts}
    surfing = texts["a {} wearing headphones"]
    assert (surfing.thing, surfing.setting) == ("headphones", None)
    assert surfing.text("owl") == "an owl wearing headphones"
    assert texts["a {} in the forest"].text("sks owl") == "a sks owl in the forest"
    assert texts["a {} dancing"].semantic_phrase and not texts["a {} sailing"].semantic_phrase
