from __future__ import annotations

import math

import numpy as np
import pytest

from cdvideo.evaluation.metrics import class_margins, copying, dis_flow, flow_magnitude, psnr, subject_consistency


def test_psnr_by_hand() -> None:
    images_BHWC = np.full((2, 4, 4, 3), 100, dtype=np.uint8)
    again_BHWC = images_BHWC.copy()
    again_BHWC[0] += 10  # mean squared error 100
    again_BHWC[1, 0] += 20  # a quarter of the pixels: 100 too
    assert psnr(images_BHWC, again_BHWC) == pytest.approx(20 * math.log10(255 / 10))


def test_psnr_does_not_wrap_around() -> None:
    dark, light = np.zeros((1, 2, 2, 3), dtype=np.uint8), np.full((1, 2, 2, 3), 255, dtype=np.uint8)
    assert psnr(dark, light)[0] == pytest.approx(0)
    assert psnr(light, dark)[0] == pytest.approx(0)


def test_subject_consistency_by_hand() -> None:
    # cos(1,0) = 0.6; cos(2,1) = 0.8, cos(2,0) = 0: ((0.6 + 0.6) / 2 + (0.8 + 0) / 2) / 2
    features_FD = np.array([[2.0, 0.0], [0.6, 0.8], [0.0, 5.0]])
    assert subject_consistency(features_FD) == pytest.approx(0.5)


def test_subject_consistency_counts_no_negative_cosine() -> None:
    features_FD = np.array([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    # frame 1: (0 + 0) / 2; frame 2: (0 + 1) / 2
    assert subject_consistency(features_FD) == pytest.approx(0.25)


def test_a_still_film_is_wholly_consistent() -> None:
    assert subject_consistency(np.tile([[0.3, 0.4]], (5, 1))) == pytest.approx(1)


def test_flow_magnitude_is_the_mean_over_pixels_and_pairs() -> None:
    frames_FHWC = np.stack([np.full((4, 4, 3), value, dtype=np.uint8) for value in (10, 20, 40)])

    def flow(before, after):  # type: ignore[no-untyped-def]
        step = (after.astype(float) - before).mean()
        return np.broadcast_to(np.array([3.0, 4.0]) * step, (4, 4, 2))

    assert flow_magnitude(frames_FHWC, flow) == pytest.approx((50 + 100) / 2)


def test_dis_flow_finds_a_shift() -> None:
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 255, (17, 17))
    picture = np.kron(coarse, np.ones((8, 8)))
    for axis in (0, 1):  # soft, as pictures are
        picture = np.mean([np.roll(picture, shift, axis) for shift in range(-4, 5)], axis=0)
    picture = picture.astype(np.uint8)
    frames_FHW = [picture[4:132, 4 + 2 * f : 4 + 2 * f + 112] for f in range(3)]
    frames_FHWC = np.repeat(np.stack(frames_FHW)[..., None], 3, axis=-1)
    assert flow_magnitude(frames_FHWC, dis_flow()) == pytest.approx(2, abs=0.25)
    assert flow_magnitude(frames_FHWC[[0, 0]], dis_flow()) == pytest.approx(0, abs=0.02)


def test_class_margins_by_hand() -> None:
    north, east = np.array([0.0, 1.0]), np.array([1.0, 0.0])
    first = np.stack([north, 2 * north, 3 * north])
    second = np.stack([east, np.array([0.6, 0.8])])
    within, nearest = class_margins([first, second])
    assert within == pytest.approx([1.0, 0.6])
    assert nearest == pytest.approx([0.4, 0.4])  # (0 + 0.8) / 2


def test_nearest_of_opposite_classes_is_negative() -> None:
    up = np.array([[0.0, 1.0], [0.0, 1.0]])
    within, nearest = class_margins([up, -up])
    assert within == pytest.approx([1, 1])
    assert nearest == pytest.approx([-1, -1])


def test_a_copy_is_nearer_to_a_picture_than_the_pictures_are_to_each_other() -> None:
    references_RD = np.array([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8]])
    # each one's nearest: 0.8 to the second, 0.96 to the third, 0.96 to the second
    level = (0.8 + 0.96 + 0.96) / 3
    drawn_BD = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert np.allclose(copying(drawn_BD, references_RD), np.array([1.0, 0.8, -0.6]) - level)
