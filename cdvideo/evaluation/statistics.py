"""Intervals, calibration error: how sure a measured figure is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959964  # of the standard normal
RESAMPLES = 10_000


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion: Wilson's score interval (E. B. Wilson, JASA 22, 1927).

    It is asymmetric near 0 and 1, and does not shrink to a point when all or none succeed.
    """
    assert 0 <= successes <= n and n > 0, f"{successes} of {n}"
    share, z2 = successes / n, Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_mean(values: Sequence[float] | NDArray[np.floating], *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of a mean: percentile bootstrap over 10,000 resamples (Efron, Ann. Statist. 7, 1979)."""
    return bootstrap_ratio(values, np.ones(len(values)), seed=seed)


def bootstrap_ratio(
    above: Sequence[float] | NDArray[np.floating], below: Sequence[float] | NDArray[np.floating], *, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of mean(above) / mean(below), pairs resampled together: percentile bootstrap."""
    a, b = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    assert a.shape == b.shape and a.ndim == 1 and len(a) > 0, f"{a.shape} and {b.shape}"
    rng = np.random.default_rng(seed)
    ratios = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, 500):
        picks = rng.integers(len(a), size=(500, len(a)))
        ratios[start : start + 500] = a[picks].mean(axis=1) / b[picks].mean(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def calibration_error(confidence: NDArray[np.floating], right: NDArray[np.bool_], *, bins: int = 15) -> float:
    """Expected calibration error: over equal bins, sum n_bin / n |accuracy - confidence| (arXiv 1706.04599, eq. 3)."""
    assert confidence.shape == right.shape and len(right) > 0
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    error = 0.0
    for b in range(bins):
        inside = index == b
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return float(error)
