"""Wan's autoencoder over whole clips: the values of diffusers' walk by chunks of four frames, in one pass.

diffusers' ``AutoencoderKLWan`` encodes frame 0 alone and then four frames at a time, and carries the last frames of
every causal convolution over. As convolutions are causal, one pass over the whole clip gives the same numbers (to
rounding) with a fifth of the calls; only the two layers that change the frame rate treat frame 0 by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from einops import rearrange
from torch import Tensor, nn

FRAMES_PER_LATENT = 4  # after frame 0, which has a latent of its own


def latent_frames(frames: int) -> int:
    """Return how many latent frames ``frames`` = 4 n + 1 frames have: n + 1."""
    assert frames % FRAMES_PER_LATENT == 1, frames
    return 1 + frames // FRAMES_PER_LATENT


def encode_moments(vae: AutoencoderKLWan, pixels_BCFHW: Tensor) -> Tensor:
    """Return mean and log variance of the latents, (B, 2 z, 1 + (F - 1) / 4, H / s, W / s), before normalisation.

    Args:
        pixels_BCFHW: in [-1, 1], with F = 4 n + 1 frames.
    """
    latent_frames(pixels_BCFHW.shape[2])
    encoder: Any = vae.encoder
    x = patchify(pixels_BCFHW, vae.config.patch_size) if vae.config.patch_size else pixels_BCFHW
    x = encoder.conv_in(x)
    for block in encoder.down_blocks:
        if vae.config.is_residual:
            x = _down_block(block, x)
        else:
            x = downsample(block, x) if isinstance(block, WanResample) else block(x)
    x = encoder.mid_block(x)
    return vae.quant_conv(encoder.conv_out(encoder.nonlinearity(encoder.norm_out(x))))


def decode_pixels(vae: AutoencoderKLWan, latents_BCFHW: Tensor) -> Tensor:
    """Return pixels_BCFHW of latents as the autoencoder has them (not normalised), not yet clamped to [-1, 1]."""
    decoder: Any = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents_BCFHW)))
    for block in decoder.up_blocks:
        x = _up_block(block, x)
    x = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))
    return unpatchify(x, vae.config.patch_size) if vae.config.patch_size else x


def normalised(vae: AutoencoderKLWan, latents_BCFHW: Tensor) -> Tensor:
    """Return (latents - mean) / deviation per channel, as the transformer reads them."""
    mean, deviation = channel_moments(vae, latents_BCFHW)
    return (latents_BCFHW - mean) / deviation


def denormalised(vae: AutoencoderKLWan, latents_BCFHW: Tensor) -> Tensor:
    """Undo `normalised`."""
    mean, deviation = channel_moments(vae, latents_BCFHW)
    return latents_BCFHW * deviation + mean


def channel_moments(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and deviation of each latent channel, (1, z, 1, 1, 1), on the device of ``like``."""
    mean, deviation = (
        torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, deviation


def downsample(layer: WanResample, x_BCFHW: Tensor) -> Tensor:
    """Halve height and width; where the layer says so, every two frames after frame 0 become one."""
    x = _frame_by_frame(layer.resample, x_BCFHW)
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    return x


def upsample(layer: WanResample, x_BCFHW: Tensor) -> Tensor:
    """Double height and width; where the layer says so, every frame after frame 0 becomes two."""
    x = x_BCFHW
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        doubled = rearrange(layer.time_conv(x[:, :, 1:]), "b (two c) f h w -> b c (f two) h w", two=2)
        x = torch.cat([x[:, :, :1], doubled], dim=2)
    return _frame_by_frame(layer.resample, x)


def _frame_by_frame(layer: nn.Module, x_BCFHW: Tensor) -> Tensor:
    frames = x_BCFHW.shape[2]
    return rearrange(layer(rearrange(x_BCFHW, "b c f h w -> (b f) c h w")), "(b f) c h w -> b c f h w", f=frames)


def _down_block(block: Any, x_BCFHW: Tensor) -> Tensor:
    x = x_BCFHW
    for resnet in block.resnets:
        x = resnet(x)
    if block.downsampler is not None:
        x = downsample(block.downsampler, x)
    return x + block.avg_shortcut(x_BCFHW)


def _up_block(block: Any, x_BCFHW: Tensor) -> Tensor:
    """Walk Wan 2.1's up block (its upsampler in a list) or Wan 2.2's (with a shortcut around it)."""
    x = x_BCFHW
    for resnet in block.resnets:
        x = resnet(x)
    upsampler = block.upsampler if hasattr(block, "upsampler") else (block.upsamplers or [None])[0]
    if upsampler is not None:
        x = upsample(upsampler, x)
    if getattr(block, "avg_shortcut", None) is not None:
        x = x + block.avg_shortcut(x_BCFHW, first_chunk=True)
    return x
