"""The blocks of a UNet with motion modules as the sampler computes them: the same numbers, on channels-last pictures.

Each class reads the weights of the module that it stands for when it is called, so it owns none, and a concept that is
folded into the UNet acts through it. Modules of a kind that is not known here keep their own way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from cdvideo.motion.modules import FrameAttention, MotionModules, TemporalBlock, TemporalTransformer
from cdvideo.sampling.kernels import attend_rows, by_heads, fuses, gated, group_norm, linear, pictures, product, tokens
from cdvideo.sampling.prompt_kv import CompiledCrossAttention
from cdvideo.sampling.speed import Speed
from cdvideo.sampling.winograd import by_tiles, convolve

# Numbers between the layers of a feed-forward at once: on CPUs more leave the caches, elsewhere they take memory.
WIDE, WIDE_ELSEWHERE = 2**20, 2**27


@contextmanager
def prepared(
    unet: UNet2DConditionModel, motion: MotionModules, speed: Speed, *, table: TimeTable | None = None
) -> Iterator[None]:
    """Within the block the modules compute as the classes below do, on compiled prompts only; hooks on them still act.

    Args:
        table: for the resnets, where the steps to come are known.
    """
    fast: dict[nn.Module, Any] = {}
    for module in unet.modules():
        # Norms over whole films (AnimateDiff v1) are hooks within the resnets, which FastResnet would pass by.
        if isinstance(module, ResnetBlock2D):
            if speed.resnets and _is_plain_resnet(module) and not motion.config.joint_image_norms:
                fast[module] = FastResnet(module, table, winograd=speed.winograd)
        elif isinstance(module, Transformer2DModel):
            if speed.attentions and _is_plain_transformer(module):
                fast[module] = FastAttention(module)
        elif module is unet.conv_norm_out:
            if speed.resnets and isinstance(module, nn.GroupNorm) and not motion.config.joint_image_norms:
                fast[module] = FastNorm(module)
        elif isinstance(module, Upsample2D) and speed.upsampling and _is_plain_upsampler(module):
            fast[module] = FastUpsampler(module)
    if speed.motion:
        fast |= {module: FastMotion(module) for module in motion.modules() if isinstance(module, TemporalTransformer)}
    try:
        for module, compute in fast.items():
            module.forward = compute  # as nn.Module calls it; the class's own lies below
        with by_tiles(unet) if speed.winograd else nullcontext():  # of the convolutions that are left
            yield
    finally:
        for module in fast:
            module.__dict__.pop("forward", None)


class TimeTable:
    """What the resnets add for the time, for all steps of a film, computed at once: bias_C of their first convolution.

    A resnet adds the same numbers to every pixel of what its first convolution makes, so they join its bias.
    """

    def __init__(self, unet: UNet2DConditionModel, timesteps_T: Tensor) -> None:
        self.step: int | None = None
        sample = unet.conv_in.weight.new_empty(len(timesteps_T), 1)
        embedded_TD = unet.get_time_embed(sample=sample, timestep=timesteps_T.to(sample.device))
        time_TD = F.silu(unet.time_embedding(embedded_TD))
        self.biases_TC: dict[nn.Module, Tensor] = {
            module: module.time_emb_proj(time_TD) + module.conv1.bias
            for module in unet.modules()
            if isinstance(module, ResnetBlock2D) and _is_plain_resnet(module)
        }

    def bias(self, resnet: ResnetBlock2D) -> Tensor:
        """bias_C at the step that `step` says."""
        assert self.step is not None, "no step was set"
        return self.biases_TC[resnet][self.step]


class FastResnet:
    """ResnetBlock2D."""

    def __init__(self, resnet: ResnetBlock2D, table: TimeTable | None, *, winograd: bool) -> None:
        self.resnet, self.table = resnet, table
        self.convolve = convolve if winograd else partial(F.conv2d, padding=1)

    def __call__(self, hidden_NCHW: Tensor, time_ND: Tensor) -> Tensor:
        resnet, rows_NLC = self.resnet, tokens(hidden_NCHW)
        inner_NCHW = pictures(group_norm(rows_NLC, resnet.norm1, silu=True), hidden_NCHW)
        if self.table is not None:
            inner_NCHW = self.convolve(inner_NCHW, resnet.conv1.weight, self.table.bias(resnet))
        else:
            inner_NCHW = self.convolve(inner_NCHW, resnet.conv1.weight, resnet.conv1.bias)
            inner_NCHW += resnet.time_emb_proj(F.silu(time_ND))[:, :, None, None]
        inner_NCHW = pictures(group_norm(tokens(inner_NCHW), resnet.norm2, silu=True), inner_NCHW)
        inner_NCHW = self.convolve(inner_NCHW, resnet.conv2.weight, resnet.conv2.bias)
        if resnet.conv_shortcut is None:
            return inner_NCHW.add_(hidden_NCHW)
        return pictures(linear(rows_NLC, resnet.conv_shortcut, plus=tokens(inner_NCHW)), hidden_NCHW)


class FastNorm:
    """The group norm at the UNet's output."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        self.norm = norm

    def __call__(self, hidden_NCHW: Tensor) -> Tensor:
        return pictures(group_norm(tokens(hidden_NCHW), self.norm), hidden_NCHW)


class FastAttention:
    """Transformer2DModel on a compiled prompt."""

    def __init__(self, transformer: Transformer2DModel) -> None:
        self.transformer = transformer

    def __call__(self, hidden_NCHW: Tensor, **_text: object) -> tuple[Tensor]:
        transformer = self.transformer
        hidden_NLC = linear(group_norm(tokens(hidden_NCHW), transformer.norm), transformer.proj_in)
        for block in transformer.transformer_blocks:
            hidden_NLC = _attend_to_itself(block.attn1, block.norm1(hidden_NLC), plus=hidden_NLC)
            hidden_NLC = _attend_to_text(block.attn2, block.norm2(hidden_NLC), plus=hidden_NLC)
            hidden_NLC = _feed_forward(block.ff, block.norm3(hidden_NLC), plus=hidden_NLC)
        return (pictures(linear(hidden_NLC, transformer.proj_out, plus=tokens(hidden_NCHW)), hidden_NCHW),)


class FastMotion:
    """TemporalTransformer. The frames of a pixel lie together in memory from its entrance to its exit."""

    def __init__(self, module: TemporalTransformer) -> None:
        self.module = module

    def __call__(self, hidden_NCHW: Tensor, frames: int) -> Tensor:
        module = self.module
        rows_BFLC = tokens(hidden_NCHW).unflatten(0, (-1, frames))
        if module.norm_mode == "original":
            normed_BFLC = group_norm(rows_BFLC.flatten(0, 1), module.norm).unflatten(0, (-1, frames))
        else:
            normed_BFLC = group_norm(rows_BFLC.flatten(1, 2), module.norm).unflatten(1, (frames, -1))
        moved_PFC = linear(normed_BFLC.transpose(1, 2).flatten(0, 1), module.proj_in)
        for block in cast("Iterable[TemporalBlock]", module.transformer_blocks):
            for norm, attention in ((block.norm1, block.attn1), (block.norm2, block.attn2)):
                seen_PFC = norm(moved_PFC).add_(block.pos_embed.pe[:, :frames])
                moved_PFC = _attend_to_itself(attention, seen_PFC, plus=moved_PFC)
            moved_PFC = _feed_forward(block.ff, block.norm3(moved_PFC), plus=moved_PFC)
        moved_BLFC = linear(moved_PFC, module.proj_out).unflatten(0, (len(rows_BFLC), -1))
        return pictures((rows_BFLC + moved_BLFC.transpose(1, 2)).flatten(0, 1), hidden_NCHW)


class FastUpsampler:
    """Upsample2D: nearest neighbours, then a 3x3 convolution.

    Where pixels are doubled, each output pixel sees 2x2 different ones: the 3x3 weights that fall on the same pixel are
    added up, which gives a 2x2 kernel for each of the four places in a doubled pixel, with 4/9 of the products.
    """

    def __init__(self, upsampler: Upsample2D) -> None:
        self.upsampler = upsampler
        weight = upsampler.conv.weight.detach().float()
        first = torch.tensor(
            [[1.0, 0, 0], [0, 1, 1]], device=weight.device
        )  # rows of a 2-kernel from those of the 3-kernel
        last = torch.tensor([[1.0, 1, 0], [0, 0, 1]], device=weight.device)
        self.kernels = [
            torch.einsum("ay,bx,ocyx->ocab", down, right, weight).to(upsampler.conv.weight.dtype)
            for down in (first, last)
            for right in (first, last)
        ]

    def __call__(self, hidden_NCHW: Tensor, size: Sequence[int] | None = None) -> Tensor:
        height, width = hidden_NCHW.shape[-2:]
        if size is not None and tuple(size) != (2 * height, 2 * width):
            return type(self.upsampler).forward(self.upsampler, hidden_NCHW, size)
        padded_NHWC = F.pad(hidden_NCHW.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        made_NHWC = hidden_NCHW.new_empty(len(hidden_NCHW), 2 * height, 2 * width, self.kernels[0].shape[0])
        for place, kernel in enumerate(self.kernels):
            down, right = divmod(place, 2)
            seen_NHWC = padded_NHWC[:, down : down + height + 1, right : right + width + 1]
            made_NCHW = F.conv2d(seen_NHWC.permute(0, 3, 1, 2), kernel, self.upsampler.conv.bias)
            made_NHWC[:, down::2, right::2] = made_NCHW.permute(0, 2, 3, 1)
        return made_NHWC.permute(0, 3, 1, 2)


def _attend_to_itself(attention: Attention | FrameAttention, rows_NLC: Tensor, *, plus: Tensor) -> Tensor:
    """Pixels of a picture to each other, or frames of a pixel."""
    keys_NHTE, values_NHTE = (
        by_heads(linear(rows_NLC, layer), attention.heads) for layer in (attention.to_k, attention.to_v)
    )
    read_NLC = attend_rows(linear(rows_NLC, attention.to_q), keys_NHTE, values_NHTE)
    return linear(read_NLC, cast(nn.Linear, attention.to_out[0]), plus=plus)


def _attend_to_text(attention: Attention, rows_NLC: Tensor, *, plus: Tensor) -> Tensor:
    """All frames of a film read the same text, so they are one long row of queries."""
    compiled = attention.processor
    assert isinstance(compiled, CompiledCrossAttention), "prepared layers sample from compiled prompts"
    keys_BHTE, values_BHTE = compiled.text
    films, heads, length, _ = keys_BHTE.shape
    channels, rows = rows_NLC.shape[-1], rows_NLC.shape[:-1].numel() // films
    if fuses(rows_NLC) and heads * length <= channels + length and rows >= 4 * channels:
        return _read_short_text(attention, rows_NLC, keys_BHTE, values_BHTE, plus=plus)
    query_BQC = linear(rows_NLC, attention.to_q).unflatten(0, (films, -1)).flatten(1, 2)
    read_NLC = attend_rows(query_BQC, keys_BHTE, values_BHTE).reshape(rows_NLC.shape)
    return linear(read_NLC, attention.to_out[0], plus=plus)


def _read_short_text(
    attention: Attention, rows_NLC: Tensor, keys_BHTE: Tensor, values_BHTE: Tensor, *, plus: Tensor
) -> Tensor:
    """The same in two products for each film, which are no larger where the text of all heads is short.

    Keys join the layer that makes queries, (x Q) K = x (Q K), and values the one behind them.
    """
    films, heads, _, channels = keys_BHTE.shape
    query_HEC = attention.to_q.weight.unflatten(0, (heads, -1))
    out_HCE = attention.to_out[0].weight.unflatten(1, (heads, -1)).transpose(0, 1)
    into_BSC = torch.matmul(keys_BHTE * channels**-0.5, query_HEC).flatten(1, 2)  # S: scores of all heads
    back_BCS = torch.matmul(out_HCE, values_BHTE.transpose(2, 3)).transpose(1, 2).flatten(2)
    made = []
    for film, (part, part_plus) in enumerate(zip(rows_NLC.chunk(films), plus.chunk(films), strict=True)):
        scores = product(part, into_BSC[film], None).unflatten(-1, (heads, -1))
        shares = scores.float().softmax(-1).to(scores.dtype).flatten(-2)
        made.append(product(shares, back_BCS[film], attention.to_out[0].bias, plus=part_plus))
    return made[0] if films == 1 else torch.cat(made)


def _feed_forward(forward: Any, rows: Tensor, *, plus: Tensor) -> Tensor:
    """In as many parts as keep what lies between the two layers small: it is four times as wide."""
    parts = -(-rows.numel() * 4 // (WIDE if rows.device.type == "cpu" else WIDE_ELSEWHERE))
    made = [
        linear(gated(part, forward.net[0].proj), forward.net[2], plus=part_plus)
        for part, part_plus in zip(rows.chunk(parts), plus.chunk(parts), strict=True)
    ]
    return made[0] if parts == 1 else torch.cat(made)


def _is_plain_resnet(resnet: ResnetBlock2D) -> bool:
    return (
        resnet.time_embedding_norm == "default"
        and resnet.time_emb_proj is not None
        and resnet.output_scale_factor == 1
        and not (resnet.skip_time_act or resnet.up or resnet.down or resnet.dropout.p)
        and isinstance(resnet.nonlinearity, nn.SiLU)
        and resnet.conv1.kernel_size == resnet.conv2.kernel_size == (3, 3)
    )


def _is_plain_transformer(transformer: Transformer2DModel) -> bool:
    blocks = list(transformer.transformer_blocks)
    return transformer.is_input_continuous and all(
        isinstance(block, BasicTransformerBlock)
        and block.norm_type == "layer_norm"
        and block.pos_embed is None
        and _is_plain_attention(block.attn1)
        and isinstance(block.attn1.processor, AttnProcessor2_0)
        and block.attn2 is not None
        and block.attn2.is_cross_attention
        and _is_plain_attention(block.attn2)
        and block.attn2.to_q.bias is None
        and type(block.ff.net[0]).__name__ == "GEGLU"
        for block in blocks
    )


def _is_plain_attention(attention: Attention) -> bool:
    extras = ("norm_cross", "group_norm", "spatial_norm", "norm_q", "norm_k")
    plain = all(getattr(attention, extra, None) is None for extra in extras) and not attention.upcast_attention
    return plain and attention.scale_qk and attention.rescale_output_factor == 1 and not attention.residual_connection


def _is_plain_upsampler(upsampler: Upsample2D) -> bool:
    return upsampler.use_conv and not upsampler.use_conv_transpose and upsampler.norm is None and upsampler.interpolate
