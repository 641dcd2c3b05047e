"""Prompts compiled once into what the UNet reads from them: K and V of every cross-attention.

Text does not depend on the step, the frame or the pixel, and a concept of token, K and V changes only how text is read.
So prompt and concept together become a few small tensors before sampling starts, and the UNet that samples is the
pristine one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from cdvideo.attention import attend
from cdvideo.base.loader import Base
from cdvideo.base.offload import at_work
from cdvideo.base.prompts import encode_prompts, picture_sizes
from cdvideo.concept.adapters import tuned, tuned_text
from cdvideo.concept.concept import Concept


@dataclass(frozen=True)
class PromptKV:
    """B compiled prompts: for each cross-attention, by its name in the UNet, keys_BNLE and values_BNLE.

    N are the heads and E the channels of a head. All frames of a film read the same copy. added: what SDXL's UNet reads
    beside them, its `added_cond_kwargs`; None for other bases.
    """

    layers: Mapping[str, tuple[Tensor, Tensor]]
    added: Mapping[str, Tensor] | None = None

    def half(self, index: int) -> PromptKV:
        """The first or the second half of the prompts: with guidance, the negative prompts and the prompts."""
        layers = {name: (keys.chunk(2)[index], values.chunk(2)[index]) for name, (keys, values) in self.layers.items()}
        added = None if self.added is None else {name: each.chunk(2)[index] for name, each in self.added.items()}
        return PromptKV(layers, added)


@torch.inference_mode()
def compile_prompts(
    base: Base, prompts: Sequence[str], *, concept: Concept | None = None, size: tuple[int, int] | None = None
) -> PromptKV:
    """Encodes B prompts with the concept's token rows, and reads them with the concept's K and V.

    The base is as before when this returns. A concept of token, K and V is wholly in what is returned; one that has
    tuned more of the UNet also needs `tuned` around the sampling.

    Args:
        size: height and width of the pictures to come, in pixels, which SDXL reads; None is the base's own resolution.
    """
    with at_work(base.device, *base.text_encoders.values()), tuned_text(base, concept):
        text = encode_prompts(base, prompts, rows=None if concept is None else concept.tokens)
    with at_work(base.device, base.unet), tuned(base.unet, concept):
        layers = read_text(base.unet, text.hidden_BLD).layers
    return PromptKV(layers, text.added(picture_sizes(*(size or (base.resolution, base.resolution)))))


def read_text(unet: UNet2DConditionModel, text_BLD: Tensor) -> PromptKV:
    """K and V of encoded prompts in every cross-attention, with whatever adapter is attached to the UNet now."""
    layers = {}
    for name, attention in cross_attentions(unet).items():
        keys_BLC, values_BLC = attention.to_k(text_BLD), attention.to_v(text_BLD)
        layers[name] = (_split_heads(keys_BLC, attention.heads), _split_heads(values_BLC, attention.heads))
    return PromptKV(layers)


@contextmanager
def reading(unet: UNet2DConditionModel, prompt: PromptKV) -> Iterator[None]:
    """Within the block, the UNet's cross-attentions read the compiled prompt, whatever text they are called with.

    In a UNet batch of B * F pictures, F in a row read the same prompt. On leaving, the former processors are back.
    """
    attentions = cross_attentions(unet)
    assert attentions.keys() == prompt.layers.keys(), "the prompt was compiled for another UNet"
    former = {name: attention.processor for name, attention in attentions.items()}
    try:
        for name, attention in attentions.items():
            attention.set_processor(CompiledCrossAttention(*prompt.layers[name]))
        yield
    finally:
        for name, attention in attentions.items():
            attention.set_processor(former[name])


@contextmanager
def reading_half(index: int) -> Iterator[None]:
    """Within the block, this thread reads only the first or the second half of whatever compiled prompts are read."""
    _THREAD.half = index
    try:
        yield
    finally:
        del _THREAD.half


_THREAD = threading.local()


class CompiledCrossAttention:
    """diffusers' attention processor for a cross-attention whose K and V are known already.

    Frames are folded into the query length: they share K and V and attend independently of each other, so this is
    exact, and K and V are never repeated.
    """

    def __init__(self, keys_BNLE: Tensor, values_BNLE: Tensor) -> None:
        self._text = (keys_BNLE, values_BNLE)

    @property
    def text(self) -> tuple[Tensor, Tensor]:
        """keys_BNLE and values_BNLE that this thread reads."""
        half = getattr(_THREAD, "half", None)
        if half is None:
            return self._text
        keys_BNLE, values_BNLE = (each.chunk(2)[half] for each in self._text)
        return keys_BNLE, values_BNLE

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        keys_BNLE, values_BNLE = self.text
        films = len(keys_BNLE)
        query_BNQE = _split_heads(attn.to_q(hidden_states).unflatten(0, (films, -1)).flatten(1, 2), attn.heads)
        read_BNQE = attend(query_BNQE, keys_BNLE, values_BNLE)
        return attn.to_out[0](read_BNQE.transpose(1, 2).reshape(hidden_states.shape))


def cross_attentions(unet: UNet2DConditionModel) -> dict[str, Any]:
    """The UNet's attentions to text, by name."""
    found = {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, Attention) and module.is_cross_attention
    }
    for name, attention in found.items():
        extras = ("norm_cross", "group_norm", "spatial_norm", "norm_q", "norm_k")
        assert all(getattr(attention, extra, None) is None for extra in extras), f"{name} normalises what it reads"
        assert not attention.residual_connection and attention.rescale_output_factor == 1.0, name
    return found


def _split_heads(tensor_BLC: Tensor, heads: int) -> Tensor:
    return tensor_BLC.unflatten(-1, (heads, -1)).transpose(1, 2)
