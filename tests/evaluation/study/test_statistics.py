"""Intervals over concepts and prompts."""

from __future__ import annotations

import numpy as np
import pytest

from cdvideo.evaluation.study.statistics import mean_interval, ratio_interval


def test_the_interval_holds_the_mean_and_the_spread_between_concepts() -> None:
    rng = np.random.default_rng(1)
    prompts_CP = rng.normal(0.5, 0.01, (6, 50))
    concepts_CP = prompts_CP + rng.normal(0, 0.2, (6, 1))
    low, high = mean_interval(concepts_CP)
    assert low < concepts_CP.mean() < high
    narrow = np.ptp(mean_interval(prompts_CP))
    assert high - low > 10 * narrow  # 300 values, but six concepts


def test_the_width_is_that_of_the_known_standard_error() -> None:
    concepts_CP = np.repeat(np.random.default_rng(2).normal(0, 1, (40, 1)), 5, axis=1)
    low, high = mean_interval(concepts_CP)
    expected = 2 * 1.96 * concepts_CP[:, 0].std() / np.sqrt(40)
    assert high - low == pytest.approx(expected, rel=0.1)


def test_one_concept_has_the_interval_of_its_prompts() -> None:
    low, high = mean_interval(np.random.default_rng(3).normal(0, 1, (1, 100)))
    assert high - low == pytest.approx(2 * 1.96 / 10, rel=0.2)


def test_pairs_are_resampled_together() -> None:
    below_CP = np.random.default_rng(4).uniform(0.1, 1, (5, 20))
    low, high = ratio_interval(1.2 * below_CP, below_CP)
    assert low == pytest.approx(1.2) and high == pytest.approx(1.2)
    apart_low, apart_high = ratio_interval(1.2 * below_CP[::-1], below_CP)
    assert apart_high - apart_low > 0.01


def test_the_same_seed_gives_the_same_interval() -> None:
    values_CP = np.random.default_rng(5).uniform(size=(3, 7))
    assert mean_interval(values_CP) == mean_interval(values_CP)
    assert mean_interval(values_CP) != mean_interval(values_CP, seed=1)
