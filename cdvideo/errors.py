"""Errors for the people who use cdvideo. Imports no torch, so that a wrong input is told at once.

Two kinds of fault, two kinds of exception:

* `UserError`: an input, a file or a setting is wrong, and whoever gave it can mend it. Shown without a traceback.
* everything else (`AssertionError` for broken invariants, ...): a fault of the program. Shown with its traceback.
"""

from __future__ import annotations

from functools import partial
from typing import Any

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class UserError(ValueError):
    """A wrong input: what was given, what is allowed, and what to do about it.

    Args:
        given: What was found, with the offending value or file name.
        allowed: The values, range or form that would have been accepted.
        do: The next step for the reader, as an imperative.
    """

    def __init__(self, given: str, *, allowed: str, do: str) -> None:
        super().__init__(f"{given}\n  allowed: {allowed}\n  do: {do}")
        self.given = given
        self.allowed = allowed
        self.do = do

    def __reduce__(self) -> tuple[Any, ...]:
        """So that it reaches another process whole."""
        return partial(UserError, allowed=self.allowed, do=self.do), (self.given,)
