"""Semantic drift, measured in text space: does the concept's phrase still stand among the phrases of its class?

ClassDiffusion (arXiv 2405.17532), section 3: tuning moves "a sks dog" out of the cluster of dog phrases, and with
it goes what the base knew to do with dogs. Measured here on phrases that no loss ever sees.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.concept.config import ConceptConfig
from cdvideo.concept.phrases import HELD_OUT_PHRASES, fill
from cdvideo.concept.semantic import phrase_features


class DriftMeter:
    """Mean cosine of phrases to the centre of the class's cluster, over held-out phrases.

    Attributes:
        class_cosine: The same for the class's own phrases: where a concept that has not drifted stands.
    """

    def __init__(self, base: Base, config: ConceptConfig) -> None:
        self.base, self.config = base, config
        with torch.no_grad():
            features_TD = phrase_features(base, [fill(t, config.class_word) for t in HELD_OUT_PHRASES])
        self.centre_D = F.normalize(features_TD, dim=-1).mean(dim=0)
        self.class_cosine = self._cosine(features_TD)

    @torch.no_grad()
    def __call__(self, rows_KD: Tensor) -> float:
        """The concept's mean cosine to the centre of its class, in [-1, 1]."""
        phrases = [fill(t, self.config.phrase) for t in HELD_OUT_PHRASES]
        return self._cosine(phrase_features(self.base, phrases, {self.config.token: rows_KD}))

    def _cosine(self, features_TD: Tensor) -> float:
        return F.cosine_similarity(features_TD, self.centre_D, dim=-1).mean().item()
