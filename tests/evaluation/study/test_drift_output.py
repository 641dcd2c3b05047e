from __future__ import annotations

import numpy as np

from cdvideo.base.loader import Base
from cdvideo.concept.adapters import make_adapter
from cdvideo.concept.config import ConceptConfig
from cdvideo.concept.trainer import new_concept
from cdvideo.evaluation.study.drift_output import before_and_after, draw_class


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
