"""Motion modules on disk: folders that diffusers' MotionAdapter also reads and writes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from cdvideo.errors import UserError
from cdvideo.motion.config import MotionConfig, NormMode
from cdvideo.motion.modules import MotionModules

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

# Ours alone. diffusers passes over config keys that start with an underscore, in silence.
_OWN_FIELDS = ("norm_mode", "trained_for")


def save_motion(motion: MotionModules, folder: Path) -> None:
    """Writes config.json and the weights, in the modules' own dtype, as MotionAdapter.from_pretrained reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"_class_name": "MotionAdapter", "_diffusers_version": version("diffusers")}
    for name, value in asdict(motion.config).items():
        config[f"_{name}" if name in _OWN_FIELDS else name] = value
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in motion.state_dict().items()}
    # Not save_file: what it writes may be read by its owner alone, whatever the umask allows.
    (folder / WEIGHTS_FILE).write_bytes(save(weights, metadata={"format": "pt"}))
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def load_motion(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    norm_mode: NormMode | None = None,
    report: Callable[[str], object] = logger.info,
) -> MotionModules:
    """Reads a MotionAdapter folder, ours or diffusers'; every key of the file must find its place and none may be left.

    Args:
        norm_mode: overrides what the folder says; a folder that says nothing holds an AnimateDiff checkpoint, and gets
            "original".
        report: is told in a line how many tensors of the file found their place.

    Returns:
        Motion modules in eval mode that ask for no gradient.

    Raises:
        UserError: no such folder, a config or a weight file that does not belong to motion modules.
    """
    config = _read_config(folder)
    if norm_mode is not None:
        config = replace(config, norm_mode=norm_mode)
    weights = _read_weights(folder)
    motion = MotionModules(config)
    matched = _check_weights(weights, motion, folder)
    report(f"motion {folder}: matched {matched}/{len(weights)}")
    # The position tables are constants: where a file does not store them, the computed ones stay.
    motion.load_state_dict({**motion.state_dict(), **weights})
    return motion.to(device, dtype).eval().requires_grad_(False)


def _read_config(folder: Path) -> MotionConfig:
    path = folder / CONFIG_FILE
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
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
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return MotionConfig(**given)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """The safetensors file, whatever variant (fp16, ...) its name says."""
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"), key=lambda path: (len(path.name), path.name))
    if not files:
        raise UserError(
            f"motion folder {folder} without weights",
            allowed=f"a folder with {WEIGHTS_FILE}",
            do="save the motion modules as safetensors there",
        )
    try:
        return load_file(files[0])
    except SafetensorError as error:
        raise UserError(
            f"{files[0]} can not be read ({error})",
            allowed="a whole safetensors file",
            do="fetch or train the motion modules again",
        ) from error


def _check_weights(weights: dict[str, Tensor], motion: MotionModules, folder: Path) -> int:
    """How many tensors have their place; all of the file's, or it raises UserError."""
    wanted = {name: tensor.shape for name, tensor in motion.state_dict().items()}
    matched = {name for name, tensor in weights.items() if wanted.get(name) == tensor.shape}
    missing = [name for name in wanted if name not in matched and not name.endswith("pos_embed.pe")]
    unknown = [name for name in weights if name not in matched]
    if missing or unknown:
        example = (unknown + missing)[0]
        raise UserError(
            f"motion weights in {folder}: matched {len(matched)}/{len(wanted)}, "
            f"{len(missing)} missing, {len(unknown)} unknown or of another shape (such as {example})",
            allowed="weights that fit the folder's config.json key by key",
            do="check that config.json and the weights belong together",
        )
    return len(matched)
