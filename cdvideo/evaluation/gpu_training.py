"""The rows of the GPU's benchmark that train: the presets for Stable Diffusion 1.5, float16, and Wan's sizes."""

from __future__ import annotations

import copy
import json
import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor

from cdvideo.base.memory import base_from_configs
from cdvideo.concept.config import SAMPLE_PICTURES, ConceptConfig
from cdvideo.concept.state import STATE_FILE
from cdvideo.concept.trainer import train_concept
from cdvideo.config import load_config
from cdvideo.evaluation.benchmark_random import fill
from cdvideo.evaluation.benchmark_side import count_operations
from cdvideo.evaluation.gpu_machine import Machine, Row, gigabytes
from cdvideo.evaluation.memory_measurement import measure_training, rest
from cdvideo.evaluation.sd15 import write_configs
from cdvideo.media.images import read_pictures
from cdvideo.runs import Run, create_run
from cdvideo.sampling.memory import training_needs

PRESETS = Path(__file__).parents[2] / "configs" / "concept"
WAN = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}  # T2V 1.3B
SMALL_WAN = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64, "num_layers": 2}


def preset(machine: Machine, name: str, **settings: Any) -> ConceptConfig:
    """A preset's training on the sample pictures as they are, without contact sheets."""
    fixed: dict[str, Any] = {"resolution": machine.pick(512, dry=64), "sample.every": 0, "data.variants": 1, **settings}
    overrides = [f"{key}={value}" for key, value in fixed.items()]
    return load_config(ConceptConfig, file=PRESETS / f"{name}.yaml", overrides=overrides)


def concept_training(machine: Machine, *, name: str) -> dict[str, Any]:
    """A preset's seconds a step; its peak beside our estimate and beside the card that it is named for."""
    config = preset(machine, name, steps=machine.pick(14, dry=4), checkpoint_every=100)
    with tempfile.TemporaryDirectory() as folder:
        write_configs(Path(folder) / "base", machine.configs)
        outline = base_from_configs(str(Path(folder) / "base"), dtype=machine.dtype)
    assert outline is not None, "a base that can not be reckoned with"
    needs = training_needs(outline, config, on_gpu=machine.device.type == "cuda")
    base, _ = machine.models()
    rest(base, ("vae",))
    del _
    measured = measure_training(base, read_pictures(SAMPLE_PICTURES), config, needs)
    card = re.search(r"_(\d+)gb$", name)
    assert card is not None, f"{name} says nothing of a card"
    return {
        "batch": config.optim.batch_size,
        "s a step": measured["seconds_a_step"],
        "peak reserved GB": gigabytes(measured["peak"]),
        "peak allocated GB": gigabytes(measured["allocated"]),
        "estimate GB": gigabytes(measured["estimate"]),
        "estimate over peak reserved": measured["estimate"] / measured["peak"],
        "card in the preset's name, GB": int(card[1]),
    }


@dataclass(frozen=True)
class WatchedRun(Run):
    """A run that keeps its losses, and the scale of the last state that it has written."""

    losses: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)

    def log(self, metrics: Mapping[str, float | int | str]) -> None:
        Run.log(self, metrics)
        self.losses.extend(float(value) for name, value in metrics.items() if name.startswith("loss_"))
        if (self.folder / STATE_FILE).exists():
            with safe_open(self.folder / STATE_FILE, framework="pt") as file:
                self.scales.append(json.loads(file.metadata()["state"])["scaler"]["scale"])


def fp16_with_scaler(machine: Machine) -> dict[str, Any]:
    """Steps in float16, with one loss so heavy that its gradients overflow until the scale has come down."""
    every = machine.pick(5, dry=1)
    heavy = {"steps": 4 * every + 1, "checkpoint_every": every, "semantic.weight": 1e4}
    config = preset(machine, "kv_sd15_8gb", **heavy)
    base, _ = machine.models(torch.float16)
    rest(base, ("vae",))
    with tempfile.TemporaryDirectory() as folder, create_run(Path(folder), "fp16") as run:
        watched = WatchedRun(run.folder, run.lock)
        train_concept(base, read_pictures(SAMPLE_PICTURES), config, watched, quiet=True)
    if not all(map(math.isfinite, watched.losses)):
        raise ValueError(f"losses that are not finite: {watched.losses}")
    scales = list(dict.fromkeys(watched.scales))
    if scales[-1] >= 2.0**16:
        raise ValueError(f"the scale stays where it begins: {scales}")
    told = {"steps": config.steps, "losses": "finite", "scale begins at": 2.0**16}
    return {**told, f"scales every {every} steps": scales}


def wan(machine: Machine) -> tuple[WanTransformer3DModel, Tensor]:
    """Wan 2.1's transformer of random weights, in bf16 with what diffusers keeps in float32; and a text for it."""
    text_dim = machine.pick(4096, dry=32)
    with init_empty_weights():
        model = WanTransformer3DModel(**machine.pick(WAN, dry=SMALL_WAN), text_dim=text_dim)
    rope = copy.deepcopy(model.rope)
    fill(model, machine.device, torch.bfloat16)
    model.rope = rope.to(machine.device)
    for name, parameter in model.named_parameters():
        if any(part in name.split(".") for part in model._keep_in_fp32_modules):
            parameter.data = parameter.data.float()
    text_BLD = torch.randn(1, 512, text_dim, device=machine.device).to(torch.bfloat16)
    return model, text_BLD


def _latents(machine: Machine, frames: int) -> Tensor:
    side = machine.pick(60, dry=8)
    return torch.randn(1, 16, 1 + (frames - 1) // 4, side, side, device=machine.device).to(torch.bfloat16)


def wan_training(machine: Machine, *, frames: int, checkpointing: bool) -> dict[str, Any]:
    """Forward and backward with a LoRA of rank 16 on the attentions."""
    model, text_BLD = wan(machine)
    model.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.train()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    latents_BCFHW, timestep_B = _latents(machine, frames), torch.full((1,), 500, device=machine.device)

    def step() -> None:
        predicted = model(latents_BCFHW, timestep_B, text_BLD, return_dict=False)[0]
        predicted.float().square().mean().backward()
        for parameter in learned:
            parameter.grad = None

    machine.begin_peak()
    seconds = machine.usual_seconds(step)
    peak = machine.peak()
    flops = count_operations(step)["flops"]  # with what is computed anew
    return {
        "learned": sum(parameter.numel() for parameter in learned),
        "s a step": seconds,
        "peak allocated GB": gigabytes(peak),
        "TFLOP a step": flops / 1e12,
        "share of matrix peak": machine.share(flops, seconds),
    }


@torch.inference_mode()
def wan_text(machine: Machine) -> dict[str, Any]:
    """A step of sampling, and what of it goes into the text's keys and values, which are the same at every step."""
    model, text_BLD = wan(machine)
    read_BLC = model.condition_embedder.text_embedder(text_BLD)
    timestep_B = torch.full((1,), 500, device=machine.device)

    def project() -> None:
        for block in model.blocks:
            block.attn2.norm_k(block.attn2.to_k(read_BLC))
            block.attn2.to_v(read_BLC)

    projecting = machine.usual_seconds(project)
    found: dict[str, Any] = {"text's keys and values ms": 1000 * projecting}
    for frames in (1, 33):
        latents_BCFHW = _latents(machine, frames)
        seconds = machine.usual_seconds(partial(model, latents_BCFHW, timestep_B, text_BLD, return_dict=False))
        found[f"{frames} frames"] = {"s a step": seconds, "text's share": projecting / seconds}
    return found


TRAINING_ROWS = tuple(
    Row(f"training-{name}", 15, partial(concept_training, name=name)) for name in ("kv_sd15_8gb", "lora_sd15_12gb")
)
WAN_ROWS = (
    *(
        Row(
            f"wan-{frames}-frames{'-checkpointing' if checkpointing else ''}",
            5,
            partial(wan_training, frames=frames, checkpointing=checkpointing),
        )
        for frames in (1, 33)
        for checkpointing in (False, True)
    ),
    Row("wan-text", 3, wan_text),
)
