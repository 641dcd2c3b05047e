"""What the trainer's tests share."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from cdvideo.base.loader import Base
from cdvideo.base.schedule import add_noise, make_scheduler, training_target
from cdvideo.base.text import encode_text, tokenize
from cdvideo.concept.adapters import make_adapter, tuned
from cdvideo.concept.concept import Concept
from cdvideo.concept.config import ConceptConfig
from cdvideo.concept.data import cache_latents
from cdvideo.concept.losses import denoising_loss
from cdvideo.concept.trainer import new_concept, train_concept
from cdvideo.media.images import Picture
from cdvideo.runs import Run, create_run


def changed(config: ConceptConfig, **groups: dict[str, Any]) -> ConceptConfig:
    """The config with some settings of its groups changed."""
    new = {name: dataclasses.replace(getattr(config, name), **settings) for name, settings in groups.items()}
    return dataclasses.replace(config, **new)


def untrained(base: Base, config: ConceptConfig) -> Concept:
    return new_concept(base, config, make_adapter(base.unet, config.adapter, seed=config.seed))


def metrics_of(run: Run) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def equal(one: Concept, other: Concept) -> bool:
    ours, theirs = {**one.tokens, **one.weights}, {**other.tokens, **other.weights}
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def train_with(base: Base, pictures: list[Picture], config: ConceptConfig, folder: Path, **options: Any) -> list[Any]:
    """The concept of a run, and its metrics."""
    with create_run(folder, "run") as run:
        concept = train_concept(base, pictures, config, run, quiet=True, **options)
        return [concept, metrics_of(run)]


def fixed_loss(
    base: Base,
    pictures: list[Picture],
    config: ConceptConfig,
    concept: Concept,
    prompt: str = "a picture of a sks dog",
) -> float:
    """The denoising loss on the plain pictures, always with the same noise."""
    generator = torch.Generator().manual_seed(9)
    plain = dataclasses.replace(config.data, rescale=0, flip=False)
    cache = cache_latents(base, pictures, plain, phrase="sks dog", class_phrase="dog", seed=0, quiet=True)
    latents = cache.latents_NCHW.repeat(8, 1, 1, 1)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.linspace(100, 999, len(latents)).long()
    scheduler = make_scheduler(base.scheduler_config)
    batch = tokenize(base.tokenizer, [prompt] * len(latents), tokens={"sks": 1})
    with torch.no_grad(), tuned(base.unet, concept):
        text = encode_text(base.text_encoder, batch, rows=concept.tokens).hidden_BLD
        prediction = base.unet(add_noise(scheduler, latents, noise, timesteps), timesteps, text).sample
    target = training_target(scheduler, latents, noise, timesteps)
    return denoising_loss(prediction, target, torch.ones(len(latents), 1, 8, 8)).item()
