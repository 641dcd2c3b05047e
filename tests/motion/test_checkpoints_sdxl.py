"""Motion modules for SDXL in one file: AnimateDiff's beta and HotshotXL, with the settings they were trained with."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import MotionAdapter, UNet2DConditionModel
from torch import Tensor

from cdvideo.errors import UserError
from cdvideo.motion.config import MotionConfig
from cdvideo.motion.files import load_motion, save_motion
from cdvideo.motion.modules import MotionModules
from cdvideo.motion.video_unet import VideoUNet
from tests import sdxl
from tests.motion.test_checkpoints import assert_equals, official, write

CPU = torch.device("cpu")
WIDTHS = (32, 64, 64)  # SDXL has 320, 640, 1280

# As HotshotXL's own modules are called (hotshot_xl/models/transformer_temporal.py).
HOTSHOT = """
down_blocks.0.temporal_attentions.0.norm.weight
down_blocks.0.temporal_attentions.1.proj_in.bias
down_blocks.2.temporal_attentions.0.transformer_blocks.0.attention_blocks.0.pos_encoder.positional_encoding
down_blocks.2.temporal_attentions.1.transformer_blocks.0.attention_blocks.1.to_out.0.weight
up_blocks.0.temporal_attentions.2.transformer_blocks.0.norms.1.weight
up_blocks.2.temporal_attentions.2.transformer_blocks.0.ff_norm.bias
""".split()


def make_adapter(frames: int, *, widths: tuple[int, ...] = WIDTHS) -> MotionAdapter:
    torch.manual_seed(0)
    adapter = MotionAdapter(
        block_out_channels=widths,
        motion_num_attention_heads=8,
        motion_max_seq_length=frames,
        use_motion_mid_block=False,
    )
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return adapter


def as_hotshot(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    renames = {".motion_modules.": ".temporal_attentions.", ".temporal_transformer.": "."}
    renames |= {".pos_encoder.pe": ".pos_encoder.positional_encoding"}
    return {functools.reduce(lambda n, r: n.replace(*r), renames.items(), name): t for name, t in weights.items()}


@torch.no_grad()
@pytest.mark.parametrize(
    ("frames", "said", "schedule"),
    [
        (
            32,
            "AnimateDiff for SDXL, beta, matched {0}/{0}, up to 32 frames, betas scaled_linear to 0.02",
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.02},
        ),
        (
            24,
            "HotshotXL (trained on films of 8 frames), matched {0}/{0}, up to 24 frames, betas as the base has them",
            {},
        ),
    ],
)
def test_motion_modules_for_sdxl(tmp_path: Path, frames: int, said: str, schedule: dict[str, Any]) -> None:
    adapter = make_adapter(frames)
    weights = as_hotshot(official(adapter)) if "HotshotXL" in said else official(adapter)
    if "HotshotXL" in said:
        assert set(HOTSHOT) <= weights.keys()
    reports: list[str] = []
    motion = load_motion(write(tmp_path / "sdxl.ckpt", weights), device=CPU, report=reports.append)
    assert_equals(motion, adapter)
    assert said.format(len(adapter.state_dict())) in reports[0] and "GroupNorm over each frame" in reports[0]
    assert motion.config.schedule == schedule and motion.config.joint_image_norms
    save_motion(motion, tmp_path / "ours")
    assert load_motion(tmp_path / "ours", device=CPU).config == motion.config

    unet = sdxl.make_unet(block_out_channels=WIDTHS, attention_head_dim=4, transformer_layers_per_block=(1, 1, 2))
    added = {"text_embeds": torch.randn(1, 96), "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    latents_BFCHW, text_BLD = torch.randn(1, 3, 4, 8, 8), torch.randn(1, 5, 192)
    film_BFCHW = VideoUNet(unet, motion)(latents_BFCHW, 10, text_BLD, added)
    still_BCHW = unet(latents_BFCHW[:, 0], 10, text_BLD, added_cond_kwargs=added).sample
    assert (film_BFCHW[:, 0] - still_BCHW).abs().max() > 1e-3
    with pytest.raises(UserError, match=f"1 to {motion.max_frames} frames"):
        VideoUNet(unet, motion)(torch.randn(1, 33, 4, 8, 8), 10, text_BLD, added)


def test_a_folder_of_diffusers_for_sdxl(tmp_path: Path) -> None:
    make_adapter(32).save_pretrained(tmp_path / "folder")
    assert load_motion(tmp_path / "folder", device=CPU).config.schedule["beta_end"] == 0.02


def test_they_do_not_fit_stable_diffusion_1(tmp_path: Path) -> None:
    image_unet = UNet2DConditionModel(block_out_channels=(32, 64, 64, 64), cross_attention_dim=24)
    motion = load_motion(write(tmp_path / "sdxl.ckpt", official(make_adapter(32))), device=CPU)
    with pytest.raises(UserError, match=r"\(32, 64, 64\)[\s\S]*\(32, 64, 64, 64\)[\s\S]*were trained for this base"):
        VideoUNet(image_unet, motion)


def test_the_published_sizes_for_sdxl() -> None:
    """mm_sdxl_v10_beta's, without their memory."""
    with torch.device("meta"):
        adapter = MotionAdapter(block_out_channels=(320, 640, 1280), use_motion_mid_block=False)
        motion = MotionModules(MotionConfig(block_out_channels=(320, 640, 1280), use_motion_mid_block=False))
    ours = {name: tensor.shape for name, tensor in motion.state_dict().items()}
    assert ours == {name: tensor.shape for name, tensor in adapter.state_dict().items()}
    assert round(sum(parameter.numel() for parameter in motion.parameters()) / 1e6) == 237
