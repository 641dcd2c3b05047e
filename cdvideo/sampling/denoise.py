"""The denoising loop that pictures and films share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from cdvideo.base.loader import Base
from cdvideo.base.schedule import Scheduler
from cdvideo.errors import UserError
from cdvideo.sampling.guidance import guide

Predict = Callable[[Tensor, Tensor], Tensor]  # (latents_B..., timestep) -> prediction_B...


def denoise(
    predict: Predict, noise: Tensor, scheduler: Scheduler, *, steps: int, guidance: float, progress: bool = False
) -> Tensor:
    """From noise to latents.

    Args:
        predict: the UNet on compiled prompts: without guidance one prompt for each of the noise's rows, with guidance
            the negative prompts first and then the prompts (`guided_prompts`).
        noise: standard normal, float32, on the device where to compute; batch first, any further axes.
        guidance: scale of classifier-free guidance; 1 asks for none, and halves the work.

    Returns:
        Latents as the scheduler's model type leaves them, float32, same shape as `noise`.
    """
    scheduler.set_timesteps(steps)
    # The scheduler keeps its timesteps and coefficients on the CPU, so that no step waits for the GPU.
    timesteps = scheduler.timesteps.to(noise.device)
    latents = noise * scheduler.init_noise_sigma
    for index, timestep in enumerate(tqdm(scheduler.timesteps, desc="denoising", disable=not progress, leave=False)):
        model_input = scheduler.scale_model_input(latents, timestep)
        if guidance == 1:
            prediction = predict(model_input, timesteps[index])
        else:
            unconditional, conditional = predict(torch.cat([model_input, model_input]), timesteps[index]).chunk(2)
            prediction = guide(unconditional, conditional, guidance)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents


def guided_prompts(prompts: Sequence[str], negative_prompt: str, guidance: float) -> list[str]:
    """The prompts to compile for `denoise`, in the order in which it asks for them."""
    return list(prompts) if guidance == 1 else [negative_prompt] * len(prompts) + list(prompts)


def draw_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal float32 noise of `shape` for each seed, drawn on the CPU.

    Each seed has a generator of its own, so neither the device nor its company in the batch changes a sample; a longer
    film starts with the noise of the shorter one.
    """
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def latent_size(base: Base, width: int | None, height: int | None) -> tuple[int, int]:
    """Height and width of the latents for pictures of `width` x `height` pixels; None is the base's own resolution.

    Raises:
        UserError: a side that is not a multiple of the pixels that one latent stands for.
    """
    pixels = 2 ** (len(base.vae.config.block_out_channels) - 1)
    sides = (height or base.resolution, width or base.resolution)
    if any(side % pixels for side in sides):
        raise UserError(
            f"a picture of {sides[1]} x {sides[0]} pixels",
            allowed=f"width and height that are multiples of {pixels}",
            do=f"choose {sides[1] // pixels * pixels or pixels} x {sides[0] // pixels * pixels or pixels}",
        )
    return sides[0] // pixels, sides[1] // pixels
