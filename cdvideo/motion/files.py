"""Motion modules on disk: folders as diffusers' MotionAdapter has them, both ways, and AnimateDiff's single files."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import save
from torch import Tensor

from cdvideo.base.checkpoint import read_tensors
from cdvideo.config import config_from
from cdvideo.errors import UserError
from cdvideo.motion.checkpoints import as_trained, read_motion_file
from cdvideo.motion.config import MotionConfig, NormMode
from cdvideo.motion.modules import MotionModules
from cdvideo.runs import atomic_path

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

# Ours alone. diffusers passes over config keys that start with an underscore, in silence.
_OWN_FIELDS = (
    *("norm_mode", "beta_schedule", "beta_end", "timestep_spacing", "sampler", "steps", "guidance"),
    *("joint_image_norms", "trained_for"),
)


def save_motion(motion: MotionModules, folder: Path) -> None:
    """Writes config.json and the weights, in the modules' own dtype, as MotionAdapter.from_pretrained reads them.

    Each file is written whole or not at all. Raises UserError for a folder that can not be written.
    """
    config: dict[str, Any] = {"_class_name": "MotionAdapter", "_diffusers_version": version("diffusers")}
    for name, value in asdict(motion.config).items():
        config[f"_{name}" if name in _OWN_FIELDS else name] = value
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in motion.state_dict().items()}
    # Not save_file: what it writes may be read by its owner alone, whatever the umask allows.
    with atomic_path(folder / WEIGHTS_FILE) as part:
        part.write_bytes(save(weights, metadata={"format": "pt"}))
    with atomic_path(folder / CONFIG_FILE) as part:
        part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_motion(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    norm_mode: NormMode | None = None,
    report: Callable[[str], object] = logger.info,
) -> MotionModules:
    """Reads motion modules; every key of the file must find its place and none may be left.

    Args:
        path: a MotionAdapter folder, ours or diffusers', or a file of AnimateDiff's (.ckpt, .safetensors).
        norm_mode: overrides what the folder or the file's version says.
        report: is told in a line what was found, how many tensors found their place, and what follows from the version.

    Returns:
        Motion modules in eval mode that ask for no gradient.

    Raises:
        UserError: no such path, something other than motion modules, a config or weights that do not belong together.
    """
    if not path.exists():
        raise UserError(
            f"there is no motion {'file' if path.suffix else 'folder'} {path}",
            allowed="a MotionAdapter folder, or a file of AnimateDiff's (.ckpt, .safetensors)",
            do="correct the path of --motion",
        )
    # Weights that lie beside their config are read with it.
    if path.is_file() and not (
        path.name.startswith("diffusion_pytorch_model") and (path.parent / CONFIG_FILE).is_file()
    ):
        found = read_motion_file(path)
        kind, config, weights, left_out = found.version, found.config, found.weights, found.left_out
    else:
        kind, config = _read_config(path.parent if path.is_file() else path)
        weights, left_out = _read_weights(path), 0
    if norm_mode is not None:
        config = replace(config, norm_mode=norm_mode)
    with init_empty_weights():
        motion = MotionModules(config)
    matched = _check_weights(weights, motion, path)
    # The position tables are constants: where a file does not store them, the computed ones stay.
    motion.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, strict=False, assign=True)
    report(
        f"motion {path}: {kind}, matched {matched}/{len(weights)}, {_settings(config)}"
        + (f"; {left_out} tensors of an image model in the file are not used" if left_out else "")
    )
    return motion.to(device, dtype).eval().requires_grad_(False)


def _settings(config: MotionConfig) -> str:
    """What the version asks of the sampler, in words."""
    parts = [f"up to {config.motion_max_seq_length} frames", f"betas {config.beta_schedule or 'as the base has them'}"]
    if config.beta_schedule and config.beta_end != 0.012:
        parts[-1] += f" to {config.beta_end:g}"
    if config.timestep_spacing:
        parts.append(f"{config.timestep_spacing} steps")
    if config.sampler:
        parts.append(f"made for {config.steps} steps of {config.sampler} with guidance {config.guidance:g}")
    parts.append(f"GroupNorm {'over each frame' if config.norm_mode == 'original' else 'over all frames'}")
    if config.joint_image_norms:
        parts.append("the image model's over all frames")
    return ", ".join(parts)


def _read_config(folder: Path) -> tuple[str, MotionConfig]:
    """What kind of motion modules the folder has, and their config; without fields of ours they are AnimateDiff's."""
    path = folder / CONFIG_FILE
    try:
        raw: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"motion folder {folder}: can not read {CONFIG_FILE} ({error})",
            allowed="a folder as diffusers' MotionAdapter saves it",
            do="check the path given with --motion",
        ) from error
    if raw.get("_class_name") != "MotionAdapter" or raw.get("conv_in_channels"):
        raise UserError(
            f"{path} describes {raw.get('_class_name')!r}, conv_in_channels {raw.get('conv_in_channels')!r}",
            allowed="a MotionAdapter without an input convolution of its own",
            do="choose another folder with --motion",
        )
    names = {
        f"_{field.name}" if field.name in _OWN_FIELDS else field.name: field.name for field in fields(MotionConfig)
    }
    given: dict[str, Any] = {names[key]: value for key, value in raw.items() if key in names}
    try:
        config = config_from(MotionConfig, given)
    except ValueError as error:
        raise UserError(
            f"{path}: {error}",
            allowed="what diffusers' MotionAdapter has there",
            do="get the folder again, or choose another with --motion",
        ) from error
    if any(f"_{name}" in raw for name in _OWN_FIELDS):
        return "motion modules", config
    return as_trained(config, file_name=folder.name)


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The safetensors file, or the folder's one, whatever variant (fp16, ...) its name says."""
    folder = path.parent if path.is_file() else path
    files = (
        [path]
        if path.is_file()
        else sorted(folder.glob("diffusion_pytorch_model*.safetensors"), key=lambda path: (len(path.name), path.name))
    )
    if not files:
        raise UserError(
            f"motion folder {folder} without weights",
            allowed=f"a folder with {WEIGHTS_FILE}",
            do="save the motion modules as safetensors there",
        )
    return read_tensors(files[0])


def _check_weights(weights: Mapping[str, Tensor], motion: MotionModules, path: Path) -> int:
    """How many tensors have their place; all of the file's, or it raises UserError."""
    wanted = {name: tensor.shape for name, tensor in motion.state_dict().items()}
    matched = {name for name, tensor in weights.items() if wanted.get(name) == tensor.shape}
    missing = [name for name in wanted if name not in matched and not name.endswith("pos_embed.pe")]
    unknown = [name for name in weights if name not in matched]
    if missing or unknown:
        example = (unknown + missing)[0]
        raise UserError(
            f"motion weights in {path}: matched {len(matched)}/{len(wanted)}, "
            f"{len(missing)} missing, {len(unknown)} unknown or of another shape (such as {example})",
            allowed="weights that fit AnimateDiff's keys, or the folder's config.json, key by key",
            do="check that the file is whole, and that a config.json beside it belongs to it",
        )
    return len(matched)
