"""The loop on models whose answers are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.base.schedule import make_scheduler
from cdvideo.errors import UserError
from cdvideo.sampling.denoise import denoise, draw_noise, guided_prompts, latent_size

CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "timestep_spacing": "trailing",
}


def alpha_bar(scheduler: Any, timestep: Tensor) -> Tensor:
    return scheduler.alphas_cumprod[timestep]


@pytest.mark.parametrize("name", ["ddim", "dpm++"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_model_of_one_picture_gives_that_picture(name: Any, prediction_type: str) -> None:
    """A model that knows the only picture x there is answers exactly; both samplers must then end at x."""
    scheduler = make_scheduler({**CONFIG, "prediction_type": prediction_type}, name)
    picture = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        signal, sigma = alpha_bar(scheduler, timestep).sqrt(), (1 - alpha_bar(scheduler, timestep)).sqrt()
        noise = (latents - signal * picture) / sigma
        return noise if prediction_type == "epsilon" else signal * noise - sigma * picture

    noise = draw_noise([1], (4, 8, 8))
    result = denoise(predict, noise, scheduler, steps=20, guidance=1)
    assert (result - picture).abs().max() < 0.02


def test_guidance_runs_the_negative_prompt_first_and_mixes() -> None:
    seen: list[int] = []
    scheduler = make_scheduler({**CONFIG, "prediction_type": "epsilon"}, "ddim")

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        seen.append(len(latents))
        assert torch.equal(latents[:2], latents[2:])
        return torch.cat([torch.zeros_like(latents[:2]), torch.ones_like(latents[2:])])

    def scaled(latents: Tensor, timestep: Tensor) -> Tensor:
        return torch.full_like(latents, 3.0)

    noise = draw_noise([1, 2], (4, 2, 2))
    guided = denoise(predict, noise, scheduler, steps=5, guidance=3.0)
    assert seen == [4] * 5
    assert torch.allclose(guided, denoise(scaled, noise, scheduler, steps=5, guidance=1))


def test_guided_prompts() -> None:
    assert guided_prompts(["a", "b"], "bad", 1) == ["a", "b"]
    assert guided_prompts(["a", "b"], "bad", 2) == ["bad", "bad", "a", "b"]


def test_noise_depends_on_its_seed_alone() -> None:
    noise = draw_noise([3, 4], (5, 4, 8, 8))
    assert torch.equal(noise[1:], draw_noise([4], (5, 4, 8, 8)))
    assert torch.equal(noise[:1, :2], draw_noise([3], (2, 4, 8, 8)))
    assert not torch.equal(noise[0], noise[1])
    assert noise.std().item() == pytest.approx(1, abs=0.05)


def test_latent_size(tiny_base: Base) -> None:
    assert latent_size(tiny_base, None, None) == (8, 8)
    assert latent_size(tiny_base, 96, None) == (8, 12)
    assert latent_size(replace(tiny_base, resolution=32), None, 64) == (8, 4)
    with pytest.raises(UserError, match=r"100 x 64[\s\S]*multiples of 8[\s\S]*96 x 64"):
        latent_size(tiny_base, 100, None)
