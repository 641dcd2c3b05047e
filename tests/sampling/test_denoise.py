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
from cdvideo.sampling.denoise import Start, denoise, draw_noise, guided_prompts, latent_size

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

    def predict(latents: Tensor, timestep: Tensor, _step: int) -> Tensor:
        signal, sigma = alpha_bar(scheduler, timestep).sqrt(), (1 - alpha_bar(scheduler, timestep)).sqrt()
        noise = (latents - signal * picture) / sigma
        return noise if prediction_type == "epsilon" else signal * noise - sigma * picture

    noise = draw_noise([1], (4, 8, 8))
    result = denoise(predict, noise, scheduler, steps=20, guidance=1)
    assert (result - picture).abs().max() < 0.02


def test_guidance_runs_the_negative_prompt_first_and_mixes() -> None:
    seen: list[int] = []
    scheduler = make_scheduler({**CONFIG, "prediction_type": "epsilon"}, "ddim")

    def predict(latents: Tensor, timestep: Tensor, _step: int) -> Tensor:
        seen.append(len(latents))
        assert torch.equal(latents[:2], latents[2:])
        return torch.cat([torch.zeros_like(latents[:2]), torch.ones_like(latents[2:])])

    def scaled(latents: Tensor, timestep: Tensor, _step: int) -> Tensor:
        return torch.full_like(latents, 3.0)

    noise = draw_noise([1, 2], (4, 2, 2))
    guided = denoise(predict, noise, scheduler, steps=5, guidance=3.0)
    assert seen == [4] * 5
    assert torch.allclose(guided, denoise(scaled, noise, scheduler, steps=5, guidance=1))


@pytest.mark.parametrize("name", ["ddim", "dpm++"])
def test_a_start_is_noised_as_of_its_step_and_the_rest_is_done(name: Any) -> None:
    """The model that knows the only picture there is finds it from any start; it is asked at the last steps alone."""
    scheduler = make_scheduler({**CONFIG, "prediction_type": "epsilon"}, name)
    clean, picture = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = draw_noise([1], (4, 8, 8))
    seen: list[tuple[int, float]] = []

    def predict(latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        signal, sigma = alpha_bar(scheduler, timestep).sqrt(), (1 - alpha_bar(scheduler, timestep)).sqrt()
        if not seen:
            assert torch.allclose(latents, signal * clean + sigma * noise, atol=1e-3)
        seen.append((step, timestep.item()))
        return (latents - signal * picture) / sigma

    result = denoise(predict, noise, scheduler, steps=20, guidance=1, start=Start(clean, 0.3))
    assert seen == [(step, scheduler.timesteps[step].item()) for step in range(14, 20)]
    assert (result - picture).abs().max() < 0.05


@pytest.mark.parametrize("name", ["ddim", "dpm++"])
def test_what_is_held_is_seen_at_each_steps_noise_and_comes_out_clean(name: Any) -> None:
    scheduler = make_scheduler({**CONFIG, "prediction_type": "epsilon"}, name)
    clean, noise = draw_noise([2], (4, 8, 8)), draw_noise([1], (4, 8, 8))
    held = torch.zeros(8, 1)
    held[:3] = 1

    def predict(latents: Tensor, timestep: Tensor, _step: int) -> Tensor:
        signal, sigma = alpha_bar(scheduler, timestep).sqrt(), (1 - alpha_bar(scheduler, timestep)).sqrt()
        assert torch.allclose(latents[..., :3, :], (signal * clean + sigma * noise)[..., :3, :], atol=1e-3)
        return torch.zeros_like(latents)

    result = denoise(predict, noise, scheduler, steps=6, guidance=1, start=Start(clean, 1.0, held))
    assert torch.equal(result[..., :3, :], clean[..., :3, :])
    assert (result - clean)[..., 3:, :].abs().min() > 0


def test_a_start_always_leaves_a_step_to_do() -> None:
    firsts = [Start(torch.zeros(1), strength).first_step(10) for strength in (0.01, 0.1, 0.55, 0.96, 1.0)]
    assert firsts == [9, 9, 4, 0, 0]


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


class OnDevice(Tensor):
    """A tensor that may not be looked at, as one on a GPU, which would have to be waited for."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__"), name
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler", "lcm"])
def test_no_step_waits_for_the_device(name: Any, guidance: float) -> None:
    scheduler = make_scheduler({**CONFIG, "prediction_type": "v_prediction"}, name, seeds=[1])
    steps: list[int] = []

    def predict(latents: Tensor, _timestep: Tensor, step: int) -> Tensor:
        assert isinstance(latents, OnDevice)
        steps.append(step)
        return 0.5 * latents

    noise = draw_noise([1], (4, 8, 8))
    expected = denoise(predict_half, noise, scheduler, steps=4, guidance=guidance)
    scheduler = make_scheduler({**CONFIG, "prediction_type": "v_prediction"}, name, seeds=[1])
    found = denoise(predict, noise.as_subclass(OnDevice), scheduler, steps=4, guidance=guidance)
    assert steps == [0, 1, 2, 3]
    assert torch.equal(found.as_subclass(Tensor), expected)
    with pytest.raises(AssertionError, match="item"):
        found.sum().item()


def predict_half(latents: Tensor, _timestep: Tensor, _step: int) -> Tensor:
    return 0.5 * latents
