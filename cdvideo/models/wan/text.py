"""What Wan reads of a prompt: UMT5's states cut at the last token and filled up with rows of zeros, without a mask.

A row of zeros becomes one constant vector behind the text projection, so the 490 or so rows behind a short prompt have
one key and one value. ``softmax`` over n equal keys is that of one key whose score is raised by log n; so the rows can
be folded into one (`fold_padding`), exactly.
"""

from __future__ import annotations

import math

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor

TEXT_ROWS = 512  # rows that the transformer is trained on, zeros included


def cut_states(states_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Return the states with those behind the last token set to zero."""
    return states_BLD * mask_BL[..., None].to(states_BLD.dtype)


def fold_padding(states_BLD: Tensor, mask_BL: Tensor, *, rows: int = TEXT_ROWS) -> tuple[Tensor, Tensor]:
    """Return the states with one row of zeros in front for all of the padding, and the scores to add for each row.

    Args:
        states_BLD: text states, of prompts of at most L < ``rows`` tokens.
        mask_BL: 1 where a token stands.

    Returns:
        text_BRD with R = L + 1 rows, and bias_B11R: log(rows - tokens) for row 0, 0 for tokens, -inf behind them.
    """
    batch, length, width = states_BLD.shape
    assert length < rows, (length, rows)
    text_BRD = torch.cat([states_BLD.new_zeros(batch, 1, width), cut_states(states_BLD, mask_BL)], dim=1)
    padding_B1 = torch.log(rows - mask_BL.sum(1, keepdim=True).float())
    tokens_BL = torch.zeros_like(mask_BL, dtype=torch.float32).masked_fill(mask_BL == 0, -math.inf)
    return text_BRD, torch.cat([padding_B1, tokens_BL], dim=1)[:, None, None]


class FoldedPadding:
    """The scores that all cross-attention layers of one transformer add: set anew for every batch of prompts."""

    def __init__(self) -> None:
        self.bias_B11R: Tensor | None = None


class FoldedTextAttention(WanAttnProcessor):
    """diffusers' attention of Wan, with the scores of folded padding added."""

    def __init__(self, folded: FoldedPadding) -> None:
        super().__init__()
        self.folded = folded

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        bias = self.folded.bias_B11R
        mask = attention_mask if bias is None else bias.to(hidden_states.dtype)
        return super().__call__(attn, hidden_states, encoder_hidden_states, mask, rotary_emb)
