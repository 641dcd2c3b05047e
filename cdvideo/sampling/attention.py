"""A whole UNet's attention by one backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from cdvideo.attention import BackendName, attend, attention_backend
from cdvideo.base.loader import Base


@contextmanager
def attending(base: Base, backend: BackendName) -> Iterator[None]:
    """Within the block, attention to pixels, to text and over frames is computed by the backend.

    Raises:
        UserError: the backend can not run on the base's device in its dtype.
    """
    with attention_backend(backend, base.device, base.dtype):
        if backend != "xformers":  # diffusers' own processors call torch's function, which has been told
            yield
            return
        attentions = self_attentions(base.unet)
        former = [attention.processor for attention in attentions]
        try:
            for attention in attentions:
                attention.set_processor(SelfAttention())
            yield
        finally:
            for attention, processor in zip(attentions, former, strict=True):
                attention.set_processor(processor)


class SelfAttention:
    """diffusers' attention processor for pixels that attend to each other, by `attend`."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        assert encoder_hidden_states is None and attention_mask is None
        query, keys, values = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        read: Tensor = attn.to_out[0](attend(query, keys, values).transpose(1, 2).reshape(hidden_states.shape))
        return read


def self_attentions(unet: UNet2DConditionModel) -> list[Attention]:
    """The UNet's attentions of pixels to each other."""
    found = [m for m in unet.modules() if isinstance(m, Attention) and not m.is_cross_attention]
    for attention in found:
        extras = ("group_norm", "spatial_norm", "norm_q", "norm_k")
        assert all(getattr(attention, extra, None) is None for extra in extras)
        assert not attention.residual_connection and attention.rescale_output_factor == 1.0
    return found
