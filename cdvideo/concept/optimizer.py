"""What moves a concept's weights: torch's AdamW, or bitsandbytes' with its state in 8 bits; and memory for time."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from cdvideo.concept.config import OptimConfig
from cdvideo.errors import UserError


def check_optimizer(optim: OptimConfig, device: torch.device) -> None:
    """Raises UserError where this machine lacks what the optimizer needs."""
    if optim.optimizer == "adamw8bit" and device.type != "cuda":
        raise UserError(
            f"optim.optimizer=adamw8bit on {device.type}",
            allowed="adamw8bit on CUDA, for which bitsandbytes is made; adamw everywhere",
            do="set optim.optimizer=adamw, or choose a GPU with --device cuda",
        )
    if optim.optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "optim.optimizer=adamw8bit needs the package bitsandbytes, which is not installed",
            allowed="adamw8bit with bitsandbytes, or adamw",
            do="pip install bitsandbytes, or set optim.optimizer=adamw",
        )


def make_optimizer(weights: Sequence[Tensor], rows: Sequence[Tensor], optim: OptimConfig) -> torch.optim.Optimizer:
    """One group for the UNet's weights and one for the token's rows, which are never decayed.

    AdamW (arXiv 1711.05101) keeps two float32 moments of every weight; `adamw8bit` (arXiv 2110.02861) keeps them in 8
    bits with a scale for every 256, except of tensors below 4,096 numbers, such as the rows.
    """
    groups = [
        {"params": weights, "initial_lr": optim.lr, "weight_decay": optim.weight_decay},
        {"params": rows, "initial_lr": optim.token_lr, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(groups)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups)


@contextmanager
def checkpointing(unet: UNet2DConditionModel, enabled: bool) -> Iterator[None]:
    """Within the block the UNet recomputes its activations in the backward pass, where that is asked for; then it is as
    it was before."""
    switched = enabled and not unet.is_gradient_checkpointing
    if switched:
        unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if switched:
            unet.disable_gradient_checkpointing()
