from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from cdvideo.base.latents import Vae, decode_latents, encode_pixels


@pytest.fixture
def kl() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.5, **BLOCKS)


BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def test_tiny_vae_is_scaled_both_ways(tiny_vae: AutoencoderTiny) -> None:
    tiny_vae.register_to_config(scaling_factor=0.25)
    pixels_BCHW = torch.rand(3, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        latents_BCHW = encode_pixels(tiny_vae, pixels_BCHW)
        raw_BCHW = tiny_vae.encode(pixels_BCHW).latents
        again_BCHW = decode_latents(tiny_vae, latents_BCHW)
        own_BCHW = tiny_vae.decode(raw_BCHW).sample.clamp(-1, 1)
    assert latents_BCHW.shape == (3, 4, 8, 8)
    assert torch.equal(latents_BCHW, 0.25 * raw_BCHW)
    torch.testing.assert_close(again_BCHW, own_BCHW)


def test_kl_vae_takes_the_mode_or_draws(kl: AutoencoderKL) -> None:
    pixels_BCHW = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        posterior = kl.encode(pixels_BCHW).latent_dist
        assert torch.equal(encode_pixels(kl, pixels_BCHW), 0.5 * posterior.mode())
        drawn = [encode_pixels(kl, pixels_BCHW, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("chunk", [1, 2, 5, 8])
def test_chunks_do_not_show(tiny_vae: Vae, chunk: int) -> None:
    latents_BCHW = torch.randn(5, 4, 8, 8)
    with torch.no_grad():
        pixels_BCHW = decode_latents(tiny_vae, 100 * latents_BCHW, chunk=chunk)
        torch.testing.assert_close(pixels_BCHW, decode_latents(tiny_vae, 100 * latents_BCHW, chunk=5))
    assert pixels_BCHW.shape == (5, 3, 64, 64) and pixels_BCHW.abs().max() <= 1
