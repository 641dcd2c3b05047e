"""The embedded base in diffusers' hands: its pipelines load the folder and draw the pictures and films that we draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, MotionAdapter, StableDiffusionPipeline, UNetMotionModel

from cdvideo.base.loader import TINY_BASE, Base, load_base
from cdvideo.base.text import encode_text, tokenize
from cdvideo.motion.files import load_motion
from cdvideo.motion.modules import MotionModules
from cdvideo.motion.video_unet import VideoUNet
from cdvideo.sampling.denoise import draw_noise
from cdvideo.sampling.image import sample_images
from cdvideo.sampling.video import sample_video, to_uint8

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("two_threads")]

PROMPT = "a dog wearing headphones surfing"
CPU = torch.device("cpu")
CALL: dict[str, Any] = {"negative_prompt": "", "guidance_scale": 5.0, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base("tiny", device=CPU)


@pytest.fixture(scope="module")
def motion() -> MotionModules:
    return load_motion(TINY_BASE / "motion", device=CPU)


def latent_shape(base: Base) -> tuple[int, int, int]:
    return base.unet.config.in_channels, base.unet.config.sample_size, base.unet.config.sample_size


@torch.no_grad()
def test_video_unet_equals_unet_motion_model(base: Base, motion: MotionModules) -> None:
    assert motion.config.norm_mode == "diffusers"
    peer = UNetMotionModel.from_unet2d(base.unet, MotionAdapter.from_pretrained(TINY_BASE / "motion")).float().eval()
    latents_BFCHW = draw_noise([0, 1], (4, *latent_shape(base)))
    text_BLD = encode_text(base.text_encoder, tokenize(base.tokenizer, [PROMPT, ""])).hidden_BLD
    for timestep in (999, 500, 20):
        ours = VideoUNet(base.unet, motion)(latents_BFCHW, timestep, text_BLD)
        text_NLD = text_BLD.repeat_interleave(4, dim=0)
        theirs = peer(latents_BFCHW.transpose(1, 2), timestep, text_NLD).sample.transpose(1, 2)
        print(f"timestep {timestep}: max abs difference {(ours - theirs).abs().max():.2e}")
        assert theirs.std() > 0.1
        assert (ours - theirs).abs().max() <= 1e-4


def test_stable_diffusion_pipeline_draws_the_same_picture(base: Base) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(TINY_BASE).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    noise_BCHW = draw_noise([7], latent_shape(base))
    theirs = pipeline(PROMPT, latents=noise_BCHW, output_type="np", **CALL).images
    ours = to_uint8(sample_images(base, [PROMPT], seeds=[7], steps=3, guidance=5.0))
    assert np.abs((theirs * 255).round().astype(int) - ours).max() <= 1
    assert ours.std() > 20


def test_animatediff_pipeline_draws_the_same_film(base: Base, motion: MotionModules) -> None:
    adapter = MotionAdapter.from_pretrained(TINY_BASE / "motion").to(torch.float32)
    pipeline = AnimateDiffPipeline.from_pretrained(TINY_BASE, motion_adapter=adapter).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    noise_BCFHW = draw_noise([7], (4, *latent_shape(base))).transpose(1, 2)
    (theirs,) = pipeline(PROMPT, num_frames=4, latents=noise_BCFHW, output_type="np", **CALL).frames
    ours = sample_video(base, motion, PROMPT, seed=7, frames=4, steps=3, guidance=5.0)
    assert np.abs((theirs * 255).round().astype(int) - ours).max() <= 1
    assert ours.std() > 20
