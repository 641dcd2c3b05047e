"""The denoising loss of the base's training, and quick samples to look at while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from cdvideo.base.schedule import Scheduler, make_scheduler, truncated_v_weights

PROMPTS = (
    "a dog wearing headphones surfing",
    "a cat in a top hat in the snow",
    "a fox wearing a crown on a skateboard",
    "a panda wearing sunglasses at the beach",
    "a blue robot in space",
    "a pink pig flying",
    "a tiger wearing a scarf in the forest",
    "a penguin at night",
)
SAMPLE_STEPS, SAMPLE_GUIDANCE = 20, 4.0

SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "clip_sample": False,
}


def weighted_loss(
    scheduler: Scheduler, predicted: Tensor, target: Tensor, timesteps_B: Tensor, pixel_weight: Tensor, *, gamma: float
) -> Tensor:
    """Mean over the batch of truncated v weight times the squared error, averaged with ``pixel_weight`` over positions.

    Args:
        predicted, target: (B, ..., C, H, W).
        pixel_weight: broadcasts against target, (B, ..., 1, H, W).
    """
    weight = pixel_weight.expand_as(target)
    axes = tuple(range(1, target.ndim))
    error_B = (weight * (predicted.float() - target).square()).sum(axes) / weight.sum(axes)
    return (truncated_v_weights(scheduler, timesteps_B, gamma=gamma) * error_B).mean()


def pick_captions(
    ids_NKL: Tensor, picks_B: Tensor, empty_L: Tensor, *, empty: float, noisy: float, generator: torch.Generator
) -> Tensor:
    """ids_BL: a random caption of each pick; in parts ``noisy`` the one with unknown words, in parts ``empty`` none."""
    device, batch, columns = ids_NKL.device, len(picks_B), ids_NKL.shape[1]
    column_B = torch.randint(columns - 1, (batch,), generator=generator, device=device)
    chance_B = torch.rand(batch, generator=generator, device=device)
    column_B = torch.where(chance_B < noisy, columns - 1, column_B)
    ids_BL = ids_NKL[picks_B, column_B].long()
    return torch.where((chance_B > 1 - empty)[:, None], empty_L, ids_BL)


def prompt_ids(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    return tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def quick_samples(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    shape: tuple[int, ...],
    *,
    prompts: Sequence[str] = PROMPTS,
    scheduler_config: Mapping[str, Any] = SCHEDULER_CONFIG,
    seed: int = 0,
) -> Tensor:
    """Latents of one picture or film per prompt, by DDIM with guidance; ``predict(latents, timestep, text_BLD)``.

    Args:
        shape: of one sample: (C, H, W), or (F, C, H, W) for films.
    """
    device = text_encoder.device
    scheduler = make_scheduler(scheduler_config, "ddim")
    scheduler.set_timesteps(SAMPLE_STEPS, device=device)
    ids = prompt_ids(tokenizer, [*prompts, *[""] * len(prompts)]).to(device)
    text_BLD = text_encoder(input_ids=ids).last_hidden_state
    noise = torch.randn((len(prompts), *shape), generator=torch.Generator().manual_seed(seed))
    latents = noise.to(device)
    for timestep in scheduler.timesteps:
        wanted, empty = predict(torch.cat([latents, latents]), timestep, text_BLD).float().chunk(2)
        latents = scheduler.step(empty + SAMPLE_GUIDANCE * (wanted - empty), timestep, latents).prev_sample
    return latents
