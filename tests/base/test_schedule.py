from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler

from cdvideo.base.schedule import (
    add_noise,
    make_scheduler,
    snr,
    training_target,
    truncated_v_weights,
)

V_CONFIG = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
EPSILON_CONFIG = {**V_CONFIG, "prediction_type": "epsilon", "rescale_betas_zero_snr": False}
STEPS = torch.tensor([0, 1, 250, 500, 900, 999])


@pytest.mark.parametrize("config", [V_CONFIG, EPSILON_CONFIG])
@pytest.mark.parametrize("shape", [(6, 4, 8, 8), (6, 3, 4, 8, 8)])
def test_noise_and_target_are_diffusers_own(config: dict[str, object], shape: tuple[int, ...]) -> None:
    scheduler = make_scheduler(config)
    latents, noise = torch.randn(shape), torch.randn(shape)
    torch.testing.assert_close(
        add_noise(scheduler, latents, noise, STEPS), scheduler.add_noise(latents, noise, STEPS), atol=1e-6, rtol=0
    )
    own = noise if config["prediction_type"] == "epsilon" else scheduler.get_velocity(latents, noise, STEPS)
    torch.testing.assert_close(training_target(scheduler, latents, noise, STEPS), own, atol=1e-6, rtol=0)


def test_the_last_step_is_pure_noise() -> None:
    scheduler = make_scheduler(V_CONFIG)
    latents, noise, last = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([999])
    assert snr(scheduler, last).item() == 0
    assert torch.equal(add_noise(scheduler, latents, noise, last), noise)
    assert torch.equal(training_target(scheduler, latents, noise, last), -latents)


def test_truncated_weights_keep_the_last_step_and_fall_at_clean_ones() -> None:
    scheduler = make_scheduler(V_CONFIG)
    weights = truncated_v_weights(scheduler, torch.arange(1000), gamma=5.0)
    assert weights[999] == 1 and weights[500] == 1
    assert (weights.diff() >= -1e-6).all() and weights[0] < 0.01


KINDS = [("ddim", DDIMScheduler), ("dpm++", DPMSolverMultistepScheduler), ("lcm", LCMScheduler)]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_perfect_model_is_sampled_back_to_its_picture(name: str, kind: type) -> None:
    scheduler = make_scheduler(V_CONFIG, name, seeds=[0])
    assert isinstance(scheduler, kind)
    picture = torch.randn(1, 4, 8, 8)
    scheduler.set_timesteps(25)
    assert scheduler.timesteps[0] == 999
    teacher, latents = make_scheduler(V_CONFIG), torch.randn(1, 4, 8, 8)
    for timestep in scheduler.timesteps:
        alpha = teacher.alphas_cumprod[timestep]
        noise = (latents - alpha.sqrt() * picture) / (1 - alpha).sqrt()
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * picture
        latents = scheduler.step(velocity, timestep, latents).prev_sample
    torch.testing.assert_close(latents, picture, atol=2e-2, rtol=0)


def test_euler_brings_a_perfect_model_back_too() -> None:
    """Its latents keep their variance: x = picture + sigma * noise."""
    scheduler = make_scheduler(EPSILON_CONFIG, "euler")
    assert isinstance(scheduler, EulerDiscreteScheduler)
    picture, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    scheduler.set_timesteps(25)
    assert scheduler.timesteps[0] == 999
    latents = noise * scheduler.init_noise_sigma
    for index, timestep in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step((latents - picture) / scheduler.sigmas[index], timestep, latents).prev_sample
    torch.testing.assert_close(latents, picture, atol=2e-2, rtol=0)
