"""Pictures from prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cdvideo.base.latents import DECODE_CHUNK, decode_latents
from cdvideo.base.loader import Base
from cdvideo.base.offload import at_work
from cdvideo.base.schedule import SamplerName, make_scheduler
from cdvideo.concept.adapters import tuned
from cdvideo.concept.concept import Concept
from cdvideo.sampling.denoise import denoise, draw_noise, guided_prompts, latent_size
from cdvideo.sampling.prompt_kv import compile_prompts, reading


@torch.inference_mode()
def sample_images(
    base: Base,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    concept: Concept | None = None,
    negative_prompt: str = "",
    steps: int = 25,
    guidance: float = 5.0,
    scheduler: SamplerName = "ddim",
    width: int | None = None,
    height: int | None = None,
    decode_chunk: int = DECODE_CHUNK,
    progress: bool = False,
) -> Tensor:
    """One picture for each prompt, from the noise of the seed beside it.

    Args:
        width, height: in pixels; None is the base's own resolution.
        decode_chunk: pictures that the VAE decodes at once.

    Returns:
        pixels_BCHW: float32 in [-1, 1], on the base's device.
    """
    assert len(seeds) == len(prompts), f"{len(seeds)} seeds for {len(prompts)} prompts"
    noise_BCHW = draw_noise(seeds, (base.unet.config.in_channels, *latent_size(base, width, height)))
    size, read = (
        (height or base.resolution, width or base.resolution),
        guided_prompts(prompts, negative_prompt, guidance),
    )
    with base.in_use:
        compiled = compile_prompts(base, read, concept=concept, size=size)

    def predict(latents_BCHW: Tensor, timestep: Tensor, _step: int) -> Tensor:
        options = {"added_cond_kwargs": compiled.added, "return_dict": False}
        return base.unet(latents_BCHW.to(base.dtype), timestep, None, **options)[0].float()

    with base.in_use, at_work(base.device, base.unet), tuned(base.unet, concept), reading(base.unet, compiled):
        latents_BCHW = denoise(
            predict,
            noise_BCHW.to(base.device),
            make_scheduler(base.scheduler_config, scheduler, seeds=seeds, steps=steps),
            steps=steps,
            guidance=guidance,
            progress=progress,
        )
    with base.in_use, at_work(base.device, base.vae):
        return decode_latents(base.vae, latents_BCHW, chunk=decode_chunk)
