"""Whole pictures and films against diffusers' own pipelines, from the same folders and the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
)
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from safetensors.torch import save_file
from torch import Tensor

from cdvideo.base.loader import Base, load_base
from cdvideo.base.schedule import make_scheduler
from cdvideo.motion.files import load_motion, save_motion
from cdvideo.motion.modules import MotionModules
from cdvideo.sampling.config import AnimateConfig
from cdvideo.sampling.denoise import draw_noise
from cdvideo.sampling.image import sample_images
from cdvideo.sampling.sampler import settled
from cdvideo.sampling.video import sample_video
from tests.base.ldm_names import save_folder
from tests.motion.animatediff_names import make_adapter, official

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("two_threads")]

PROMPT, NEGATIVE = "a photo of the dog surfing", "snow"
OPTIONS: dict[str, Any] = {"negative_prompt": NEGATIVE, "guidance": 4.0, "steps": 5}


class FramesFirst(LCMScheduler):
    """Draws the noise of films frame by frame, as ours; diffusers' films have channels before frames."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, **_: Any) -> Any:
        turned = super().step(model_output.transpose(1, 2), timestep, sample.transpose(1, 2), generator)
        return LCMSchedulerOutput(turned.prev_sample.transpose(1, 2), turned.denoised.transpose(1, 2))


def peer_scheduler(config: dict[str, Any], name: str, *, films: bool = False) -> Any:
    if name == "lcm":
        return (FramesFirst if films else LCMScheduler).from_config(config)
    return make_scheduler(config, name)


def step_noise(seed: int) -> torch.Generator:
    """LCM's noise after each step, of a film of this seed."""
    return torch.Generator().manual_seed(seed ^ 0x9E3779B9)


def peer_parts(base: Base, scheduler: Any) -> dict[str, Any]:
    return {
        "vae": base.vae,
        "text_encoder": base.text_encoder,
        "tokenizer": base.tokenizer,
        "unet": base.unet,
        "scheduler": peer_scheduler(base.scheduler_config, scheduler),
        "feature_extractor": None,
    }


def save_random_motion(base: Base, folder: Path) -> None:
    motion = MotionModules.for_unet(base.unet, motion_num_attention_heads=2, norm_mode="diffusers")
    generator = torch.Generator().manual_seed(0)
    for parameter in motion.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    save_motion(motion, folder)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "euler", "lcm"])
def test_pictures_equal_stable_diffusion_pipeline(tiny_base: Base, scheduler: Any) -> None:
    ours = sample_images(tiny_base, [PROMPT], seeds=[5], scheduler=scheduler, **OPTIONS)
    pipeline = StableDiffusionPipeline(
        **peer_parts(tiny_base, scheduler), safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        guidance_scale=4.0,
        num_inference_steps=5,
        latents=draw_noise([5], (4, 8, 8)),
        generator=step_noise(5),
        output_type="pt",
    ).images
    difference = ((ours + 1) / 2 - theirs).abs().max().item()
    print(f"{scheduler}: max abs difference of pixels in [0, 1] {difference:.2e}")
    assert theirs.std() > 0.01
    assert difference <= 1e-4


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "euler", "lcm"])
def test_films_equal_animatediff_pipeline(tiny_base: Base, tmp_path: Path, scheduler: Any) -> None:
    """The same motion folder in both, in "diffusers" norm mode."""
    save_random_motion(tiny_base, tmp_path)
    motion = load_motion(tmp_path, device=torch.device("cpu"))
    ours = sample_video(tiny_base, motion, PROMPT, seed=5, frames=6, scheduler=scheduler, **OPTIONS)

    adapter = MotionAdapter.from_pretrained(tmp_path)
    pipeline = AnimateDiffPipeline(**peer_parts(tiny_base, scheduler), motion_adapter=adapter)
    pipeline.scheduler = peer_scheduler(tiny_base.scheduler_config, scheduler, films=True)
    pipeline.set_progress_bar_config(disable=True)
    (theirs,) = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        guidance_scale=4.0,
        num_inference_steps=5,
        num_frames=6,
        latents=draw_noise([5], (6, 4, 8, 8)).transpose(1, 2),
        generator=step_noise(5),
        output_type="np",
    ).frames
    levels = (theirs * 255).round().astype(int)
    difference = np.abs(levels - ours)
    print(f"{scheduler}: {(difference > 0).mean():.2e} of the values differ, by at most {difference.max()} of 255")
    assert levels.std() > 2
    assert difference.max() <= 1


def test_scheduler_folder_is_diffusers_own(tiny_base: Base) -> None:
    """What the base's folder says about noise reaches the sampler as it is."""
    ours = make_scheduler(tiny_base.scheduler_config, "ddim")
    theirs = DDIMScheduler.from_pretrained(tiny_base.path, subfolder="scheduler")
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)


# What the files' own pages say: steps, guidance, and the scheduler that is made from the base's.
DISTILLED: dict[str, tuple[str, dict[str, Any], int, float]] = {
    "animatediff_lightning_2step_comfyui.safetensors": ("euler", {"timestep_spacing": "trailing"}, 2, 1.0),
    "animatediff_lightning_8step_diffusers.safetensors": ("euler", {"timestep_spacing": "trailing"}, 8, 1.0),
    "AnimateLCM_sd15_t2v.ckpt": ("lcm", {}, 6, 2.0),
}


@pytest.mark.parametrize("file", DISTILLED)
def test_distilled_motion_modules_are_sampled_as_their_pages_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """The file alone says how: sampler, steps, guidance and betas."""
    name, options, steps, guidance = DISTILLED[file]
    base = load_base(str(save_folder(tmp_path / "base", 1)), device=torch.device("cpu"))
    adapter = make_adapter("v2", widths=base.unet.config.block_out_channels)
    weights = {n: t for n, t in official(adapter).items() if name != "lcm" or "pos_encoder" not in n}
    path = tmp_path / file
    (save_file if file.endswith("safetensors") else torch.save)({n: t.contiguous() for n, t in weights.items()}, path)

    motion = load_motion(path, device=torch.device("cpu"), norm_mode="diffusers")
    config = settled(AnimateConfig(prompt=PROMPT, frames=3, width=64, height=64), motion.config)
    assert (config.scheduler, config.steps, config.guidance) == (name, steps, guidance)
    monkeypatch.setattr("cdvideo.sampling.video.decode_frames", lambda _base, latents_FCHW, **_: latents_FCHW)
    how: dict[str, Any] = {"steps": config.steps, "guidance": config.guidance, "scheduler": config.scheduler}
    ours = torch.as_tensor(sample_video(base, motion, PROMPT, seed=5, frames=3, width=64, height=64, **how))

    pipeline = AnimateDiffPipeline(**peer_parts(base, "ddim"), motion_adapter=adapter)
    kind = FramesFirst if name == "lcm" else EulerDiscreteScheduler
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, beta_schedule="linear", **options)
    pipeline.set_progress_bar_config(disable=True)
    latents = draw_noise([5], (3, 4, 8, 8)).transpose(1, 2)
    theirs = (
        pipeline(
            PROMPT,
            negative_prompt="",
            guidance_scale=guidance,
            num_inference_steps=steps,
            num_frames=3,
            width=64,
            height=64,
            latents=latents,
            generator=step_noise(5),
            output_type="latent",
        )
        .frames[0]
        .transpose(0, 1)
    )
    difference = (ours - theirs).abs().max().item()
    print(f"{file}: max abs difference of latents {difference:.2e}, their spread {theirs.std():.2f}")
    assert theirs.std() > 0.1
    assert difference <= 1e-3
