"""The walk over films: by reference, differentiable in the motion modules alone, and clear about what it can not do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from cdvideo.errors import UserError
from cdvideo.motion.modules import MotionModules
from cdvideo.motion.video_unet import VideoUNet, joint_norms


def make_unet(**options: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**shape, **options}).eval().requires_grad_(False)


def make_motion(unet: UNet2DConditionModel, *, zero: bool = False, **options: Any) -> MotionModules:
    torch.manual_seed(1)
    motion = MotionModules.for_unet(unet, motion_num_attention_heads=2, **options)
    if not zero:
        for parameter in motion.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    return motion


def make_inputs(frames: int, films: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(films, frames, 4, 8, 8, generator=generator), torch.randn(films, 5, 24, generator=generator)


def test_adds_no_second_set_of_weights() -> None:
    unet = make_unet()
    motion = make_motion(unet)
    video_unet = VideoUNet(unet, motion)
    assert video_unet.unet is unet
    assert not isinstance(video_unet, torch.nn.Module)
    assert not {id(p) for p in unet.parameters()} & {id(p) for p in motion.parameters()}


@torch.no_grad()
def test_what_changes_in_the_image_unet_is_in_the_film() -> None:
    unet = make_unet()
    video_unet = VideoUNet(unet, make_motion(unet))
    latents_BFCHW, text_BLD = make_inputs(frames=3)
    before = video_unet(latents_BFCHW, 10, text_BLD)
    unet.up_blocks[1].attentions[0].transformer_blocks[0].attn2.to_v.weight.add_(0.5)
    assert not torch.equal(before, video_unet(latents_BFCHW, 10, text_BLD))


def test_gradient_reaches_every_motion_weight_and_nothing_else() -> None:
    unet = make_unet()
    motion = make_motion(unet)
    latents_BFCHW, text_BLD = make_inputs(frames=3, films=2)
    VideoUNet(unet, motion)(latents_BFCHW, torch.tensor([5, 700]), text_BLD).square().mean().backward()
    without = [
        name for name, parameter in motion.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == []
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_fresh_motion_can_leave_zero() -> None:
    """Zero proj_out blocks the gradient of everything before it, but gets one itself, so training starts."""
    unet = make_unet()
    motion = make_motion(unet, zero=True)
    latents_BFCHW, text_BLD = make_inputs(frames=3)
    VideoUNet(unet, motion)(latents_BFCHW, 5, text_BLD).square().mean().backward()
    moved = {
        name for name, parameter in motion.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert moved == {name for name, _ in motion.named_parameters() if ".proj_out." in name}


@torch.no_grad()
def test_films_in_a_batch_do_not_see_each_other() -> None:
    unet = make_unet()
    for options in ({"norm_mode": "original"}, {"norm_mode": "diffusers"}, {"joint_image_norms": True}):
        video_unet = VideoUNet(unet, make_motion(unet, **options))
        latents_BFCHW, text_BLD = make_inputs(frames=4, films=3)
        together = video_unet(latents_BFCHW, 10, text_BLD)
        alone = torch.cat([video_unet(latents_BFCHW[b : b + 1], 10, text_BLD[b : b + 1]) for b in range(3)])
        assert (together - alone).abs().max() <= 1e-5


@torch.no_grad()
def test_frames_of_a_film_see_each_other() -> None:
    unet = make_unet()
    video_unet = VideoUNet(unet, make_motion(unet))
    latents_BFCHW, text_BLD = make_inputs(frames=4)
    changed_BFCHW = latents_BFCHW.clone()
    changed_BFCHW[:, 3] += 1
    assert not torch.allclose(
        video_unet(latents_BFCHW, 10, text_BLD)[:, 0], video_unet(changed_BFCHW, 10, text_BLD)[:, 0]
    )


@pytest.mark.parametrize("frames", [0, 9])
def test_refuses_films_that_the_position_table_does_not_reach(frames: int) -> None:
    unet = make_unet()
    video_unet = VideoUNet(unet, make_motion(unet, motion_max_seq_length=8))
    latents_BFCHW, text_BLD = make_inputs(frames=frames)
    with pytest.raises(UserError, match=rf"{frames} frames[\s\S]*1 to 8 frames"):
        video_unet(latents_BFCHW, 10, text_BLD)


def test_refuses_motion_of_another_base() -> None:
    motion = make_motion(make_unet(block_out_channels=(16, 48)))
    with pytest.raises(UserError, match=r"\(16, 48\)[\s\S]*\(16, 32\)"):
        VideoUNet(make_unet(), motion)


def test_refuses_unets_of_another_family() -> None:
    unet = make_unet(num_class_embeds=3)
    with pytest.raises(UserError, match="num_class_embeds"):
        VideoUNet(unet, make_motion(unet))


@torch.no_grad()
def test_joint_norms_are_groupnorm_over_whole_films() -> None:
    """AnimateDiff v1: a resnet's norms see (B, C, F, H, W) tensors, and so does the norm at the output."""
    unet = make_unet()
    resnet = unet.down_blocks[0].resnets[0]
    hidden_NCHW, time_ND = torch.randn(6, 16, 8, 8), torch.randn(6, 64)

    def over_films(norm: torch.nn.GroupNorm, tensor_NCHW: torch.Tensor) -> torch.Tensor:
        tensor_BCFHW = tensor_NCHW.reshape(2, 3, *tensor_NCHW.shape[1:]).transpose(1, 2)
        normed = torch.nn.functional.group_norm(tensor_BCFHW, 8, norm.weight, norm.bias, norm.eps)
        return normed.transpose(1, 2).reshape(tensor_NCHW.shape)

    silu = torch.nn.functional.silu
    inner = resnet.conv1(silu(over_films(resnet.norm1, hidden_NCHW)))
    inner = inner + resnet.time_emb_proj(silu(time_ND))[:, :, None, None]
    expected = hidden_NCHW + resnet.conv2(silu(over_films(resnet.norm2, inner)))
    with joint_norms(unet, num_frames=3):
        joint = resnet(hidden_NCHW, time_ND)
    assert (joint - expected).abs().max() <= 1e-5
    assert (joint - resnet(hidden_NCHW, time_ND)).abs().max() > 1e-3, "the norms are as before afterwards"


@torch.no_grad()
def test_a_film_of_one_frame_has_the_same_norms_either_way() -> None:
    unet = make_unet()
    latents_BFCHW, text_BLD = make_inputs(frames=4)
    apart, joint = (VideoUNet(unet, make_motion(unet, joint_image_norms=joint)) for joint in (False, True))
    one_frame = latents_BFCHW[:, :1]
    assert (apart(one_frame, 10, text_BLD) - joint(one_frame, 10, text_BLD)).abs().max() <= 1e-5
    assert (apart(latents_BFCHW, 10, text_BLD) - joint(latents_BFCHW, 10, text_BLD)).abs().max() > 1e-3


def gradients(motion: MotionModules, video_unet: VideoUNet) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of all motion weights, and how many numbers were kept for them."""
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    latents_BFCHW, text_BLD = make_inputs(frames=3, films=2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = video_unet(latents_BFCHW, torch.tensor([10, 500]), text_BLD).square().mean()
    loss.backward()
    found = {name: parameter.grad for name, parameter in motion.named_parameters() if parameter.grad is not None}
    motion.zero_grad()
    return found, kept


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("mid_block", [False, True])
def test_gradient_checkpointing_changes_memory_alone(joint: bool, mid_block: bool) -> None:
    unet = make_unet()
    motion = make_motion(unet, joint_image_norms=joint, use_motion_mid_block=mid_block)
    video_unet = VideoUNet(unet, motion)
    plain, kept = gradients(motion, video_unet)
    motion.gradient_checkpointing = True
    checkpointed, kept_then = gradients(motion, video_unet)
    assert plain.keys() == checkpointed.keys() == dict(motion.named_parameters()).keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    assert any(gradient.abs().max() > 1e-6 for gradient in plain.values())
    assert kept_then < 0.3 * kept
