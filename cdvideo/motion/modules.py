"""Temporal transformers after AnimateDiff (arXiv 2307.04725, section 4.2), keyed as in diffusers' MotionAdapter."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from cdvideo.attention import attend
from cdvideo.motion.config import MotionConfig, NormMode


def position_table(max_frames: int, channels: int) -> Tensor:
    """Sinusoidal positions (arXiv 1706.03762, section 3.5).

    Returns:
        positions_1FC: float32, sine in the even and cosine in the odd channels.
    """
    frequencies = torch.exp(torch.arange(0, channels, 2) * (-math.log(10000.0) / channels))
    angles = torch.arange(max_frames).unsqueeze(1) * frequencies
    table = torch.zeros(1, max_frames, channels)
    table[0, :, 0::2] = torch.sin(angles)
    table[0, :, 1::2] = torch.cos(angles)
    return table


class FramePositions(nn.Module):
    """Adds each frame's position; the table is stored with the weights, as the checkpoints have it."""

    pe: Tensor

    def __init__(self, channels: int, max_frames: int) -> None:
        super().__init__()
        self.register_buffer("pe", position_table(max_frames, channels))

    def forward(self, tokens_PFC: Tensor) -> Tensor:
        return tokens_PFC + self.pe[:, : tokens_PFC.shape[1]]


class FrameAttention(nn.Module):
    """Multi-head self-attention of one pixel over its frames. P = pixels of all films in the batch."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, tokens_PFC: Tensor) -> Tensor:
        q, k, v = (
            project(tokens_PFC).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        mixed_PFC = attend(q, k, v).transpose(1, 2).flatten(-2)
        return self.to_out(mixed_PFC)


class GEGLU(nn.Module):
    """Gated GELU (arXiv 2002.05202, equation 6)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        value, gate = self.proj(tokens).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Widens four times, gates, narrows. The empty place in the middle is the dropout's in the checkpoints' keys."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)


class TemporalBlock(nn.Module):
    """Two self-attentions over frames, positions added before each, then a feed-forward; pre-norm and residual."""

    def __init__(self, channels: int, heads: int, max_frames: int) -> None:
        super().__init__()
        self.pos_embed = FramePositions(channels, max_frames)
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = FrameAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = FrameAttention(channels, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, tokens_PFC: Tensor) -> Tensor:
        tokens_PFC = self.attn1(self.pos_embed(self.norm1(tokens_PFC))) + tokens_PFC
        tokens_PFC = self.attn2(self.pos_embed(self.norm2(tokens_PFC))) + tokens_PFC
        return self.ff(self.norm3(tokens_PFC)) + tokens_PFC


class TemporalTransformer(nn.Module):
    """One motion module: lets every pixel look along time, and starts as the identity (zero proj_out)."""

    def __init__(
        self, channels: int, *, heads: int, layers: int, groups: int, max_frames: int, norm_mode: NormMode
    ) -> None:
        super().__init__()
        self.norm_mode = norm_mode
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(TemporalBlock(channels, heads, max_frames) for _ in range(layers))
        self.proj_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, hidden_NCHW: Tensor, num_frames: int) -> Tensor:
        """N = B * F: the frames of film 0, then those of film 1, ..."""
        _, channels, height, width = hidden_NCHW.shape
        if self.norm_mode == "original":
            normed_BFCHW = self.norm(hidden_NCHW).unflatten(0, (-1, num_frames))
        else:
            normed_BFCHW = self.norm(hidden_NCHW.unflatten(0, (-1, num_frames)).transpose(1, 2)).transpose(1, 2)
        tokens_PFC = self.proj_in(normed_BFCHW.permute(0, 3, 4, 1, 2).reshape(-1, num_frames, channels))
        for block in self.transformer_blocks:
            tokens_PFC = block(tokens_PFC)
        moved_BHWFC = self.proj_out(tokens_PFC).unflatten(0, (-1, height, width))
        # The residual comes first: the sum then keeps its memory layout, and no copy is needed to bring frames back.
        return (hidden_NCHW.unflatten(0, (-1, num_frames)) + moved_BHWFC.permute(0, 3, 4, 1, 2)).flatten(0, 1)


class MotionBlock(nn.Module):
    """The motion modules of one UNet block: one after each (resnet, attention) pair."""

    def __init__(self, channels: int, *, layers: tuple[int, ...], **options: Any) -> None:
        super().__init__()
        self.motion_modules = nn.ModuleList(TemporalTransformer(channels, layers=n, **options) for n in layers)


class MotionModules(nn.Module):
    """All motion modules of a UNet. `state_dict()` has the very keys and shapes of diffusers' MotionAdapter.

    Only weights live here; `VideoUNet` walks them together with the image UNet's blocks.
    """

    gradient_checkpointing = False  # VideoUNet then keeps no layer's activations for the backward pass

    def __init__(self, config: MotionConfig) -> None:
        super().__init__()
        self.config = config
        blocks = list(
            zip(
                config.block_out_channels,
                config.heads_per_block,
                config.layers_per_block,
                config.transformer_layers_per_block,
                strict=True,
            )
        )
        options: dict[str, Any] = {
            "groups": config.motion_norm_num_groups,
            "max_frames": config.motion_max_seq_length,
            "norm_mode": config.norm_mode,
        }
        self.down_blocks = nn.ModuleList(
            MotionBlock(channels, heads=heads, layers=(depth,) * count, **options)
            for channels, heads, count, depth in blocks
        )
        channels, heads, _, _ = blocks[-1]
        self.mid_block = (
            MotionBlock(channels, heads=heads, layers=config.transformer_layers_per_mid_block, **options)
            if config.use_motion_mid_block
            else None
        )
        self.up_blocks = nn.ModuleList(
            MotionBlock(channels, heads=heads, layers=(depth,) * (count + 1), **options)
            for channels, heads, count, depth in reversed(blocks)
        )

    @classmethod
    def for_unet(cls, unet: UNet2DConditionModel, **options: Any) -> MotionModules:
        """Fresh motion modules for `unet` that change nothing yet; `options` are fields of MotionConfig."""
        return cls(MotionConfig.for_unet(unet, **options))

    @property
    def max_frames(self) -> int:
        """Rows of the position table: the longest film that these modules can make at once."""
        return self.config.motion_max_seq_length
