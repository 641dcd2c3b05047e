"""A figure: what was measured, how surely, and what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdvideo.evaluation.statistics import bootstrap_mean, bootstrap_ratio, wilson


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the report.

    interval: of 95 %, by `method`. at_least and at_most: what was asked for; a figure with neither is for comparison.
    n: over how many of `of` it was taken.
    """

    part: str
    name: str
    value: float
    unit: str
    n: int
    of: str
    interval: tuple[float, float] | None = None
    method: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def passed(self) -> bool | None:
        """Whether the value (not its interval) is as asked; None where nothing was asked."""
        if self.at_least is None and self.at_most is None:
            return None
        low = -np.inf if self.at_least is None else self.at_least
        high = np.inf if self.at_most is None else self.at_most
        return bool(low <= self.value <= high)

    @property
    def asked(self) -> str:
        """What was asked for, in words."""
        if self.at_least is not None and self.at_most is not None:
            return f"{self.at_least:g} to {self.at_most:g} {self.unit}".strip()
        if self.at_least is not None:
            return f"at least {self.at_least:g} {self.unit}".strip()
        return "" if self.at_most is None else f"at most {self.at_most:g} {self.unit}".strip()

    def as_json(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "part": self.part,
            "name": self.name,
            "value": round(self.value, 5),
            "unit": self.unit,
            "interval_95": None if self.interval is None else [round(bound, 5) for bound in self.interval],
            "method": self.method,
            "n": self.n,
            "of": self.of,
            "asked": self.asked,
            "passed": self.passed,
        }


def share(right: NDArray[np.bool_], *, part: str, name: str, of: str, at_least: float | None = None) -> Figure:
    """How many are right, in %, with Wilson's interval."""
    low, high = wilson(int(right.sum()), len(right))
    return Figure(
        part=part, name=name, value=100 * float(right.mean()), unit="%", n=len(right), of=of,
        interval=(100 * low, 100 * high), method="Wilson", at_least=at_least,
    )  # fmt: skip


def mean(
    values: Sequence[float] | NDArray[np.floating],
    *,
    part: str,
    name: str,
    unit: str,
    of: str,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Figure:
    """A mean with its bootstrap interval."""
    return Figure(
        part=part, name=name, value=float(np.mean(values)), unit=unit, n=len(values), of=of,
        interval=bootstrap_mean(values), method="bootstrap", at_least=at_least, at_most=at_most,
    )  # fmt: skip


def ratio(
    above: Sequence[float],
    below: Sequence[float],
    *,
    part: str,
    name: str,
    of: str,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Figure:
    """The ratio of two means over the same things, with its bootstrap interval."""
    return Figure(
        part=part, name=name, value=float(np.mean(above) / np.mean(below)), unit="x", n=len(above), of=of,
        interval=bootstrap_ratio(above, below), method="bootstrap, paired", at_least=at_least, at_most=at_most,
    )  # fmt: skip
