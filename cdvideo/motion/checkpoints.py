"""AnimateDiff's motion modules in one file: told by their keys, renamed to those of diffusers' MotionAdapter.

The published versions differ in little, and ask for different settings (guoyww/AnimateDiff, configs/inference):

    version     position table   middle block   file names
    v1          24 rows          no             mm_sd_v14, mm_sd_v15
    v2          32 rows          yes            mm_sd_v15_v2; AnimateDiff-Lightning is distilled from it
    v3          32 rows          no             v3_sd15_mm
    AnimateLCM  none             yes            sd15_t2v_beta
    SDXL beta   32 rows          no             mm_sdxl_v10_beta, three blocks
    HotshotXL   24 rows          no             hsxl_temporal_layers, three blocks, names of its own

All of them were trained with GroupNorm over each frame; those for Stable Diffusion 1.x with linear betas, whatever the
image model has. Those for SDXL keep its betas, which are linear in their roots ("scaled_linear"; ldm and ComfyUI say
"linear"): HotshotXL exactly, the SDXL beta up to 0.02 in place of 0.012 (guoyww/AnimateDiff, branch sdxl). AnimateLCM
and Lightning are distilled: they take few steps of a sampler of their own (guoyww's README and ByteDance's, and
AnimateLCM's, have the settings). AnimateLCM also wants its own LoRA in the image model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdvideo.base.checkpoint import read_tensors
from cdvideo.errors import UserError
from cdvideo.motion.config import MotionConfig

LCM_MAX_FRAMES = 64  # its table is computed, so any length has one; ComfyUI-AnimateDiff-Evolved stops here

_HOTSHOT_TABLE = ".pos_encoder.positional_encoding"
_RENAMES = (
    (".temporal_attentions.", ".motion_modules."),
    (_HOTSHOT_TABLE, ".pos_encoder.pe"),
    (".temporal_transformer.", "."),
    (".attention_blocks.0.pos_encoder.", ".pos_embed."),
    (".attention_blocks.1.pos_encoder.", ".pos_embed."),
    (".attention_blocks.0.", ".attn1."),
    (".attention_blocks.1.", ".attn2."),
    (".norms.0.", ".norm1."),
    (".norms.1.", ".norm2."),
    (".ff_norm.", ".norm3."),
)

_WRAPPED = re.compile(r"^((module|_orig_mod|unet)\.)+")  # what trainers and torch.compile put before every name

# Numbers of two digits at most: who counts further has no motion modules, and would be counted after for long.
_LAYER = re.compile(r"down_blocks\.(\d{1,2})\.motion_modules\.(\d{1,2})\.", re.ASCII)
_MODULE = re.compile(r"(.{1,40}\.motion_modules\.\d{1,2})\.(?:transformer_blocks\.(\d{1,2})\.)?", re.ASCII)

# What a training of AnimateDiff's own script saves beside the motion modules.
_IMAGE_UNET = re.compile(
    r"conv_(in|out|norm_out)\.|time_embedding\.|((down|up)_blocks\.\d+|mid_block)\.(resnets|attentions|(down|up)samplers)\."
)


@dataclass(frozen=True)
class MotionFile:
    """Motion modules of a file, under MotionAdapter's names. `left_out`: tensors of an image UNet beside them."""

    version: str
    config: MotionConfig
    weights: Mapping[str, Tensor]
    left_out: int


def read_motion_file(path: Path) -> MotionFile:
    """Reads motion modules from one file, in AnimateDiff's, HotshotXL's or diffusers' keys.

    Raises:
        UserError: what is in the file is something else, and what; or it holds unknown keys.
    """
    tensors = {_WRAPPED.sub("", name): tensor for name, tensor in read_tensors(path).items()}
    _refuse_other_kinds(tensors, path)
    left_out = [name for name in tensors if _IMAGE_UNET.match(name)]
    weights: dict[str, Tensor] = {}
    for name in tensors.keys() - set(left_out):
        renamed = rename(name)
        if renamed in weights and not torch.equal(weights[renamed], tensors[name]):
            raise _not_motion(path, f"two different position tables for {renamed}")
        weights[renamed] = tensors[name]
    strangers = sorted(name for name in weights if ".motion_modules." not in name)
    if strangers:
        raise _not_motion(path, f"{len(strangers)} unknown keys, such as {strangers[0]}")
    has_table = any(name.endswith(".pos_embed.pe") for name in weights)
    config = _config_from(weights, path)
    if any(name.endswith(_HOTSHOT_TABLE) for name in tensors):
        version, config = "HotshotXL (trained on films of 8 frames)", replace(config, joint_image_norms=True)
    else:
        version, config = as_trained(config, has_table=has_table, file_name=path.name)
    return MotionFile(version, config, weights, len(left_out))


def rename(name: str) -> str:
    """A key of AnimateDiff or HotshotXL as MotionAdapter has it; MotionAdapter's own keys stay."""
    for old, new in _RENAMES:
        name = name.replace(old, new)
    return name


def as_trained(config: MotionConfig, *, has_table: bool = True, file_name: str = "") -> tuple[str, MotionConfig]:
    """The version of AnimateDiff that has these keys, and the config with what that version was trained with.

    Lightning has the keys of v2, so it is known by its file's name alone, which also tells its steps; they are counted
    back from the last one (arXiv 2403.12706). So is AnimateLCM as diffusers has it, with a position table. In v1 the
    image model's own GroupNorms took their statistics over all frames (`use_inflated_groupnorm` came with v2), and so
    they do in what is for SDXL: in HotshotXL by its source, in the beta as ComfyUI-AnimateDiff-Evolved runs it.
    """
    if len(config.block_out_channels) == 3:
        betas: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_end": 0.02}
        return "AnimateDiff for SDXL, beta", replace(config, norm_mode="original", joint_image_norms=True, **betas)
    config = replace(config, norm_mode="original", beta_schedule="linear")
    name = file_name.lower()
    if not has_table or "animatelcm" in name:
        frames = config.motion_max_seq_length if has_table else LCM_MAX_FRAMES
        return "AnimateLCM", replace(config, motion_max_seq_length=frames, sampler="lcm", steps=6, guidance=2.0)
    if "lightning" in name:
        steps = int(found[1]) if (found := re.search(r"([1248])-?_?step", name)) else 4
        sampler: dict[str, Any] = {"sampler": "euler", "timestep_spacing": "trailing"}
        return "AnimateDiff-Lightning", replace(config, **sampler, steps=steps, guidance=1.0)
    if config.use_motion_mid_block:
        return "AnimateDiff v2", config
    if config.motion_max_seq_length <= 24:
        return "AnimateDiff v1", replace(config, joint_image_norms=True)
    return "AnimateDiff v3", config


def _config_from(weights: Mapping[str, Tensor], path: Path) -> MotionConfig:
    """The shape of motion modules, read from their keys. Heads and groups leave no trace: AnimateDiff has 8 and 32."""
    layers = _layers_per_block(weights)
    if not layers:
        raise _not_motion(path, f"motion modules under unknown names, such as {min(weights)[:80]}")
    norms = [weights.get(f"down_blocks.{b}.motion_modules.0.norm.weight") for b in range(len(layers))]
    flat = [name for name, tensor in weights.items() if name.endswith(".pos_embed.pe") and tensor.ndim != 3]
    if flat or any(norm is None or norm.ndim != 1 for norm in norms):
        raise _not_motion(
            path, f"a position table of another form ({flat[0][:80]})" if flat else "motion modules without a norm"
        )
    tables = {tensor.shape[1] for name, tensor in weights.items() if name.endswith(".pos_embed.pe")}
    depths = set(_depths(weights).values())
    if len(layers) not in (3, 4) or len(set(layers)) != 1 or len(tables) > 1 or len(depths) != 1:
        raise _not_motion(path, f"motion modules in {len(layers)} blocks of {layers} layers, tables of {tables} rows")
    return MotionConfig(
        block_out_channels=tuple(len(norm) for norm in norms if norm is not None),
        motion_layers_per_block=layers[0],
        motion_transformer_layers_per_block=depths.pop(),
        motion_max_seq_length=tables.pop() if tables else LCM_MAX_FRAMES,
        use_motion_mid_block=any(name.startswith("mid_block.") for name in weights),
    )


def _depths(names: Iterable[str]) -> dict[str, int]:
    """How many transformer blocks each motion module has."""
    depths: dict[str, int] = {}
    for name in names:
        if found := _MODULE.match(name):
            depths[found[1]] = max(depths.get(found[1], 0), 1 + int(found[2] or -1))
    return depths


def _layers_per_block(names: Iterable[str]) -> tuple[int, ...]:
    """Of each down block one more than its highest number; of blocks between those that there are, none."""
    layers: dict[int, int] = {}
    for name in names:
        if found := _LAYER.match(name):
            layers[int(found[1])] = max(layers.get(int(found[1]), 0), 1 + int(found[2]))
    return tuple(layers.get(block, 0) for block in range(1 + max(layers, default=-1)))


def _refuse_other_kinds(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Files that lie beside motion modules and are taken for them."""
    names = "\n".join(tensors)
    first = tensors.get("conv_in.weight")
    kinds = {
        "a motion LoRA, which changes motion modules and is none": "motion_modules." in names and "lora" in names,
        "a LoRA for the image model, as the domain adapter of AnimateDiff v3 is (v3_sd15_adapter)": "lora" in names,
        "a SparseCtrl encoder": "controlnet_cond_embedding." in names,
        "PIA, whose image model reads 9 channels": first is not None and first.shape[1:2] == (9,),
        "an image model in Stable Diffusion's keys": "model.diffusion_model." in names,
        "no motion modules": ".motion_modules." not in names and ".temporal_attentions." not in names,
    }
    for kind, is_it in kinds.items():
        if is_it:
            raise _not_motion(path, kind)


def _not_motion(path: Path, found: str) -> UserError:
    return UserError(
        f"{path.name} holds {found}",
        allowed="motion modules: AnimateDiff v1, v2, v3, Lightning or SDXL beta, AnimateLCM, HotshotXL",
        do="choose another file with --motion; motion LoRAs go to --motion-lora, LoRAs for images to --concept",
    )
