from __future__ import annotations

import pytest

from cdvideo.sampling.keyframes import between, parse_curve, parse_prompts


def test_prompts() -> None:
    assert parse_prompts("a dog, 2: a cat | b") == {0: "a dog, 2: a cat | b"}, "a plain prompt stays as it is"
    assert parse_prompts("0: a dog | 24: a cat: black ") == {0: "a dog", 24: "a cat: black"}
    assert parse_prompts("0: a dog\n12: a cat\n") == {0: "a dog", 12: "a cat"}
    assert parse_prompts("8: a dog") == {8: "a dog"}
    for plain in ("4:3 picture of a dog", "12:30 at the clock tower"):
        assert parse_prompts(plain) == {0: plain}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0: a | b", "'b': an entry is written"),
        ("4: a | 4: b", "positions 4, 4 do not rise"),
        ("0: a | 8:", "the prompt at frame 8 is empty"),
        ("0: a | 50%: b", "position 50%: must be the number of a frame"),
        ("0: a | 1.5: b", "position 1.5: must be the number of a frame"),
        ("0%: a | 50%: b", "position 0%: must be the number of a frame"),
        ("0.5: a | 3: b", "position 0.5: must be the number of a frame"),
    ],
)
def test_prompts_that_can_not_be_read(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_prompts(text)


def test_curves() -> None:
    curve = parse_curve("4: 1 | 8: 2 | 10: 0")
    assert [curve.at(position) for position in (0, 4, 5, 8, 9, 10, 99)] == [1, 1, 1.25, 2, 1, 0, 0]
    assert not curve.constant
    assert parse_curve("0.5").is_always(0.5) and parse_curve("0: 1 | 9: 1").constant
    shares = parse_curve("0%: 0.2 | 40%: 1", percent=True)
    assert [shares.at(done) for done in (0, 0.2, 0.4, 1)] == pytest.approx([0.2, 0.6, 1, 1])
    assert parse_curve(0.5).is_always(0.5)


def test_a_closed_curve_comes_back() -> None:
    closed = parse_curve("0: 1 | 4: 2").closed(8)
    assert [closed.at(frame) for frame in (0, 4, 6, 8)] == [1, 2, 1.5, 1]
    assert parse_curve("0: 1 | 8: 2").closed(8) == parse_curve("0: 1 | 8: 2"), "which ends on its last frame"
    assert parse_curve("0.5").closed(8) == parse_curve("0.5")


@pytest.mark.parametrize(
    ("text", "percent", "said"),
    [
        ("much", False, "'much': an entry is written"),
        ("0: much", False, "'much' at 0 is no number"),
        ("0: 1 | 40%: 2", False, "position 40%: the number of a frame"),
        ("0: 1 | 9: 2", True, "position 0: a share such as 40%"),
        ("0%: 1 | 140%: 2", True, "beyond 100%"),
        ("9: 1 | 3: 2", False, "do not rise"),
    ],
)
def test_curves_that_can_not_be_read(text: str, percent: bool, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_curve(text, percent=percent)


def test_between() -> None:
    assert between((0, 8), 2) == ((0, 0.75), (1, 0.25))
    assert between((0, 8), 0) == ((0, 1.0),)
    assert between((0, 8), 8) == between((0, 8), 20) == ((1, 1.0),)
    assert between((4, 8), 1) == ((0, 1.0),)
