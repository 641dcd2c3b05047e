"""Stable Diffusion 1.5 at its full size with random weights, as a folder in diffusers' layout and as motion modules."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, MotionAdapter, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from cdvideo.base.loader import load_base
from cdvideo.base.single_file import load_clip_tokenizer
from tests.base.ldm_names import SCHEDULE, official

BLOCK = 1_000_003  # random numbers that are drawn; a prime, so that rows of weights do not repeat


def save_sd15(folder: Path, *, sample_size: int = 64) -> Path:
    """4.3 GB in float32; one part after the other, so that no more than the UNet is in memory."""
    save(folder / "unet", UNet2DConditionModel, sample_size=sample_size, cross_attention_dim=768)
    save(
        folder / "vae",
        AutoencoderKL,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=1,
    )
    with init_empty_weights():
        text_encoder = CLIPTextModel(text)
    filled(text_encoder).save_pretrained(folder / "text_encoder")
    load_clip_tokenizer(pad_token="<|endoftext|>").save_pretrained(folder / "tokenizer")
    DDIMScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
    return folder


def save_one_file(folder: Path, path: Path) -> Path:
    """A base's weights under the names of v1-5-pruned.safetensors, or of the .ckpt before it."""
    base = load_base(str(folder), device=torch.device("cpu"))
    tensors = {name: tensor.contiguous() for name, tensor in official(1, *base.modules).items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors}, path)
    return path


def save_motion_v3(folder: Path) -> Path:
    """Motion modules with AnimateDiff v3's keys: 1.7 GB in float32."""
    save(folder, MotionAdapter, use_motion_mid_block=False)
    return folder


def save(folder: Path, kind: type, **config: object) -> None:
    with init_empty_weights():
        model = kind(**config)
    filled(model).save_pretrained(folder)


def filled(model: nn.Module) -> nn.Module:
    """Random weights that keep the variance of what goes through them; norms as they are when training begins."""
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers() if tensor.device.type != "meta"}
    model.to_empty(device="cpu")
    numbers = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                fill(parameter, numbers)
        for name, tensor in buffers.items():
            model.get_buffer(name).copy_(tensor)
    return model.eval()


def fill(parameter: Tensor, numbers: Tensor) -> None:
    """With the numbers over and over; embeddings are as small as CLIP's."""
    scale = 0.02 if parameter.shape[0] > 10_000 else 1 / math.sqrt(parameter[0].numel())
    flat = parameter.view(-1)
    for start in range(0, len(flat), len(numbers)):
        part = flat[start : start + len(numbers)]
        part.copy_(numbers[: len(part)]).mul_(scale)


def weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))
