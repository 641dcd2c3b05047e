"""Stable Diffusion 1.5 without its weights: the configs of a base of its size, to reckon and to measure with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cdvideo.base.ldm import SCHEDULER
from cdvideo.base.single_file import load_clip_tokenizer

Configs = Mapping[str, Mapping[str, Any]]
CONFIGS: Configs = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "sample_size": 512,
        "latent_channels": 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
}


SMALL: Configs = {  # the same kinds of blocks with few weights: what is to be measured is tried out with it
    "unet": {
        **CONFIGS["unet"],
        "sample_size": 8,
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 64,
    },
    "vae": {
        **CONFIGS["vae"],
        "sample_size": 64,
        "block_out_channels": [32] * 4,
        "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "text_encoder": {
        **CONFIGS["text_encoder"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}


def write_configs(folder: Path, configs: Configs = CONFIGS) -> None:
    """Writes a folder in diffusers' layout, without weights."""
    for part, config in configs.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    load_clip_tokenizer(pad_token="<|endoftext|>").save_pretrained(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "DDIMScheduler", **SCHEDULER, "prediction_type": "epsilon"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
