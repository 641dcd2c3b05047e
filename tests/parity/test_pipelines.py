"""Whole pictures and films against diffusers' own pipelines, from the same folders and the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter, StableDiffusionPipeline

from cdvideo.base.loader import Base
from cdvideo.base.schedule import make_scheduler
from cdvideo.motion.files import load_motion, save_motion
from cdvideo.motion.modules import MotionModules
from cdvideo.sampling.denoise import draw_noise
from cdvideo.sampling.image import sample_images
from cdvideo.sampling.video import sample_video

pytestmark = pytest.mark.parity

PROMPT, NEGATIVE = "a photo of the dog surfing", "snow"
OPTIONS: dict[str, Any] = {"negative_prompt": NEGATIVE, "guidance": 4.0, "steps": 5}


def peer_parts(base: Base, scheduler: Any) -> dict[str, Any]:
    return {
        "vae": base.vae,
        "text_encoder": base.text_encoder,
        "tokenizer": base.tokenizer,
        "unet": base.unet,
        "scheduler": make_scheduler(base.scheduler_config, scheduler),
        "feature_extractor": None,
    }


def save_random_motion(base: Base, folder: Path) -> None:
    motion = MotionModules.for_unet(base.unet, motion_num_attention_heads=2, norm_mode="diffusers")
    generator = torch.Generator().manual_seed(0)
    for parameter in motion.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    save_motion(motion, folder)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++"])
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
        output_type="pt",
    ).images
    difference = ((ours + 1) / 2 - theirs).abs().max().item()
    print(f"{scheduler}: max abs difference of pixels in [0, 1] {difference:.2e}")
    assert theirs.std() > 0.01
    assert difference <= 1e-4


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++"])
def test_films_equal_animatediff_pipeline(tiny_base: Base, tmp_path: Path, scheduler: Any) -> None:
    """The same motion folder in both, in "diffusers" norm mode."""
    save_random_motion(tiny_base, tmp_path)
    motion = load_motion(tmp_path, device=torch.device("cpu"))
    ours = sample_video(tiny_base, motion, PROMPT, seed=5, frames=6, scheduler=scheduler, **OPTIONS)

    adapter = MotionAdapter.from_pretrained(tmp_path)
    pipeline = AnimateDiffPipeline(**peer_parts(tiny_base, scheduler), motion_adapter=adapter)
    pipeline.set_progress_bar_config(disable=True)
    (theirs,) = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        guidance_scale=4.0,
        num_inference_steps=5,
        num_frames=6,
        latents=draw_noise([5], (6, 4, 8, 8)).transpose(1, 2),
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
