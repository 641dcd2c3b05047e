from __future__ import annotations

import numpy as np
import pytest

from cdvideo.base.loader import Base
from cdvideo.concept.adapters import make_adapter
from cdvideo.concept.config import ConceptConfig
from cdvideo.concept.trainer import new_concept
from cdvideo.evaluation.study.drift_output import before_and_after, class_pull, draw_class


def test_pull_is_the_gain_in_cosine() -> None:
    before_BD, after_BD = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[0.0, 3.0], [0.0, 1.0]])
    figure = class_pull(before_BD, after_BD, np.array([[0.0, 4.0]]), encoder="two numbers")
    assert figure.value == pytest.approx(0.5)  # 1 for the first, nothing for the second
    assert figure.n == 2 and "two numbers" in figure.of
    assert figure.interval is not None and figure.interval[0] <= 0.5 <= figure.interval[1]


def test_a_class_left_alone_is_not_pulled() -> None:
    features_BD = np.random.default_rng(0).normal(size=(5, 8))
    assert class_pull(features_BD, features_BD, features_BD[:2], encoder="noise").value == 0


def test_class_samples_have_the_same_noise(tiny_base: Base) -> None:
    config = ConceptConfig()
    adapter = make_adapter(tiny_base.unet, config.adapter, seed=0)
    concept = new_concept(tiny_base, config, adapter)
    before, without_effect = (draw_class(tiny_base, "dog", [3, 4, 5], concept=c, steps=2) for c in (None, concept))
    assert before.shape == (3, 64, 64, 3) and before.dtype == np.uint8
    assert np.array_equal(before, without_effect)
    assert np.array_equal(draw_class(tiny_base, "dog", [3, 4, 5], concept=None, steps=2, batch=2), before)

    for delta in adapter.weights.values():
        delta.data.normal_(std=0.5)
    after = draw_class(tiny_base, "dog", [3, 4, 5], concept=concept, steps=2)
    assert not np.array_equal(before, after)
    sheet = before_and_after(before, after, [3, 4, 5], title="a dog")
    assert sheet.width == 3 * 128 and sheet.height > 2 * 128
