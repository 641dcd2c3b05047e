"""Pixels to scaled latents and back, for AutoencoderKL and AutoencoderTiny alike."""

from __future__ import annotations

from typing import TypeAlias

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

Vae: TypeAlias = AutoencoderKL | AutoencoderTiny
DECODE_CHUNK = 1  # pictures decoded at once: more take more memory, and on CPUs no less time


def vae_dtype(vae: Vae, dtype: torch.dtype, *, is_sdxl: bool) -> torch.dtype:
    """The precision that a base's VAE computes in: the base's own, but float32 where it would overflow in float16.

    SDXL's first VAE does, and says so (`force_upcast`); Stable Diffusion 1 and 2 have the same word by default alone.
    """
    overflows = is_sdxl and dtype == torch.float16 and bool(vae.config.get("force_upcast"))
    return torch.float32 if overflows else dtype


def encode_pixels(vae: Vae, pixels_BCHW: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Pixels in [-1, 1] to latents multiplied by the VAE's ``scaling_factor``.

    AutoencoderKL's latents are drawn from its posterior when a generator is given, else its mode is taken.
    """
    encoded = vae.encode(pixels_BCHW.to(vae.device, vae.dtype))
    if isinstance(vae, AutoencoderTiny):
        latents_BCHW = encoded.latents
    elif generator is None:
        latents_BCHW = encoded.latent_dist.mode()
    else:
        latents_BCHW = encoded.latent_dist.sample(generator)
    return latents_BCHW * vae.config.scaling_factor


def decode_latents(vae: Vae, latents_BCHW: Tensor, *, chunk: int = DECODE_CHUNK) -> Tensor:
    """Scaled latents to float32 pixels clamped to [-1, 1], ``chunk`` pictures at a time."""
    latents_BCHW = latents_BCHW.to(vae.device, vae.dtype) / vae.config.scaling_factor
    pixels = [vae.decode(part).sample.float().clamp(-1, 1) for part in latents_BCHW.split(chunk)]
    return torch.cat(pixels)
