"""Intervals over concepts: scores of one concept hang together, so concepts are resampled, then prompts of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cdvideo.evaluation.statistics import RESAMPLES

Means: TypeAlias = NDArray[np.float64]  # X_CP: concepts x prompts, means over seeds
CHUNK = 500
METHOD = "bootstrap over concepts, then prompts"


def mean_interval(values_CP: Means, *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean over concepts and prompts."""
    return _interval(lambda pick: pick(values_CP), values_CP.shape, seed=seed)


def ratio_interval(values_CP: Means, others_CP: Means, *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the ratio of two means over the same concepts and prompts, which are resampled together."""
    assert values_CP.shape == others_CP.shape
    with np.errstate(divide="ignore", invalid="ignore"):
        return _interval(lambda pick: pick(values_CP) / pick(others_CP), values_CP.shape, seed=seed)


def _interval(
    statistic: Callable[[Callable[[Means], Means]], Means], shape: tuple[int, ...], *, seed: int
) -> tuple[float, float]:
    """Percentiles over resamples of both levels (Davison and Hinkley, Bootstrap Methods, 1997, section 3.8).

    With few concepts it is too narrow where they differ more than prompts do: with normal effects, 20 prompts and 200
    trials it held the true mean in 80 % of four concepts (85 % of eight) whose spread is twice that of prompts, in 84 %
    (90 %) where both are alike, in 92 % (96 %) at a quarter. Of a single concept it is that of its prompts alone.
    """
    found = np.concatenate([statistic(pick) for pick in _picks(shape, seed)])
    low, high = np.nanquantile(found, [0.025, 0.975]) if np.isfinite(found).any() else (np.nan, np.nan)
    return float(low), float(high)


def _picks(shape: tuple[int, ...], seed: int) -> Iterator[Callable[[Means], Means]]:
    concepts, prompts = shape
    rng = np.random.default_rng(seed)
    for _ in range(0, RESAMPLES, CHUNK):
        rows = rng.integers(concepts, size=(CHUNK, concepts, 1))
        columns = rng.integers(prompts, size=(CHUNK, concepts, prompts))
        yield lambda values_CP, rows=rows, columns=columns: values_CP[rows, columns].mean(axis=(1, 2))  # type: ignore[misc]
