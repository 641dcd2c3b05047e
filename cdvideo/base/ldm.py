"""The configs of Stable Diffusion 1.x, 2.x and XL, read from keys and shapes of one file in CompVis' names (ldm)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
XL_CLIP, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "timestep_spacing": "leading",
}


# The VAE's one attention, under diffusers' names: today's, and those from before it had one class for all attentions.
_ATTENTION = re.compile(rf"{re.escape(VAE)}(?:en|de)coder\.mid\.attn_1\.")
_ATTENTION_NAMES = {
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
    "query.": "q.",
    "key.": "k.",
    "value.": "v.",
    "proj_attn.": "proj_out.",
    "group_norm.": "norm.",
}
# A layer of Stable Diffusion 2's text encoder, under OpenCLIP's names or CLIP's.
_LAYER = rf"(?:{re.escape(OPEN_CLIP)}transformer\.resblocks|{re.escape(CLIP)}(?:text_model\.)?encoder\.layers)\.(\d+)\."
_LAYERS = 23  # of OpenCLIP's 24, that Stable Diffusion 2 reads
_WIDTH = 1024  # of OpenCLIP's text encoder


def family_of(tensors: Mapping[str, Tensor]) -> Literal["1.x", "2.x", "XL"]:
    """By the text encoders; where one has CLIP's names, by the UNet, whose projections are linear from 2.x on.

    Raises:
        KeyError: there is no such projection.
    """
    if any(name.startswith(XL_CLIP) for name in tensors):
        return "XL"
    is_linear = tensors[f"{UNET}middle_block.1.proj_in.weight"].ndim == 2
    return "2.x" if is_linear or any(name.startswith(OPEN_CLIP) for name in tensors) else "1.x"


def used_layers(tensors: Mapping[str, Tensor]) -> int:
    """How many layers of its text encoder Stable Diffusion 2 reads: all but the last of OpenCLIP's, which converters
    leave out.

    A file of another width than the released models' is taken for one with all layers where it has what stands beside
    them in OpenCLIP's own.
    """
    layers = count(tensors, _LAYER)
    table = tensors.get(f"{OPEN_CLIP}token_embedding.weight")
    if table is None or table.shape[1] == _WIDTH:
        return min(layers, _LAYERS)
    is_whole = any(f"{OPEN_CLIP}{name}" in tensors for name in ("text_projection", "logit_scale"))
    return layers - is_whole


def unused_layers(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of what Stable Diffusion 2 has no use for in its text encoder."""
    used = used_layers(tensors)
    return [name for name in tensors if (found := re.match(_LAYER, name)) and int(found[1]) >= used]


def name_attention(tensors: dict[str, Tensor]) -> None:
    """Gives the VAE's attention the names and shapes of CompVis' files, in place; converters leave diffusers' there,
    and biases as convolutions of one pixel have them."""
    for name in [name for name in tensors if _ATTENTION.match(name)]:
        tensor, start = tensors.pop(name), _ATTENTION.match(name)
        assert start is not None
        rest = name[start.end() :]
        for theirs, ours in _ATTENTION_NAMES.items():
            if rest.startswith(theirs):
                rest = ours + rest.removeprefix(theirs)
                break
        tensors[start[0] + rest] = tensor.flatten() if rest.endswith("bias") else tensor


def unet_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """UNet2DConditionModel's arguments, but for `sample_size`.

    Heads leave no trace in the weights: Stable Diffusion 1.x has 8 in each attention; 2.x and XL, known by their linear
    projections, have heads of 64 channels.
    """
    inputs = count(tensors, rf"{re.escape(UNET)}input_blocks\.(\d+)\.")
    ends = [i for i in range(inputs) if f"{UNET}input_blocks.{i}.0.op.weight" in tensors]
    blocks = len(ends) + 1
    layers = inputs // blocks - 1
    firsts = [1 + b * (layers + 1) for b in range(blocks)]
    widths = [len(tensors[f"{UNET}input_blocks.{i}.0.out_layers.3.bias"]) for i in firsts]
    attends = [f"{UNET}input_blocks.{i}.1.norm.weight" in tensors for i in firsts]
    inside = f"{UNET}middle_block.1."
    linear = tensors[f"{inside}proj_in.weight"].ndim == 2
    is_xl = f"{XL_OPEN_CLIP}text_projection" in tensors
    return {
        "in_channels": tensors[f"{UNET}input_blocks.0.0.weight"].shape[1],
        "out_channels": len(tensors[f"{UNET}out.2.bias"]),
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "down_block_types": tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attends),
        "up_block_types": tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attends)),
        "cross_attention_dim": tensors[f"{inside}transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "attention_head_dim": [width // 64 for width in widths] if linear else 8,
        "use_linear_projection": linear,
        **(_added_config(tensors, firsts) if is_xl else {}),
    }


def _added_config(tensors: Mapping[str, Tensor], firsts: Iterable[int]) -> dict[str, Any]:
    """What SDXL's UNet has beside: deeper attentions, and an embedding of the pooled text and of six sizes."""
    depths = (
        count(tensors, rf"{re.escape(UNET)}input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.") or 1 for i in firsts
    )
    inputs = tensors[f"{UNET}label_emb.0.0.weight"].shape[1]
    pooled = tensors[f"{XL_OPEN_CLIP}text_projection"].shape[1]
    return {
        "transformer_layers_per_block": tuple(depths),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (inputs - pooled) // 6,
        "projection_class_embeddings_input_dim": inputs,
    }


def vae_config(tensors: Mapping[str, Tensor], *, scaling_factor: float = 0.18215) -> dict[str, Any]:
    """AutoencoderKL's arguments."""
    blocks = count(tensors, rf"{re.escape(VAE)}encoder\.down\.(\d+)\.")
    return {
        "in_channels": tensors[f"{VAE}encoder.conv_in.weight"].shape[1],
        "out_channels": len(tensors[f"{VAE}decoder.conv_out.bias"]),
        "latent_channels": tensors[f"{VAE}decoder.conv_in.weight"].shape[1],
        "block_out_channels": tuple(len(tensors[f"{VAE}encoder.down.{b}.block.0.conv2.bias"]) for b in range(blocks)),
        "layers_per_block": count(tensors, rf"{re.escape(VAE)}encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "scaling_factor": scaling_factor,
    }


def text_config(weights: Mapping[str, Tensor], *, activation: str) -> dict[str, Any]:
    """CLIPTextConfig's arguments, from weights under CLIPTextModel's own names. CLIP's text heads have 64 channels."""
    vocabulary, width = weights["embeddings.token_embedding.weight"].shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": len(weights["encoder.layers.0.mlp.fc1.bias"]),
        "num_hidden_layers": count(weights, r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": len(weights["embeddings.position_embedding.weight"]),
        "hidden_act": activation,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 1,
    }


def count(names: Iterable[str], pattern: str) -> int:
    """One more than the highest number that the pattern finds at the beginning of a name; 0 where it finds none."""
    return 1 + max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=-1)
