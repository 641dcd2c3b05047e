from __future__ import annotations

import numpy as np
import pytest

from cdvideo.evaluation.statistics import bootstrap_mean, bootstrap_ratio, calibration_error, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_of_all_mirrors_wilson_of_none() -> None:
    low, high = wilson(20, 20)
    assert (1 - high, 1 - low) == pytest.approx(wilson(0, 20))


def test_bootstrap_of_a_mean_comes_near_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(5, 2, 400)
    half = 1.96 * values.std() / 20
    assert bootstrap_mean(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_bootstrap_of_one_value_is_a_point() -> None:
    assert bootstrap_mean([3.0, 3.0, 3.0]) == (3.0, 3.0)


def test_bootstrap_of_a_ratio_keeps_the_pairs() -> None:
    below = np.random.default_rng(3).uniform(1, 9, 50)
    assert bootstrap_ratio(0.5 * below, below) == pytest.approx((0.5, 0.5))


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.95, 0.95, 0.55, 0.55])
    right = np.array([True, True, True, False])
    # two bins that matter: |1 - 0.95| * 0.5 + |0.5 - 0.55| * 0.5
    assert calibration_error(confidence, right, bins=10) == pytest.approx(0.05)


def test_calibration_error_of_full_confidence_that_is_wrong() -> None:
    assert calibration_error(np.ones(4), np.zeros(4, dtype=bool)) == 1.0
