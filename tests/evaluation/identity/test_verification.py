from __future__ import annotations

import numpy as np
import pytest

from cdvideo.evaluation.identity.verification import Sightings, area_under_curve, equal_error_rate, verify


def test_area_is_the_share_of_pairs_in_order() -> None:
    same, other = np.array([0.9, 0.5, 0.5]), np.array([0.5, 0.1])
    # 0.9 over both; each 0.5 ties with one and is over the other
    assert area_under_curve(same, other) == pytest.approx((2 + 1.5 + 1.5) / 6)
    assert area_under_curve(other, same) == pytest.approx(1 - 5 / 6)


def test_equal_error_rate_by_hand() -> None:
    same, other = np.array([0.2, 0.6, 0.7, 0.8]), np.array([0.1, 0.3, 0.4, 0.65])
    assert equal_error_rate(same, other) == pytest.approx(0.25)  # between 0.4 and 0.6 one of four on either side
    assert equal_error_rate(same + 1, other) == 0
    assert equal_error_rate(other, same + 1) == 1


def sightings() -> Sightings:
    """Two views each of a dog, its look-alike, another dog and a cat."""
    features_MD = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8], [0.6, 0.8], [0, 1], [0, 1], [-1, 0], [-1, 0]], dtype=float)
    subject_M = np.array(["dog"] * 6 + ["cat"] * 2)
    member_M = np.array([0, 0, 1, 1, 2, 2, 4, 4])
    return Sightings(features_MD, member_M, np.tile([0, 1], 4), subject_M)


def test_each_kind_of_pair_is_counted_apart() -> None:
    everyone = sightings()
    facts = verify(everyone.of(everyone.member_M == 0), everyone)
    assert facts["same"] == {"cosine": 0.8, "n": 2}  # the same view of the same dog is left out
    assert facts["look_alike"]["n"] == facts["same_class"]["n"] == facts["other_class"]["n"] == 4
    assert facts["look_alike"]["cosine"] == pytest.approx((0.6 + 0.96) / 2)
    assert facts["look_alike"]["auc"] == 0.5
    assert facts["same_class"]["cosine"] == pytest.approx(0.3)
    assert facts["other_class"]["equal_error_rate"] == 0


def test_a_kind_without_pairs_is_left_out() -> None:
    everyone = sightings()
    dogs = everyone.of(everyone.member_M < 2)
    assert set(verify(dogs, dogs)) == {"same", "look_alike"}
