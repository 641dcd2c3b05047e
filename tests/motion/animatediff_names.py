"""AnimateDiff's motion modules and motion LoRAs under their official names, at reduced width."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import MotionAdapter
from torch import Tensor

WIDTHS = (32, 64, 64, 64)  # Stable Diffusion 1.x has 320, 640, 1280, 1280
SHAPES: dict[str, dict[str, Any]] = {
    "v1": {"motion_max_seq_length": 24, "use_motion_mid_block": False},
    "v2": {"motion_max_seq_length": 32, "use_motion_mid_block": True},
    "v3": {"motion_max_seq_length": 32, "use_motion_mid_block": False},
    "sdxl": {"motion_max_seq_length": 32, "use_motion_mid_block": False, "block_out_channels": WIDTHS[:3]},
}


def make_adapter(version: str, *, widths: tuple[int, ...] = WIDTHS) -> MotionAdapter:
    torch.manual_seed(0)
    adapter = MotionAdapter(**{"block_out_channels": widths, "motion_num_attention_heads": 8, **SHAPES[version]})
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return adapter


def official(adapter: MotionAdapter) -> dict[str, Tensor]:
    """The adapter's weights under AnimateDiff's own names."""
    weights: dict[str, Tensor] = {}
    for key, tensor in adapter.state_dict().items():
        place, _, rest = key.partition(".motion_modules.")
        number, _, rest = rest.partition(".")
        for new, old in [("attn1.", "attention_blocks.0."), ("attn2.", "attention_blocks.1."), ("norm3.", "ff_norm.")]:
            rest = rest.replace(f".{new}", f".{old}")
        rest = rest.replace(".norm1.", ".norms.0.").replace(".norm2.", ".norms.1.")
        name = f"{place}.motion_modules.{number}.temporal_transformer.{rest}"
        if name.endswith("pos_embed.pe"):
            stem = name.removesuffix("pos_embed.pe")
            weights |= {f"{stem}attention_blocks.{i}.pos_encoder.pe": tensor.clone() for i in (0, 1)}
        else:
            weights[name] = tensor
    return weights


def official_lora(adapter: MotionAdapter, rank: int = 2) -> dict[str, Tensor]:
    """A motion LoRA under the names of v2_lora_ZoomIn.ckpt."""
    lora = {}
    for key, tensor in official(adapter).items():
        stem, projection, _ = key.partition(".to_")
        if projection and key.endswith("weight"):
            name = f"{stem}.processor.to_{key.partition('.to_')[2].split('.')[0]}_lora"
            lora[f"{name}.down.weight"] = torch.randn(rank, tensor.shape[1])
            lora[f"{name}.up.weight"] = torch.randn(tensor.shape[0], rank)
    return lora
