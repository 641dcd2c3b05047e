"""An image UNet that draws films: its own blocks, with a motion module after each (resnet, attention) pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cdvideo.errors import UserError
from cdvideo.motion.modules import MotionModules

Apart = Callable[[Callable[[], Tensor]], Tensor]  # from what computes one copy's prediction to those of all


@dataclass
class DeepFeature:
    """What the inner layers gave last, for steps that leave them out (DeepCache, arXiv 2312.00858)."""

    layers: int
    """How many of the last up layers, and as few of the first down layers, are computed at every step."""
    hidden_NCHW: Tensor | None = None
    """None makes the next call compute all layers."""


class VideoUNet:
    """Walks an image UNet by reference over films (arXiv 2307.04725, section 4.2).

    Owns no weights: whatever sits in `unet` (adapters, attention processors) is in the film, and training `motion`
    through a frozen `unet` works by calling this.

    Raises:
        UserError: the motion modules have other widths than the UNet, or the UNet is of a kind whose extra
            conditioning this walk does not know.
    """

    def __init__(self, unet: UNet2DConditionModel, motion: MotionModules) -> None:
        motion.config.check_fits(unet)
        _check_kind(unet)
        self.unet = unet
        self.motion = motion

    def __call__(
        self,
        latents_BFCHW: Tensor,
        timestep: Tensor | int,
        text_BLD: Tensor | None,
        added: Mapping[str, Tensor] | None = None,
        *,
        copies: int = 1,
        apart: Apart | None = None,
        deep: DeepFeature | None = None,
    ) -> Tensor:
        """Predicts what the base was trained to predict (noise or velocity), for whole films.

        Args:
            latents_BFCHW: noisy latents.
            timestep: one for all films, or timesteps_B.
            text_BLD: encoded prompts, one per film; None when the cross-attentions read a compiled prompt.
            added: what SDXL's UNet reads beside the text, its `added_cond_kwargs`, one for each film or for each of its
                frames.
            copies: how many prompts read each film: with 2, the prompts are those of all films, then others for all of
                them, and what comes before the first attention is computed once; not with `added`.
            apart: called with what computes the prediction of one of the copies, for which this thread then has to read
                that copy's prompts; it returns those of all. None computes them in one batch.
            deep: the inner layers are left out where it holds what they gave, and else their output is put into it.

        Returns:
            prediction_BFCHW, `copies` times as many as latents.

        Raises:
            UserError: more frames than the motion modules' position table has.
        """
        num_frames = latents_BFCHW.shape[1]
        self._check_frames(num_frames)
        if self.motion.config.joint_image_norms:
            with joint_norms(self.unet, num_frames):
                return self._walk(latents_BFCHW, timestep, text_BLD, added, copies, apart, deep)
        return self._walk(latents_BFCHW, timestep, text_BLD, added, copies, apart, deep)

    def _walk(
        self,
        latents_BFCHW: Tensor,
        timestep: Tensor | int,
        text_BLD: Tensor | None,
        added: Mapping[str, Tensor] | None,
        copies: int,
        apart: Apart | None,
        deep: DeepFeature | None,
    ) -> Tensor:
        num_frames = latents_BFCHW.shape[1]
        unet, motion = self.unet, self.motion

        time_BD = unet.time_embedding(unet.get_time_embed(sample=latents_BFCHW, timestep=timestep))
        if added is not None:
            assert copies == 1, "SDXL's time embedding differs between prompts"
            added_RD = unet.get_aug_embed(time_BD, text_BLD, added)
            time_BD = time_BD.repeat_interleave(len(added_RD) // len(time_BD), dim=0) + added_RD
        text_NLD = None if text_BLD is None else text_BLD.repeat_interleave(num_frames, dim=0)

        run = self._layer_runner(num_frames)

        def resnet(module: nn.Module, hidden_NCHW: Tensor) -> Tensor:
            return run(module, hidden_NCHW, time_BD.repeat_interleave(len(hidden_NCHW) // len(time_BD), dim=0))

        def attend(hidden_NCHW: Tensor, attention: nn.Module | None, motion_module: nn.Module | None) -> Tensor:
            if attention is not None:
                hidden_NCHW = attention(hidden_NCHW, encoder_hidden_states=text_NLD, return_dict=False)[0]
            return hidden_NCHW if motion_module is None else motion_module(hidden_NCHW, num_frames)

        downs, ups = _downs(unet, motion), _ups(unet, motion)
        inner = 0 if deep is None else max(len(ups) - deep.layers, 0)  # up layers that a deep feature stands for
        kept_NCHW = None if deep is None else deep.hidden_NCHW
        if kept_NCHW is not None:
            downs = downs[: len(ups) - inner - 1]

        def onwards(skip_NCHW: Tensor, hidden_NCHW: Tensor) -> Tensor:
            """From the first resnet on."""
            skips = [skip_NCHW]
            for index, parts in enumerate(downs):
                if len(parts) == 1:
                    hidden_NCHW = parts[0](hidden_NCHW)
                else:
                    hidden_NCHW = resnet(parts[0], hidden_NCHW) if index else hidden_NCHW
                    hidden_NCHW = run(attend, hidden_NCHW, *parts[1:])
                skips.append(hidden_NCHW)

            def up(hidden_NCHW: Tensor, parts: Sequence[Any]) -> Tensor:
                hidden_NCHW = resnet(parts[0], torch.cat([hidden_NCHW, skips.pop()], dim=1))
                hidden_NCHW = run(attend, hidden_NCHW, *parts[1:3])
                # The next skip says the size, so that latents of odd height or width find their way back.
                return hidden_NCHW if parts[3] is None else parts[3](hidden_NCHW, skips[-1].shape[-2:])

            if kept_NCHW is None:
                first, *others = unet.mid_block.resnets
                hidden_NCHW = resnet(first, hidden_NCHW)
                for other, attention, motion_module in _layers(others, unet.mid_block, motion.mid_block):
                    hidden_NCHW = resnet(other, run(attend, hidden_NCHW, attention, motion_module))
                for parts in ups[:inner]:
                    hidden_NCHW = up(hidden_NCHW, parts)
            else:
                hidden_NCHW = kept_NCHW
            if deep is not None:
                deep.hidden_NCHW = hidden_NCHW
            for parts in ups[inner:]:
                hidden_NCHW = up(hidden_NCHW, parts)

            if unet.conv_norm_out is not None:
                hidden_NCHW = unet.conv_act(unet.conv_norm_out(hidden_NCHW))
            return unet.conv_out(hidden_NCHW).unflatten(0, (-1, num_frames))

        skip_NCHW = unet.conv_in(latents_BFCHW.flatten(0, 1))
        hidden_NCHW = resnet(downs[0][0], skip_NCHW) if downs else skip_NCHW
        if apart is not None:
            return apart(partial(onwards, skip_NCHW, hidden_NCHW))
        return onwards(_repeated(skip_NCHW, copies), _repeated(hidden_NCHW, copies))

    def _layer_runner(self, num_frames: int) -> Callable[..., Tensor]:
        """Calls a layer, `run(layer, *inputs)`: plainly, or so that its activations are computed anew for gradients."""
        if not (self.motion.gradient_checkpointing and torch.is_grad_enabled()):
            return lambda layer, *inputs: layer(*inputs)
        if not self.motion.config.joint_image_norms:
            return partial(checkpoint, use_reentrant=False)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), joint_norms(self.unet, num_frames)  # the backward pass runs outside of `__call__`'s

        return partial(checkpoint, use_reentrant=False, context_fn=contexts)

    def _check_frames(self, num_frames: int) -> None:
        if not 1 <= num_frames <= self.motion.max_frames:
            raise UserError(
                f"a film of {num_frames} frames",
                allowed=f"1 to {self.motion.max_frames} frames: the length of the motion modules' position table",
                do=f"ask for --frames {self.motion.max_frames} or fewer",
            )


@contextmanager
def joint_norms(unet: UNet2DConditionModel, num_frames: int) -> Iterator[None]:
    """Within the block, the GroupNorms of the UNet's resnets and output take their statistics over whole films.

    So AnimateDiff v1 was trained: its 5-dimensional tensors went through torch's GroupNorm as they were.
    """

    def apart(_norm: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return inputs[0].unflatten(0, (-1, num_frames)).transpose(1, 2)

    def together(_norm: nn.Module, _inputs: object, normed_BCFHW: Tensor) -> Tensor:
        return normed_BCFHW.transpose(1, 2).flatten(0, 1)

    resnets = [module for module in unet.modules() if isinstance(module, ResnetBlock2D)]
    norms = [norm for resnet in resnets for norm in (resnet.norm1, resnet.norm2)] + [unet.conv_norm_out]
    hooks = [
        hook for norm in norms for hook in (norm.register_forward_pre_hook(apart), norm.register_forward_hook(together))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _repeated(hidden_NCHW: Tensor, times: int) -> Tensor:
    return hidden_NCHW if times == 1 else torch.cat([hidden_NCHW] * times)


def _downs(unet: UNet2DConditionModel, motion: MotionModules) -> list[tuple[Any, ...]]:
    """The way down, one entry for each skip after the first: (resnet, attention, motion module), or (downsampler,)."""
    downs: list[tuple[Any, ...]] = []
    for block, motion_block in zip(unet.down_blocks, motion.down_blocks, strict=True):
        downs += [*_layers(block.resnets, block, motion_block), *((each,) for each in block.downsamplers or ())]
    return downs


def _ups(unet: UNet2DConditionModel, motion: MotionModules) -> list[tuple[Any, ...]]:
    """The way up, one entry for each skip: (resnet, attention, motion module, upsampler after it or None)."""
    ups: list[tuple[Any, ...]] = []
    for block, motion_block in zip(unet.up_blocks, motion.up_blocks, strict=True):
        ups += [(*layer, None) for layer in _layers(block.resnets, block, motion_block)]
        ups[-1] = (*ups[-1][:3], *(block.upsamplers or (None,)))
    return ups


def _layers(resnets: Sequence[nn.Module], block: Any, motion_block: Any) -> Iterator[tuple[Any, Any, Any]]:
    """(resnet, spatial attention, motion module) of a block; None where it has none."""
    none = [None] * len(resnets)
    attentions = block.attentions if getattr(block, "has_cross_attention", False) else none
    motion_modules = none if motion_block is None else motion_block.motion_modules
    return zip(resnets, attentions, motion_modules, strict=True)


def _check_kind(unet: UNet2DConditionModel) -> None:
    """The walk repeats UNet2DConditionModel.forward for Stable Diffusion 1, 2 and XL, and for no other."""
    unknown = ["class_embed_type", "encoder_hid_dim_type", "time_embedding_act_fn", "time_cond_proj_dim"]
    extra = [name for name in unknown if unet.config.get(name) is not None]
    extra += ["addition_embed_type"] if unet.config.get("addition_embed_type") not in (None, "text_time") else []
    extra += [name for name in ("center_input_sample", "num_class_embeds") if unet.config.get(name)]
    blocks = {*unet.config["down_block_types"], unet.config["mid_block_type"], *unet.config["up_block_types"]}
    known = {"CrossAttnDownBlock2D", "DownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D", "CrossAttnUpBlock2D"}
    extra += sorted(str(name) for name in blocks - known)
    if extra:
        raise UserError(
            f"an image model with {', '.join(extra)}",
            allowed="UNets of Stable Diffusion 1, 2 and XL",
            do="choose another base",
        )
