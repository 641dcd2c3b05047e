"""Sampler, steps and guidance: as asked for, else as the motion modules were made for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cdvideo.base.loader import Base
from cdvideo.base.schedule import SamplerName, make_scheduler
from cdvideo.errors import UserError
from cdvideo.motion.checkpoints import as_trained
from cdvideo.motion.config import MotionConfig
from cdvideo.sampling.config import AnimateConfig
from cdvideo.sampling.image import sample_images
from cdvideo.sampling.sampler import described, settled, untried

MADE: dict[str, MotionConfig | None] = {
    "none": None,
    "v2": as_trained(MotionConfig(), file_name="mm_sd_v15_v2.ckpt")[1],
    "lightning": as_trained(MotionConfig(), file_name="animatediff_lightning_8step_diffusers.safetensors")[1],
    "lcm": as_trained(MotionConfig(), has_table=False)[1],
    "lcm folder": as_trained(MotionConfig(), file_name="AnimateLCM")[1],
}


@pytest.mark.parametrize(
    ("motion", "asked", "chosen", "said"),
    [
        ("none", {}, ("ddim", 25, 5.0), "sampling: ddim, 25 steps, guidance 5"),
        ("v2", {"steps": 30}, ("ddim", 30, 5.0), "sampling: ddim, 30 steps, guidance 5"),
        ("v2", {"scheduler": "lcm", "steps": 6}, ("lcm", 6, 5.0), "sampling: lcm, 6 steps, guidance 5"),
        ("lightning", {}, ("euler", 8, 1.0), "euler, 8 steps, guidance 1, as the motion modules were made for"),
        (
            "lightning",
            {"guidance": 2.5},
            ("euler", 8, 2.5),
            "guidance 2.5; the motion modules were made for euler, 8, 1",
        ),
        ("lcm", {}, ("lcm", 6, 2.0), "lcm, 6 steps, guidance 2, as the motion modules were made for"),
        ("lcm folder", {"scheduler": "ddim"}, ("ddim", 25, 5.0), "ddim, 25 steps, guidance 5; the motion modules"),
        ("lcm", {"scheduler": "euler", "steps": 8}, ("euler", 8, 5.0), "euler, 8 steps, guidance 5; the motion"),
        ("lightning", {"scheduler": "dpm++"}, ("dpm++", 25, 5.0), "dpm++, 25 steps, guidance 5; the motion"),
    ],
)
def test_what_is_chosen_and_said(motion: str, asked: dict[str, Any], chosen: tuple[Any, ...], said: str) -> None:
    config = settled(AnimateConfig(prompt="a dog", **asked), MADE[motion])
    assert (config.scheduler, config.steps, config.guidance) == chosen
    assert said in described(config, MADE[motion])


@pytest.mark.parametrize(
    ("file", "steps"),
    [("AnimateDiff-Lightning-2-step", 2), ("animatediff_lightning_1step_comfyui", 1), ("lightning", 4)],
)
def test_lightning_s_file_tells_its_steps(file: str, steps: int) -> None:
    assert as_trained(MotionConfig(), file_name=file)[1].steps == steps


def test_lcm_has_fifty_steps() -> None:
    with pytest.raises(UserError, match="51 steps of LCM's sampler"):
        settled(AnimateConfig(prompt="a dog", steps=51), MADE["lcm"])


def test_lcm_s_noise_follows_from_the_seed_alone(tiny_base: Base) -> None:
    """Neither what was drawn before nor the company in the batch changes a picture."""
    options: dict[str, Any] = {"scheduler": "lcm", "steps": 4, "guidance": 2.0}
    alone = sample_images(tiny_base, ["a dog"], seeds=[7], **options)
    torch.manual_seed(123)
    both = sample_images(tiny_base, ["a cat", "a dog"], seeds=[3, 7], **options)
    assert (both[1] - alone[0]).abs().max() <= 1e-4
    assert torch.equal(sample_images(tiny_base, ["a dog"], seeds=[7], **options), alone)
    assert (sample_images(tiny_base, ["a dog"], seeds=[8], **options) - alone).abs().max() > 1e-2


def test_lcm_adds_noise_that_it_did_not_start_from() -> None:
    from cdvideo.sampling.denoise import draw_noise

    scheduler = make_scheduler({"beta_schedule": "scaled_linear"}, "lcm", seeds=[5])
    scheduler.set_timesteps(4)
    first = draw_noise([5], (1000,))
    stepped = scheduler.step(torch.zeros(1, 1000), scheduler.timesteps[0], torch.zeros(1, 1000)).prev_sample
    assert stepped.std() > 0.5
    assert torch.corrcoef(torch.stack([first[0], stepped[0]]))[0, 1].abs() < 0.15


@pytest.mark.parametrize("speed", ["balanced", "fast"])
@pytest.mark.parametrize(("motion", "asked"), [("lcm", {}), ("v2", {"scheduler": "lcm", "steps": 8})])
def test_no_forecast_goes_through_fresh_noise(motion: str, asked: dict[str, Any], speed: str) -> None:
    with pytest.raises(UserError, match=r"with the sampler lcm, which adds new noise at every step"):
        settled(AnimateConfig(prompt="a dog", speed=speed, **asked), MADE[motion])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, None),
        ({"speed": "exact", "guidance": 12.0}, None),
        ({"guidance": 6.0, "steps": 30}, None),
        ({"guidance": 7.5}, "not at guidance 7.5:"),
        ({"steps": 50}, "not at 50 steps:"),
        ({"scheduler": "dpm++", "steps": 8, "guidance": 7.5}, "not at guidance 7.5 and 8 steps of dpm++:"),
        ({"scheduler": "dpm++", "steps": 15}, None),
    ],
)
def test_presets_are_told_to_be_untried_where_they_are(asked: dict[str, Any], said: str | None) -> None:
    told = untried(settled(AnimateConfig(prompt="a dog", **{"speed": "balanced", **asked}), None))
    assert told is None if said is None else told is not None and said in told and "\n" not in told


LEADING: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "clip_sample": False,
}


@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler"])
@pytest.mark.parametrize("steps", [170, 334, 499, 501, 600, 999, 1000])
def test_many_steps_begin_at_the_noise(name: SamplerName, steps: int) -> None:
    """Counted up from the first timestep, 600 of 1000 would end at 600, and 1000 beyond the last."""
    scheduler = make_scheduler(LEADING, name, steps=steps)
    scheduler.set_timesteps(steps)
    first = int(scheduler.timesteps[0])
    assert 900 <= first <= 999 and len(scheduler.timesteps) == steps and int(scheduler.timesteps[-1]) <= 6
    latents = torch.randn(1, 4, 2, 2)
    for timestep in scheduler.timesteps[-3:] if name == "ddim" else scheduler.timesteps:
        latents = scheduler.step(torch.zeros_like(latents), timestep, latents).prev_sample
    assert latents.isfinite().all()


@pytest.mark.parametrize("steps", [1, 8, 20, 25, 30, 50, 100, 200, 250, 500])
def test_usual_numbers_of_steps_are_spaced_as_ever(steps: int) -> None:
    with_steps, without = make_scheduler(LEADING, steps=steps), make_scheduler(LEADING)
    for scheduler in (with_steps, without):
        scheduler.set_timesteps(steps)
    assert torch.equal(with_steps.timesteps, without.timesteps)
