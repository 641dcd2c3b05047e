"""SDXL at a small width, of the real classes and the real architecture: two text encoders, sizes, deep attentions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from cdvideo.base.loader import Base
from cdvideo.base.schedule import make_scheduler

WIDTHS, POOLED = (64, 128), 96  # of the text encoders, and of the second one's projection

# stable-diffusion-xl-base-1.0's own file.
SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


def make_unet(**options: Any) -> UNet2DConditionModel:
    """SDXL's UNet: no attention in the first block, several transformer layers in the others, heads of 64 channels."""
    shape: dict[str, Any] = {
        "sample_size": 128,
        "block_out_channels": (64, 64, 128),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3),
        "attention_head_dim": (1, 1, 2),
        "layers_per_block": 2,
        "use_linear_projection": True,
        "cross_attention_dim": sum(WIDTHS),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": POOLED + 6 * 32,
    }
    torch.manual_seed(21)
    return UNet2DConditionModel(**{**shape, **options})


def make_vae() -> AutoencoderKL:
    torch.manual_seed(22)
    return AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.13025,
    )


def make_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": 1,
        "num_hidden_layers": 3,
        "projection_dim": POOLED,
    }
    first, second = (
        CLIPTextConfig(
            hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64, hidden_act=act, **common
        )
        for width, act in zip(WIDTHS, ("quick_gelu", "gelu"), strict=True)
    )
    torch.manual_seed(23)
    return CLIPTextModel(first), CLIPTextModelWithProjection(second)


def save_folder(folder: Path, tokenizer_folder: Path) -> Path:
    """A folder as stable-diffusion-xl-base-1.0 has it, but for its widths."""
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    encoders = make_text_encoders(tokenizer)
    make_unet().save_pretrained(folder / "unet")
    make_vae().save_pretrained(folder / "vae")
    encoders[0].save_pretrained(folder / "text_encoder")
    encoders[1].save_pretrained(folder / "text_encoder_2")
    tokenizer.save_pretrained(folder / "tokenizer")
    CLIPTokenizer.from_pretrained(tokenizer_folder, pad_token="!").save_pretrained(folder / "tokenizer_2")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (folder / "model_index.json").write_text(json.dumps({"force_zeros_for_empty_prompt": True}))
    return folder


def peer_parts(base: Base, scheduler: Any = "ddim") -> dict[str, Any]:
    """What diffusers' SDXL pipelines are made of."""
    return {
        "vae": base.vae,
        "text_encoder": base.text_encoder,
        "text_encoder_2": base.text_encoder_2,
        "tokenizer": base.tokenizer,
        "tokenizer_2": base.tokenizer_2,
        "unet": base.unet,
        "scheduler": make_scheduler(base.scheduler_config, scheduler),
        "force_zeros_for_empty_prompt": base.zero_empty_prompt,
    }
