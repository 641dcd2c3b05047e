"""Wan's autoencoder over whole clips against diffusers' own walk by chunks of four frames."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan

from cdvideo.models.wan.vae import decode_pixels, denormalised, encode_moments, latent_frames, normalised

FORMS: dict[str, dict[str, Any]] = {
    "Wan 2.1": {"dim_mult": [1, 2, 4], "temperal_downsample": [False, True]},
    "Wan 2.2": {
        "dim_mult": [1, 2, 2],
        "temperal_downsample": [True, True],
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
    },
}


@pytest.fixture(params=FORMS)
def vae(request: pytest.FixtureRequest) -> AutoencoderKLWan:
    moments = {"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [2.0, 0.5, 1.0, 3.0]}
    return AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1, **moments, **FORMS[request.param]).eval()


@pytest.mark.parity
@pytest.mark.parametrize("frames", [1, 5, 13])
@torch.no_grad()
def test_the_whole_clip_at_once_gives_what_chunks_give(vae: AutoencoderKLWan, frames: int) -> None:
    pixels_BCFHW = torch.rand(2, 3, frames, 32, 48) * 2 - 1
    moments = encode_moments(vae, pixels_BCFHW)
    assert torch.allclose(moments, vae.encode(pixels_BCFHW).latent_dist.parameters, atol=1e-5)
    latents = moments[:, :4]
    decoded = decode_pixels(vae, latents)
    assert decoded.shape[2] >= frames
    assert torch.allclose(decoded.clamp(-1, 1), vae.decode(latents).sample, atol=1e-5)


def test_normalised_latents_are_mean_and_deviation_per_channel() -> None:
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=2, num_res_blocks=1, dim_mult=[1, 1], temperal_downsample=[True],
        latents_mean=[0.5, -1.0], latents_std=[2.0, 0.5],
    )  # fmt: skip
    latents = torch.ones(1, 2, 1, 2, 2)
    assert normalised(vae, latents)[0, :, 0, 0, 0].tolist() == [0.25, 4.0]
    assert torch.equal(denormalised(vae, normalised(vae, latents)), latents)


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (5, 2), (17, 5), (81, 21)])
def test_latent_frames(frames: int, latents: int) -> None:
    assert latent_frames(frames) == latents
