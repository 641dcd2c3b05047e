"""What files for SDXL have of their own: names of the UNet's first layout, two text encoders, rows for both.

kohya's scripts train SDXL on the UNet as Stability AI's code (sgm) names it, and so do their LoRAs:
`lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q`; others name it as diffusers does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.base.prompts import split_rows

ARCHITECTURE = "stable-diffusion-xl-v1-base"
ROWS = ("clip_l", "clip_g")  # how web UIs call the rows of the first and of the second text encoder
_KEYS = (
    *("lora_te1_", "lora_te2_", "text_encoder_2.", "lora_unet_input_blocks_", "lora_unet_output_blocks_"),
    *("text_encoders.clip_g.", "clip_g."),
)
_ONE_TEXT = re.compile(r"lora_te_|text_encoder\.|(base_model\.model\.)?text_model\.")  # of a base that has one encoder
FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}  # of the text that K and V read
_READS_TEXT = re.compile(r"attn2[._](processor\.)?to_[kv].*(down|lora_A)(\.default)?\.weight")

_WHOLE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_IN_RESNETS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_PLACE = re.compile(r"(?:(down|up)_blocks\.(\d)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)")


def sgm_name(path: str, *, layers: int = 2, bare: Collection[int] = ()) -> str:
    """A layer of the UNet, by its path in diffusers, as Stability AI's code calls it.

    Args:
        layers: to a block; two in SDXL, and in Stable Diffusion 1 and 2.
        bare: the upward blocks without attentions: none in SDXL, the first in Stable Diffusion 1 and 2.
    """
    match = _PLACE.fullmatch(path)
    if match is None:
        return _WHOLE.get(path, path)
    side, block, kind, number, rest = match.groups()
    start = (layers + 1) * int(block or 0)
    at = start + int(number)
    inside = int(kind == "attentions")
    if kind == "downsamplers":
        return f"input_blocks.{start + layers + 1}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{start + layers}.{1 if int(block) in bare else 2}.{rest}"
    rest = _IN_RESNETS.get(rest, rest) if kind == "resnets" else rest
    if side is None:
        return f"middle_block.{2 * int(number) + inside}.{rest}"
    return f"input_blocks.{at + 1}.{inside}.{rest}" if side == "down" else f"output_blocks.{at}.{inside}.{rest}"


def kohya_name(name: str) -> str:
    """unet.down_blocks.1.attentions.0.x is lora_unet_input_blocks_4_1_x, text_encoder_2.x is lora_te2_x."""
    model, _, path = name.partition(".")
    short = {"unet": "unet", "text_encoder": "te1", "text_encoder_2": "te2"}[model]
    return f"lora_{short}_{sgm_name(path) if model == 'unet' else path}".replace(".", "_")


def made_for(tensors: Mapping[str, Tensor], *, of_one_model: bool = False) -> str | None:
    """The family of bases that a LoRA's keys and sizes are of, where they tell it.

    SDXL's first text encoder has the sizes of Stable Diffusion 1's, so the names have to tell: kohya writes lora_te1_
    for one and lora_te_ for the other; and whoever trains SDXL's text encoders trains both, or the UNet with them.

    Args:
        of_one_model: The file is of a text encoder or a UNet alone, as PEFT's are, and so its names tell nothing.
    """
    widths = {tensor.shape[1] for key, tensor in tensors.items() if tensor.ndim == 2 and _READS_TEXT.search(key)}
    if found := next((FAMILIES[width] for width in widths if width in FAMILIES), None):
        return found
    if any(key.startswith(_KEYS) for key in tensors):
        return "SDXL"
    if of_one_model:
        return None
    is_old = any(key.startswith("lora_te_") for key in tensors) or all(map(_ONE_TEXT.match, tensors))
    return "Stable Diffusion 1 or 2" if is_old else None


def fits_family(family: str | None, base: Base) -> bool:
    """Whether a file of this family may be for the base; where the file does not tell, it may."""
    return family is None or (family == "SDXL") == base.is_sdxl


def joined_rows(parts: Mapping[str, Tensor]) -> Tensor:
    """A token's rows_KD for both text encoders, from what web UIs keep apart."""
    return torch.cat([parts[name].reshape(-1, parts[name].shape[-1]) for name in ROWS], dim=1)


def parted_rows(base: Base, rows_KD: Tensor) -> dict[str, Tensor]:
    """What `joined_rows` joins."""
    parts = split_rows(base, {"": rows_KD.detach().float().cpu()})
    return {name: part[""] for name, part in zip(ROWS, parts, strict=True)}
