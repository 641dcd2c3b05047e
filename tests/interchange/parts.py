"""Concepts to convert, and diffusers' pipelines to compare with."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.base.schedule import make_scheduler
from cdvideo.concept.adapters import make_adapter
from cdvideo.concept.concept import Concept, ConceptMetadata
from cdvideo.concept.config import AdapterConfig
from cdvideo.concept.file import frozen_copy
from cdvideo.sampling.denoise import draw_noise

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
        resolution=64,
        prediction_type="v_prediction",
        steps=1,
        lr=1e-4,
        token_lr=1e-3,
        seed=0,
        loss_weights={},
        sample_prompt="",
        adapter=config.kind,
        adapter_settings=config.settings,
    )
    return frozen_copy(Concept({token: torch.randn(rows, 32, generator=generator)}, weights, metadata))


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
