"""Classifier-free guidance."""

from __future__ import annotations

from torch import Tensor


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Moves the prediction away from what the model says without the prompt (arXiv 2207.12598, equation 6).

    Written as u + s (c - u): s = 1 is the conditional prediction, s = 1 + w in the paper's letters.
    """
    return unconditional + scale * (conditional - unconditional)
