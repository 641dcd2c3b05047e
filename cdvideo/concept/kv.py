"""The K/V adapter: how a concept changes what the UNet's cross-attentions read from the text.

Custom Diffusion (Kumari et al., arXiv 2212.04488, section 3.2) tunes the K and V projections of every cross-attention.
Here their change is a tensor of its own, added to the projection's output while the adapter is attached. The UNet's
parameters are never written, so a change of zero leaves its output bit-equal, and detaching is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from cdvideo.base.loader import Base


def kv_projections(unet: UNet2DConditionModel) -> dict[str, nn.Linear]:
    """The K and V projections of every cross-attention, by the name of their change: `unet.<path>.attn2.to_k.delta`."""
    return {
        f"unet.{path}.delta": module
        for path, module in unet.named_modules()
        if path.endswith((".attn2.to_k", ".attn2.to_v")) and isinstance(module, nn.Linear)
    }


def zero_deltas(unet: UNet2DConditionModel, *, keys: bool = True) -> dict[str, Tensor]:
    """Trainable changes for all K and V of this UNet, all zero, in float32 (small changes drown in less).

    Args:
        keys: False locks K to the base's, so that only V learns, and where words attend stays the base's matter.
            Perfusion (arXiv 2305.01644, section 3.2), simplified: there K of the concept's token is locked to that of
            its class word, and V's change is of rank one and gated; here all words share one change.
    """
    return {
        name: torch.zeros_like(linear.weight, dtype=torch.float32).requires_grad_()
        for name, linear in kv_projections(unet).items()
        if keys or not name.endswith(".to_k.delta")
    }


@contextmanager
def attached(unet: UNet2DConditionModel, deltas: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block, every K or V projection W acts as W + delta. Gradients reach the deltas alone.

    The first token is the same in all prompts and draws much of the attention. No gradient passes through it, so that
    the pictures are learned by the words that name them (as in Custom Diffusion's released code).

    Args:
        unet: Its cross-attentions are hooked for the length of the block.
        deltas: Changes by name, as `kv_projections` names them; any device and precision.
    """
    projections = kv_projections(unet)
    assert deltas.keys() <= projections.keys(), f"no such projections: {deltas.keys() - projections.keys()}"
    handles = [projections[name].register_forward_hook(_adding(delta)) for name, delta in deltas.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(delta: Tensor) -> Any:
    def add(_: nn.Module, inputs: tuple[Tensor, ...], output_BLC: Tensor) -> Tensor:
        (text_BLD,) = inputs
        change_BLC = F.linear(text_BLD, delta.to(text_BLD))
        return output_BLC + torch.cat([change_BLC[:, :1].detach(), change_BLC[:, 1:]], dim=1)

    return add


def initial_rows(base: Base, words: str, num_rows: int) -> Tensor:
    """Trainable input rows of a concept's token: the mean embedding of some words, in float32.

    Args:
        words: Where the token starts in text space, usually the class word.
        num_rows: K; all rows start equal, and differ from the first step on by their positions.

    Returns:
        rows_KD.
    """
    mean_D = torch.cat([each_LD.mean(dim=0) for each_LD in _embeddings(base, words)])
    return mean_D.repeat(num_rows, 1).requires_grad_()


def embedding_norms(base: Base, words: str) -> list[float]:
    """The mean norm of the embeddings of some words, in each of the base's text encoders."""
    return [each_LD.norm(dim=-1).mean().item() for each_LD in _embeddings(base, words)]


def _embeddings(base: Base, words: str) -> list[Tensor]:
    """Of some words in each of the base's text encoders."""
    ids = base.tokenizer(words, add_special_tokens=False).input_ids
    assert ids, f"no tokens in {words!r}"
    return [encoder.get_input_embeddings().weight[ids].detach().float() for encoder in base.text_encoders.values()]
