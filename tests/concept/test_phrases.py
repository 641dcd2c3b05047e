from __future__ import annotations

from cdvideo.concept.phrases import CLOSE_UP, HELD_OUT_PHRASES, SEMANTIC_PHRASES, fill, training_prompts


def test_drift_is_measured_on_phrases_that_no_loss_sees() -> None:
    seen = {CLOSE_UP, *SEMANTIC_PHRASES, *training_prompts("picture"), *training_prompts("photo")}
    assert len(set(HELD_OUT_PHRASES)) == len(HELD_OUT_PHRASES) >= 60
    assert len(set(SEMANTIC_PHRASES)) == len(SEMANTIC_PHRASES) >= 24
    assert not seen & set(HELD_OUT_PHRASES)


def test_every_phrase_has_one_place_for_the_concept() -> None:
    for template in (*SEMANTIC_PHRASES, *HELD_OUT_PHRASES, *training_prompts("picture"), *training_prompts("photo")):
        assert template.count("{}") == 1, template


def test_the_article_follows_the_word() -> None:
    assert fill("a picture of a {}", "owl") == "a picture of an owl"
    assert fill("a picture of a {}", "sks owl") == "a picture of a sks owl"
    assert fill("the {} in a hat", "owl") == "the owl in a hat"
