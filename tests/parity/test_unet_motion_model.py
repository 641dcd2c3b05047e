"""VideoUNet against diffusers' UNetMotionModel, and against the image UNet that it wraps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel

from cdvideo.motion.config import MotionConfig
from cdvideo.motion.modules import MotionModules
from cdvideo.motion.video_unet import VideoUNet

pytestmark = pytest.mark.parity

ALL_CROSS: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}
STABLE_DIFFUSION_LIKE: dict[str, Any] = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
}
MIXED_DEPTHS: dict[str, Any] = {
    "block_out_channels": (16, 32, 48),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": (1, 2, 1),
    "use_linear_projection": True,
}


def make_unet(shape: dict[str, Any], seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        in_channels=4, out_channels=4, cross_attention_dim=24, attention_head_dim=2, norm_num_groups=8, **shape
    )
    return unet.eval().requires_grad_(False)


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Weights large enough that every motion module matters; the position tables stay."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15


def make_inputs(films: int, frames: int, size: tuple[int, int] = (8, 8)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents_BFCHW = torch.randn(films, frames, 4, *size, generator=generator)
    text_BLD = torch.randn(films, 5, 24, generator=generator)
    return latents_BFCHW, text_BLD


def as_adapter(motion: MotionModules) -> MotionAdapter:
    config = motion.config
    adapter = MotionAdapter(
        block_out_channels=config.block_out_channels,
        motion_layers_per_block=config.motion_layers_per_block,
        motion_transformer_layers_per_block=config.motion_transformer_layers_per_block,
        motion_num_attention_heads=config.motion_num_attention_heads,
        motion_norm_num_groups=config.motion_norm_num_groups,
        motion_max_seq_length=config.motion_max_seq_length,
        use_motion_mid_block=config.use_motion_mid_block,
    )
    adapter.load_state_dict(motion.state_dict(), strict=True)
    return adapter


@torch.no_grad()
def run_peer(unet: UNet2DConditionModel, motion: MotionModules, latents_BFCHW, timestep, text_BLD) -> torch.Tensor:
    peer = UNetMotionModel.from_unet2d(unet, as_adapter(motion)).eval()
    frames = latents_BFCHW.shape[1]
    text_NLD = text_BLD.repeat_interleave(frames, dim=0)
    return peer(latents_BFCHW.transpose(1, 2), timestep, text_NLD).sample.transpose(1, 2)


@pytest.mark.parametrize("mid_block", [True, False], ids=["mid", "no-mid"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (ALL_CROSS, {}),
        (STABLE_DIFFUSION_LIKE, {}),
        (MIXED_DEPTHS, {"motion_transformer_layers_per_block": 2, "motion_num_attention_heads": (2, 4, 8)}),
    ],
    ids=["all-cross", "sd-like", "mixed-depths"],
)
@torch.no_grad()
def test_equals_unet_motion_model(shape: dict[str, Any], options: dict[str, Any], mid_block: bool) -> None:
    unet = make_unet(shape)
    options = {"motion_num_attention_heads": 4, **options}
    motion = MotionModules.for_unet(unet, norm_mode="diffusers", use_motion_mid_block=mid_block, **options)
    randomise(motion, seed=2)
    latents_BFCHW, text_BLD = make_inputs(films=2, frames=5)

    ours = VideoUNet(unet, motion)(latents_BFCHW, 321, text_BLD)
    theirs = run_peer(unet, motion, latents_BFCHW, 321, text_BLD)

    still = unet(latents_BFCHW.flatten(0, 1), 321, text_BLD.repeat_interleave(5, dim=0)).sample.unflatten(0, (2, 5))
    difference = (ours - theirs).abs().max().item()
    print(f"max abs difference {difference:.2e}, motion's own effect {(theirs - still).abs().max().item():.2e}")
    assert (theirs - still).abs().max() > 0.05, "the motion modules must matter for this to compare anything"
    assert difference <= 1e-4


@torch.no_grad()
def test_odd_sizes_and_one_timestep_per_film() -> None:
    unet = make_unet(STABLE_DIFFUSION_LIKE)
    motion = MotionModules.for_unet(unet, norm_mode="diffusers", motion_num_attention_heads=2)
    randomise(motion, seed=3)
    latents_BFCHW, text_BLD = make_inputs(films=2, frames=3, size=(7, 10))
    timesteps_B = torch.tensor([10, 900])

    ours = VideoUNet(unet, motion)(latents_BFCHW, timesteps_B, text_BLD)
    theirs = run_peer(unet, motion, latents_BFCHW, timesteps_B, text_BLD)

    assert (ours - theirs).abs().max() <= 1e-4


@torch.no_grad()
def test_original_norm_is_diffusers_norm_on_a_film_of_one_frame() -> None:
    """With one frame, statistics per frame and over all frames are the same thing."""
    unet = make_unet(ALL_CROSS)
    original = MotionModules.for_unet(unet, norm_mode="original", motion_num_attention_heads=2)
    randomise(original, seed=4)
    one_BFCHW, text_BLD = make_inputs(films=2, frames=1)
    many_BFCHW, _ = make_inputs(films=2, frames=4)

    ours = VideoUNet(unet, original)(one_BFCHW, 5, text_BLD)
    assert (ours - run_peer(unet, original, one_BFCHW, 5, text_BLD)).abs().max() <= 1e-4
    ours = VideoUNet(unet, original)(many_BFCHW, 5, text_BLD)
    assert (ours - run_peer(unet, original, many_BFCHW, 5, text_BLD)).abs().max() > 1e-3


@torch.no_grad()
def test_original_norm_equals_peer_with_its_norm_taken_per_frame() -> None:
    """The peer's joint GroupNorm, replaced by AnimateDiff's own per-frame one, gives our "original" mode."""
    unet = make_unet(STABLE_DIFFUSION_LIKE)
    motion = MotionModules.for_unet(unet, norm_mode="original", motion_num_attention_heads=2)
    randomise(motion, seed=5)
    latents_BFCHW, text_BLD = make_inputs(films=1, frames=4)
    peer = UNetMotionModel.from_unet2d(unet, as_adapter(motion)).eval()

    class PerFrameNorm(torch.nn.Module):
        def __init__(self, norm: torch.nn.GroupNorm) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, hidden_BCFHW: torch.Tensor) -> torch.Tensor:
            return torch.stack([self.norm(frame) for frame in hidden_BCFHW.unbind(2)], dim=2)

    for block in [*peer.down_blocks, peer.mid_block, *peer.up_blocks]:
        for module in block.motion_modules:
            module.norm = PerFrameNorm(module.norm)

    theirs = peer(latents_BFCHW.transpose(1, 2), 77, text_BLD.repeat_interleave(4, dim=0)).sample.transpose(1, 2)
    ours = VideoUNet(unet, motion)(latents_BFCHW, 77, text_BLD)
    assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("norm_mode", ["original", "diffusers"])
@torch.no_grad()
def test_fresh_motion_is_the_image_unet(norm_mode: str, dtype: torch.dtype, tolerance: float) -> None:
    """Zero-initialised motion changes nothing.

    Two kernels differ for the last bit: the time embedding is computed once per film and not once per picture, and a
    frame alone goes through smaller matrix products than sixteen together. float64 shows that nothing else differs.
    """
    unet = make_unet(STABLE_DIFFUSION_LIKE).to(dtype)
    motion = MotionModules.for_unet(unet, norm_mode=norm_mode, motion_num_attention_heads=2).to(dtype)
    latents_BFCHW, text_BLD = (tensor.to(dtype) for tensor in make_inputs(films=2, frames=4))
    film_BFCHW = VideoUNet(unet, motion)(latents_BFCHW, 500, text_BLD)
    for b in range(2):
        for f in range(4):
            still_BCHW = unet(latents_BFCHW[b, f : f + 1], 500, text_BLD[b : b + 1]).sample
            difference = (film_BFCHW[b, f] - still_BCHW[0]).abs().max().item()
            print(f"{dtype} film {b} frame {f}: max abs difference {difference:.2e}")
            assert difference <= tolerance


@torch.no_grad()
def test_fresh_motion_is_bit_equal_where_the_kernels_are_the_same() -> None:
    """One time embedding for the whole folded batch in both walks: then not a bit differs."""
    unet = make_unet(STABLE_DIFFUSION_LIKE)
    motion = MotionModules.for_unet(unet, motion_num_attention_heads=2)
    latents_BFCHW, text_BLD = make_inputs(films=8, frames=1)
    film_BFCHW = VideoUNet(unet, motion)(latents_BFCHW, 500, text_BLD)
    assert torch.equal(film_BFCHW[:, 0], unet(latents_BFCHW[:, 0], 500, text_BLD).sample)


def test_keys_and_shapes_are_motion_adapters() -> None:
    for layers, mid in [(2, True), ((1, 2), False)]:
        config = MotionConfig(
            block_out_channels=(16, 32),
            motion_layers_per_block=layers,
            motion_num_attention_heads=4,
            motion_norm_num_groups=8,
            use_motion_mid_block=mid,
        )
        motion = MotionModules(config)
        adapter = as_adapter(motion)
        ours = {name: tensor.shape for name, tensor in motion.state_dict().items()}
        theirs = {name: tensor.shape for name, tensor in adapter.state_dict().items()}
        assert ours == theirs
        fresh = MotionAdapter(**adapter.config).state_dict()
        tables = [name for name in ours if name.endswith("pos_embed.pe")]
        assert tables
        for name in tables:
            assert torch.equal(MotionModules(config).state_dict()[name], fresh[name])


@pytest.mark.parametrize("mid_block", [True, False], ids=["v2", "v3"])
def test_stable_diffusion_sizes_have_the_keys_of_the_published_adapters(mid_block: bool) -> None:
    """The shapes of AnimateDiff's motion modules for Stable Diffusion 1.5, without their memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        motion = MotionModules.for_unet(unet, use_motion_mid_block=mid_block)
        adapter = MotionAdapter(use_motion_mid_block=mid_block)
    assert motion.config == MotionConfig(use_motion_mid_block=mid_block)
    VideoUNet(unet, motion)
    ours = {name: tensor.shape for name, tensor in motion.state_dict().items()}
    assert ours == {name: tensor.shape for name, tensor in adapter.state_dict().items()}
    millions = sum(parameter.numel() for parameter in motion.parameters()) / 1e6
    assert round(millions) == (453 if mid_block else 417)
