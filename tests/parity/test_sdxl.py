"""SDXL against diffusers' own pipelines: the same folder, the same noise, latents compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AnimateDiffSDXLPipeline, StableDiffusionXLPipeline, UNetMotionModel

from cdvideo.base.loader import Base
from cdvideo.base.prompts import encode_prompts, picture_sizes
from cdvideo.motion.modules import MotionModules
from cdvideo.motion.video_unet import VideoUNet
from cdvideo.sampling.denoise import draw_noise
from cdvideo.sampling.image import sample_images
from cdvideo.sampling.video import sample_video
from tests.parity.test_unet_motion_model import as_adapter, randomise
from tests.sdxl import peer_parts

pytestmark = pytest.mark.parity

PROMPT = "a photo of the dog surfing"


def keep_latents(_vae: Any, latents: torch.Tensor, *, chunk: int) -> torch.Tensor:
    return latents


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++"])
@pytest.mark.parametrize(("negative", "guidance"), [("", 4.0), ("snow", 4.0), ("", 1.0)])
@torch.no_grad()
def test_pictures_equal_sdxl_pipeline(
    tiny_sdxl: Base, monkeypatch: pytest.MonkeyPatch, scheduler: Any, negative: str, guidance: float
) -> None:
    monkeypatch.setattr("cdvideo.sampling.image.decode_latents", keep_latents)
    options: dict[str, Any] = {"width": 64, "height": 48}
    ours = sample_images(
        tiny_sdxl,
        [PROMPT],
        seeds=[5],
        negative_prompt=negative,
        guidance=guidance,
        scheduler=scheduler,
        steps=4,
        **options,
    )
    pipeline = StableDiffusionXLPipeline(**peer_parts(tiny_sdxl, scheduler), add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPT,
        negative_prompt=negative or None,
        guidance_scale=guidance,
        num_inference_steps=4,
        latents=draw_noise([5], (4, 6, 8)),
        output_type="latent",
        **options,
    ).images
    difference = (ours - theirs).abs().max().item()
    print(f"{scheduler}, negative {negative!r}: max abs difference of latents {difference:.2e}")
    assert theirs.std() > 0.1
    assert difference <= 1e-3


@torch.no_grad()
def test_sizes_matter(tiny_sdxl: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the comparison above would say nothing of them."""
    latents, text_BLD = draw_noise([1], (4, 8, 8)), torch.randn(1, 24, 192)
    added = {"text_embeds": torch.randn(1, 96), "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    one = tiny_sdxl.unet(latents, 500, text_BLD, added_cond_kwargs=added).sample
    added["time_ids"] = torch.tensor([[1024.0, 1024, 0, 0, 64, 64]])
    other = tiny_sdxl.unet(latents, 500, text_BLD, added_cond_kwargs=added).sample
    assert (one - other).abs().max() > 1e-3


def as_peer(base: Base, motion: MotionModules) -> UNetMotionModel:
    """diffusers' video model; `from_unet2d` leaves SDXL's `add_embedding` random, so it is given by hand."""
    peer = UNetMotionModel.from_unet2d(base.unet, as_adapter(motion)).eval()
    peer.add_embedding.load_state_dict(base.unet.add_embedding.state_dict())
    return peer


@pytest.fixture
def motion(tiny_sdxl: Base) -> MotionModules:
    made = MotionModules.for_unet(
        tiny_sdxl.unet, norm_mode="diffusers", use_motion_mid_block=False, motion_num_attention_heads=8
    )
    randomise(made, seed=2)
    return made.eval().requires_grad_(False)


@torch.no_grad()
def test_video_unet_equals_unet_motion_model(tiny_sdxl: Base, motion: MotionModules) -> None:
    peer = as_peer(tiny_sdxl, motion)
    latents_BFCHW = draw_noise([0, 1], (3, 4, 8, 6))
    text = encode_prompts(tiny_sdxl, [PROMPT, ""])
    added = text.added(picture_sizes(64, 48))
    ours = VideoUNet(tiny_sdxl.unet, motion)(latents_BFCHW, 321, text.hidden_BLD, added)
    text_NLD = text.hidden_BLD.repeat_interleave(3, dim=0)
    theirs = peer(latents_BFCHW.transpose(1, 2), 321, text_NLD, added_cond_kwargs=added).sample.transpose(1, 2)
    still = tiny_sdxl.unet(latents_BFCHW[:, 0], 321, text.hidden_BLD, added_cond_kwargs=added).sample
    difference = (ours - theirs).abs().max().item()
    print(f"max abs difference {difference:.2e}, motion's own effect {(theirs[:, 0] - still).abs().max():.2e}")
    assert (theirs[:, 0] - still).abs().max() > 0.05, "the motion modules must matter for this to compare anything"
    assert difference <= 1e-4


@torch.no_grad()
def test_films_equal_animatediff_sdxl_pipeline(
    tiny_sdxl: Base, motion: MotionModules, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[torch.Tensor] = []
    monkeypatch.setattr("cdvideo.sampling.video.decode_frames", lambda _base, latents, **_: kept.append(latents))
    options: dict[str, Any] = {"width": 64, "height": 48, "negative_prompt": "snow"}
    sample_video(tiny_sdxl, motion, PROMPT, seed=5, frames=3, guidance=4.0, steps=3, **options)
    parts = {**peer_parts(tiny_sdxl), "unet": tiny_sdxl.unet}
    pipeline = AnimateDiffSDXLPipeline(**parts, motion_adapter=as_adapter(motion))
    pipeline.unet.add_embedding.load_state_dict(tiny_sdxl.unet.add_embedding.state_dict())
    pipeline.set_progress_bar_config(disable=True)
    theirs_BCFHW = pipeline(
        PROMPT,
        guidance_scale=4.0,
        num_inference_steps=3,
        num_frames=3,
        latents=draw_noise([5], (3, 4, 6, 8)).transpose(1, 2),
        output_type="latent",
        **options,
    ).frames
    difference = (kept[0] - theirs_BCFHW[0].transpose(0, 1)).abs().max().item()
    print(f"max abs difference of latents {difference:.2e}")
    assert theirs_BCFHW.std() > 0.1
    assert difference <= 1e-3
