from __future__ import annotations

import pickle

import pytest

from cdvideo.errors import UserError


def test_message_tells_given_allowed_and_what_to_do() -> None:
    error = UserError("frames=0", allowed="1 or more", do="ask for a frame")
    assert str(error) == "frames=0\n  allowed: 1 or more\n  do: ask for a frame"
    assert (error.given, error.allowed, error.do) == ("frames=0", "1 or more", "ask for a frame")


def test_callers_of_the_library_may_catch_value_error() -> None:
    with pytest.raises(ValueError, match="frames=0"):
        raise UserError("frames=0", allowed="1 or more", do="ask for a frame")


def test_an_error_reaches_another_process_whole() -> None:
    error = pickle.loads(pickle.dumps(UserError("frames=0", allowed="1 or more", do="ask for a frame")))
    assert isinstance(error, UserError)
    assert (error.given, error.allowed, error.do) == ("frames=0", "1 or more", "ask for a frame")
