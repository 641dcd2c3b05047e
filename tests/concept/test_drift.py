from __future__ import annotations

import torch

from cdvideo.base.loader import Base
from cdvideo.concept.config import ConceptConfig
from cdvideo.concept.drift import DriftMeter
from cdvideo.concept.kv import initial_rows
from cdvideo.concept.phrases import HELD_OUT_PHRASES, fill
from cdvideo.concept.semantic import phrase_features


def test_the_class_itself_is_the_yardstick(tiny_base: Base, config: ConceptConfig) -> None:
    meter = DriftMeter(tiny_base, config)
    features_TD = phrase_features(tiny_base, [fill(t, "dog") for t in HELD_OUT_PHRASES])
    centre_D = (features_TD / features_TD.norm(dim=1, keepdim=True)).mean(dim=0)
    by_hand = (features_TD @ centre_D) / features_TD.norm(dim=1) / centre_D.norm()
    assert abs(meter.class_cosine - by_hand.mean().item()) < 1e-5


def test_a_token_far_from_the_class_stands_further_off(tiny_base: Base, config: ConceptConfig) -> None:
    meter = DriftMeter(tiny_base, config)
    near = initial_rows(tiny_base.text_encoder, tiny_base.tokenizer, "dog", 1)
    far = 5 * torch.randn(1, 32)
    assert -1 <= meter(far) < meter(near) <= 1
    assert not meter.centre_D.requires_grad
