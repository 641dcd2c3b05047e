from __future__ import annotations

import logging

import pytest

from cdvideo.base.loader import Base
from cdvideo.concept.words import check_token, warn_of_unknown_words
from cdvideo.errors import UserError


def test_an_ordinary_word_is_no_token(tiny_base: Base) -> None:
    with pytest.raises(UserError, match="ordinary word") as caught:
        check_token(tiny_base.tokenizer, "dog")
    assert "--token" in str(caught.value)
    check_token(tiny_base.tokenizer, "sks")
    check_token(tiny_base.tokenizer, "dogx")


def test_a_rare_piece_of_clips_vocabulary_is_a_token(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdvideo.concept.words._RARE_FROM", 0)  # as if all of this vocabulary were CLIP's last part
    check_token(tiny_base.tokenizer, "dog")


def test_words_in_many_pieces_are_warned_of_in_one_line(tiny_base: Base, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_unknown_words(tiny_base.tokenizer, "stuffed animal")
    assert not caplog.records
    warn_of_unknown_words(tiny_base.tokenizer, "stuffed axolotl")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "'axolotl'" in record.message and "stuffed" not in record.message
    assert "\n" not in record.message
