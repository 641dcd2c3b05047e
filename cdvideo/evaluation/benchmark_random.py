"""Stable Diffusion 1.5 with AnimateDiff v2's motion modules, random weights: the real sizes where no weights are."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from cdvideo.base.ldm import SCHEDULER
from cdvideo.base.loader import Base
from cdvideo.base.mapped import file_spans, let_go, mapped_files
from cdvideo.base.single_file import load_clip_tokenizer
from cdvideo.evaluation.benchmark_films import RANDOM_SD15
from cdvideo.evaluation.sd15 import CONFIGS, Configs
from cdvideo.motion.config import MotionConfig
from cdvideo.motion.modules import MotionModules


def random_sd15(device: torch.device, dtype: torch.dtype, configs: Configs = CONFIGS) -> tuple[Base, MotionModules]:
    """The same weights on every call on the same device in the same dtype; never a second copy in memory.

    On the CPU each model's lie in a file that is mapped into memory, as those of a base do that is loaded from files.

    It predicts v, unlike Stable Diffusion 1.5: what random weights predict then stays as large as a picture.
    """
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(configs["unet"])
        vae = AutoencoderKL.from_config(configs["vae"])
        text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(dict(configs["text_encoder"])))
        motion = MotionModules(MotionConfig.for_unet(unet, norm_mode="diffusers", motion_num_attention_heads=8))
    for module in (unet, vae, text_encoder, motion):
        fill(module, device, dtype)
        if device.type == "cpu":
            let_go(file_spans(module.parameters(), mapped_files()))
    base = Base(
        name=RANDOM_SD15,
        path=Path(RANDOM_SD15),
        hash="random",
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=load_clip_tokenizer(pad_token="<|endoftext|>"),
        scheduler_config={**SCHEDULER, "prediction_type": "v_prediction"},
        resolution=configs["vae"]["sample_size"],
        device=device,
        dtype=dtype,
    )
    return base, motion


def _mapped_room(module: nn.Module, dtype: torch.dtype) -> Iterator[Tensor]:
    """Empty tensors for its parameters, one after the other, in a file without a name that goes with the last."""
    sizes = [parameter.numel() for parameter in module.parameters()]
    with tempfile.NamedTemporaryFile() as file:
        room = torch.from_file(file.name, shared=True, size=sum(sizes), dtype=dtype)
    return iter(room.split(sizes))


def fill(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Weights that keep the variance of what passes through, norms and biases that do nothing; in place."""
    room = _mapped_room(module, dtype) if device.type == "cpu" else None
    generator = torch.Generator(device).manual_seed(0)
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            shape = parameter.shape
            values = next(room).view(shape) if room else torch.empty(shape, device=device, dtype=dtype)
            if values.ndim > 1:
                values.normal_(0, values[0].numel() ** -0.5, generator=generator)
            else:
                values.fill_(1 if name == "weight" else 0)
            part.register_parameter(name, nn.Parameter(values, requires_grad=False))
    nn.Module.to(module, device, dtype).eval()  # the buffers: tables of positions, which are no random numbers
