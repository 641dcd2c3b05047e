"""The denoising loop that pictures and films share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from cdvideo.base.loader import Base
from cdvideo.base.schedule import Scheduler
from cdvideo.errors import UserError
from cdvideo.sampling.guidance import guide

Predict = Callable[[Tensor, Tensor, int], Tensor]  # (latents_B..., timestep, step) -> prediction_B...


@dataclass(frozen=True)
class Start:
    """What sampling starts from besides noise (SDEdit, arXiv 2108.01073): latents, noised as of a later step.

    latents: clean and scaled, of the noise's shape, or one that is broadcast to it.
    strength: share of the denoising that is still done; 1 keeps nothing of the latents, but for what is held.
    held: how firmly they are held to all along, 0 to 1; None is not at all. At 1 the result is the latents themselves,
        and whatever sees them at each step is drawn to fit (RePaint, arXiv 2201.09865, equation 8).
    """

    latents: Tensor
    strength: float
    held: Tensor | None = None

    def first_step(self, steps: int) -> int:
        return steps - min(max(round(steps * self.strength), 1), steps)

    def to(self, device: torch.device) -> Start:
        return Start(self.latents.to(device), self.strength, None if self.held is None else self.held.to(device))

    def hold(self, latents: Tensor, noisy: Tensor) -> Tensor:
        return latents if self.held is None else torch.lerp(latents, noisy, self.held)


def denoise(
    predict: Predict,
    noise: Tensor,
    scheduler: Scheduler,
    *,
    steps: int,
    guidance: float,
    start: Start | None = None,
    progress: bool = False,
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
    predict = guided(predict, guidance)
    first, latents = 0, noise * scheduler.init_noise_sigma
    if start is not None:
        first = start.first_step(steps)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        noisy = _noised(start.latents, noise, scheduler, first)
        latents = noisy if first > 0 else start.hold(latents, noisy)
    for step in tqdm(range(first, len(scheduler.timesteps)), desc="denoising", disable=not progress, leave=False):
        timestep = scheduler.timesteps[step]
        prediction = predict(scheduler.scale_model_input(latents, timestep), timesteps[step], step)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
        if start is not None and start.held is not None:
            latents = start.hold(latents, _noised(start.latents, noise, scheduler, step + 1))
    return latents


def guided(predict: Predict, scale: float) -> Predict:
    """A model that is asked twice at once, for the negative prompts and the prompts, and mixes both answers."""
    if scale == 1:
        return predict

    def predict_both(latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        unconditional, conditional = predict(torch.cat([latents, latents]), timestep, step).chunk(2)
        return guide(unconditional, conditional, scale)

    return predict_both


def _noised(latents: Tensor, noise: Tensor, scheduler: Scheduler, step: int) -> Tensor:
    """Clean latents as they look before a step; after the last one, clean."""
    latents = latents.expand_as(noise)
    if step == len(scheduler.timesteps):
        return latents
    return scheduler.add_noise(latents, noise, scheduler.timesteps[step].expand(len(noise)))


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
