"""Folding Wan's rows of zeros into one changes nothing."""

from __future__ import annotations

import math

import torch
from diffusers import WanTransformer3DModel

from cdvideo.models.wan.text import FoldedPadding, FoldedTextAttention, cut_states, fold_padding


@torch.no_grad()
def test_one_row_with_a_raised_score_acts_as_all_rows_of_zeros() -> None:
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=6,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=16,
    ).eval()  # fmt: skip
    latents, time = torch.randn(2, 4, 2, 4, 4), torch.tensor([900.0, 100.0])
    states, mask = torch.randn(2, 7, 6), torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
    all_rows = torch.zeros(2, 512, 6)
    all_rows[:, :7] = cut_states(states, mask)
    expected = transformer(latents, time, all_rows).sample

    folded = FoldedPadding()
    for block in transformer.blocks:
        block.attn2.set_processor(FoldedTextAttention(folded))
    text, folded.bias_B11R = fold_padding(states, mask)
    assert text.shape == (2, 8, 6)
    assert torch.allclose(folded.bias_B11R[1, 0, 0, :4], torch.tensor([math.log(509), 0, 0, 0]))
    assert folded.bias_B11R[1, 0, 0, 4:].tolist() == [-math.inf] * 4
    assert torch.allclose(transformer(latents, time, text).sample, expected, atol=1e-5)
    folded.bias_B11R = None  # one row of zeros as one row: another softmax
    assert not torch.allclose(transformer(latents, time, text).sample, expected, atol=1e-3)
