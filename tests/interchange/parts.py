"""Concepts to convert, files of other writers, and diffusers' pipelines to compare with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from cdvideo.base.loader import Base
from cdvideo.base.prompts import text_widths
from cdvideo.base.schedule import make_scheduler
from cdvideo.concept.adapters import delta_name, make_adapter, parameter_changes, text_changes, text_models
from cdvideo.concept.concept import Concept, ConceptMetadata
from cdvideo.concept.config import AdapterConfig
from cdvideo.concept.file import frozen_copy
from cdvideo.interchange.load import load_adapters
from cdvideo.sampling.denoise import draw_noise

Draw = Callable[..., Tensor]

PROMPT, NEGATIVE = "a photo of the sks dog surfing", "snow"
ADAPTERS: dict[str, dict[str, Any]] = {
    "kv": {"kind": "kv"},
    "lora": {"kind": "lora", "rank": 3, "alpha": 5.0, "targets": ("to_q", "to_out.0", "conv1", "ff.net.2", "proj_in")},
    "dora": {"kind": "lora", "rank": 3, "alpha": 5.0, "targets": ("to_k", "to_v", "conv1"), "dora": True},
}


def peer_parts(base: Base) -> dict[str, Any]:
    return {
        "vae": base.vae,
        "text_encoder": base.text_encoder,
        "tokenizer": base.tokenizer,
        "unet": base.unet,
        "scheduler": make_scheduler(base.scheduler_config, "ddim"),
        "feature_extractor": None,
        "safety_checker": None,
        "requires_safety_checker": False,
    }


@torch.no_grad()
def draw_with(pipeline: StableDiffusionPipeline, prompt: str = PROMPT, *, noise: Tensor | None = None) -> Tensor:
    """The pipeline's latents_BCHW, for the noise and the settings of `draw`."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt,
        negative_prompt=NEGATIVE,
        guidance_scale=4.0,
        num_inference_steps=3,
        latents=draw_noise([5], (4, 8, 8)) if noise is None else noise,
        output_type="latent",
    ).images


def learned(base: Base, adapter: dict[str, Any], *, token: str = "sks", rows: int = 2) -> Concept:
    """A concept with random rows and weights, as a file holds it."""
    config = AdapterConfig(**adapter)
    generator = torch.Generator().manual_seed(7)
    made = make_adapter(base.unet, config, seed=0).weights
    weights = {
        name: tensor.detach() + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in made.items()
    }
    metadata = ConceptMetadata(
        class_words={token: "dog"},
        initialiser="dog",
        base_name="tiny",
        base_hash=base.hash,
        resolution=base.resolution,
        prediction_type=base.scheduler_config["prediction_type"],
        steps=1,
        lr=1e-4,
        token_lr=1e-3,
        seed=0,
        loss_weights={},
        sample_prompt="",
        adapter=config.kind,
        adapter_settings=config.settings,
    )
    rows_KD = torch.randn(rows, sum(text_widths(base)), generator=generator)
    return frozen_copy(Concept({token: rows_KD}, weights, metadata))


def with_text(concept: Concept) -> Concept:
    """The LoRA changes the text encoder too: the layers that kohya's scripts train in it."""
    generator = torch.Generator().manual_seed(8)
    factors = {}
    sizes = {f"self_attn.{part}_proj": (32, 32) for part in ("q", "k", "v", "out")}
    for layer, (inputs, outputs) in {**sizes, "mlp.fc1": (32, 64), "mlp.fc2": (64, 32)}.items():
        for number in range(2):
            name = f"text_encoder.text_model.encoder.layers.{number}.{layer}"
            factors[f"{name}.lora_A.weight"] = torch.randn(2, inputs, generator=generator) * 0.2
            factors[f"{name}.lora_B.weight"] = torch.randn(outputs, 2, generator=generator) * 0.2
    return dataclasses.replace(concept, weights={**concept.weights, **factors})


# What kohya's scripts (networks/lora.py) look into, by the names of the classes, and what they call the layers there.
KOHYA_UNET = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")


KOHYA_TEXT = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")


def load(base: Base, *paths: Path) -> Any:
    return load_adapters(base, [(path, 1.0) for path in paths])


def random(*shape: int, scale: float = 0.2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale


def kohya_layers(base: Base, unet_classes: tuple[str, ...] = KOHYA_UNET) -> dict[str, tuple[str, nn.Module]]:
    """By kohya's names: the layer's name in a concept file, and the layer."""
    found: dict[str, tuple[str, nn.Module]] = {}
    for start, prefix, model, classes in (
        ("lora_unet", "unet.", base.unet, unet_classes),
        ("lora_te", *next(iter(text_models(base).items())), KOHYA_TEXT),
    ):
        for path, block in model.named_modules():
            if type(block).__name__ in classes:
                for child, layer in block.named_modules():
                    if isinstance(layer, (nn.Linear, nn.Conv2d)):
                        name = f"{prefix}{path}.{child}"
                        official = name.split(".", 1)[1].replace(".", "_")
                        found[f"{start}_{official}"] = (name, layer)
    return found


def kohya_file(base: Base, path: Path) -> dict[str, tuple[str, Tensor]]:
    """Writes a LoCon of all of kohya's layers, of many ranks and alphas; returns what it is to change."""
    tensors, expected = {}, {}
    for number, (stem, (name, layer)) in enumerate(kohya_layers(base).items()):
        rank, alpha = 1 + number % 3, float(1 + number % 4)
        if isinstance(layer, nn.Conv2d):
            down = random(rank, layer.in_channels, *layer.kernel_size)
            up = random(layer.out_channels, rank, 1, 1)
            change = torch.einsum("or,rihw->oihw", up[..., 0, 0], down)
        else:
            down, up = random(rank, layer.in_features), random(layer.out_features, rank)
            change = up @ down
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        expected[name] = (stem, alpha / rank * change)
    save_file(tensors, path)
    return expected


def changes_of(base: Base, concept: Any) -> dict[str, Tensor]:
    changes = {delta_name(name): change for name, change in parameter_changes(base.unet, concept).items()}
    changes |= text_changes(base, concept)
    return {name.removesuffix(".delta"): change for name, change in changes.items()}


def save_row(path: Path, form: str) -> Tensor:
    """Rows of a token as different tools write them."""
    rows_KD = random(2, 32, scale=1.0)
    if form == "diffusers":
        torch.save({"sks": rows_KD}, path)
    elif form == "safetensors":
        save_file({"sks": rows_KD}, path)
    elif form == "tensor":
        torch.save(rows_KD, path)
    elif form == "web ui":
        content = {"string_to_token": {"*": 265}, "string_to_param": {"*": nn.Parameter(rows_KD)}, "name": "sks"}
        torch.save({**content, "step": 500, "sd_checkpoint": "abc", "sd_checkpoint_name": "v1-5"}, path)
    elif form == "first":
        torch.save({"string_to_token": {"*": 265}, "string_to_param": nn.ParameterDict({"*": rows_KD})}, path)
    elif form == "web ui safetensors":
        save_file({"emb_params": rows_KD}, path)
    return rows_KD
