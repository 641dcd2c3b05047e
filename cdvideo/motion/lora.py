"""Motion LoRAs (arXiv 2307.04725, section 4.3): small changes of motion modules, for movements of the camera."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from cdvideo.base.checkpoint import SUFFIXES, read_tensors
from cdvideo.errors import UserError
from cdvideo.motion.checkpoints import rename
from cdvideo.motion.modules import MotionModules

logger = logging.getLogger(__name__)

# As AnimateDiff and MotionDirector have it (attn1.processor.to_q_lora.down, ff.net.processor.2_lora.down); as diffusers
# had it (attn1.to_q.lora.down) and kohya's scripts (attn1.to_q.lora_down); as PEFT has it (attn1.to_q.lora_A).
_FORMS = (
    re.compile(r"(?P<layer>.+)\.processor\.(?P<leaf>\w+)_lora\.(?P<side>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.(?P<leaf>\w+)\.lora[._](?P<side>down|up|A|B)(\.\w+)?\.weight"),
)
_ALPHA = re.compile(r"(?P<layer>.+)\.(?P<leaf>\w+)\.alpha")
_DOWN = ("down", "A")
_IN_FOLDERS = ("diffusion_pytorch_model", "pytorch_lora_weights", "adapter_model")  # as diffusers publishes them


@torch.no_grad()
def fold_motion_lora(
    motion: MotionModules, path: Path, *, strength: float = 1.0, report: Callable[[str], object] = logger.info
) -> None:
    """Adds a motion LoRA to the weights of motion modules, in place: W + strength * up @ down.

    Args:
        path: a .ckpt or .safetensors file, as released for AnimateDiff v2, trained by MotionDirector or converted for
            diffusers; or a folder with one.
        report: is told in a line how many tensors found their place.

    Raises:
        UserError: another kind of file, a key without a place in these motion modules, or a LoRA without effect.
    """
    path = _file_in(path) if path.is_dir() else path
    tensors = read_tensors(path)
    if not any("motion_modules." in name and "lora" in name for name in tensors):
        raise UserError(
            f"{path.name} holds {'a LoRA for the image model' if 'lora' in ' '.join(tensors) else 'no motion LoRA'}",
            allowed="a motion LoRA for AnimateDiff, such as v2_lora_ZoomIn.ckpt",
            do="choose another file with --motion-lora; LoRAs for the image model are given with --concept",
        )
    linears = {name: module for name, module in motion.named_modules() if isinstance(module, nn.Linear)}
    pairs = _pairs(tensors, linears, path)
    if not any(up_CR.any() and down_RC.any() for up_CR, down_RC in pairs.values()):
        raise UserError(f"{path.name} changes nothing", allowed="a trained motion LoRA", do="choose another file")
    for name, (up_CR, down_RC) in pairs.items():
        weight = linears[name].weight
        weight += (strength * up_CR @ down_RC).to(weight.device, weight.dtype)
    report(f"motion LoRA {path}: matched {len(tensors)}/{len(tensors)}, strength {strength:g}")


def _file_in(folder: Path) -> Path:
    """The folder's one file of weights, or the one that is called as diffusers calls it."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    usual = [file for file in files if file.stem in _IN_FOLDERS]
    best = usual or files
    if len({file.stem for file in best}) != 1:
        raise UserError(
            f"{folder} holds {', '.join(file.name for file in files) or 'no file of weights'}",
            allowed=f"a folder with one motion LoRA, or one called {_IN_FOLDERS[0]}.safetensors",
            do=f"name the file: --motion-lora {files[0]}" if files else "name another folder, or a file",
        )
    return max(best, key=lambda file: file.suffix == ".safetensors")


def _pairs(tensors: dict[str, Tensor], linears: dict[str, nn.Linear], path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(up_CR, down_RC) for each linear layer that the file changes, float32; every tensor of the file is in one."""
    sides: dict[str, dict[str, Tensor]] = {}
    strangers = []
    for key, tensor in tensors.items():
        name, side = _place(key)
        if name not in linears or side in sides.get(name, ()) or not _fits(linears[name], side, tensor):
            strangers.append(key)
        else:
            sides.setdefault(name, {})[side] = tensor.float()
    strangers += [f"half a pair at {name}" for name, found in sides.items() if not {"up", "down"} <= found.keys()]
    strangers += [
        f"ranks that differ at {name}"
        for name, found in sides.items()
        if {"up", "down"} <= found.keys() and found["up"].shape[1] != len(found["down"])
    ]
    if strangers:
        hint = " (it was made for AnimateDiff v2, which has a middle block)" if "mid_block" in strangers[0] else ""
        raise UserError(
            f"{path.name}: {len(strangers)} of {len(tensors)} keys have no place in these motion modules, "
            f"such as {strangers[0][:80]}{hint}",
            allowed="a motion LoRA made for the motion modules that are given with --motion",
            do="choose motion modules and a motion LoRA of the same version",
        )
    broken = [name for name, found in sides.items() if not all(tensor.isfinite().all() for tensor in found.values())]
    if broken:
        raise UserError(f"{path.name}: {broken[0]} is not finite", allowed="finite numbers", do="fetch it again")
    return {name: (found["up"] * _scale(found), found["down"]) for name, found in sides.items()}


def _scale(found: Mapping[str, Tensor]) -> float:
    """alpha / R, as kohya's scripts have it, where the file tells alpha; of AnimateDiff's own it is 1."""
    rank = len(found["down"])
    return (float(found["alpha"].flatten()[0]) or rank) / rank if "alpha" in found else 1.0


def _fits(linear: nn.Linear, side: str, tensor: Tensor) -> bool:
    if side == "alpha":
        return tensor.numel() == 1 and not tensor.is_complex()
    at = int(side == "down")
    return tensor.ndim == 2 and tensor.is_floating_point() and tensor.shape[at] == linear.weight.shape[at]


def _place(key: str) -> tuple[str, str]:
    """The linear layer that a key of a LoRA changes, and which part it is (up, down, alpha); "" for other keys."""
    name = rename(key.removeprefix("unet."))
    for form in (*_FORMS, _ALPHA):
        if found := form.fullmatch(name):
            leaf = "to_out.0" if found["leaf"] == "to_out" else found["leaf"]
            side = "alpha" if form is _ALPHA else "down" if found["side"] in _DOWN else "up"
            return f"{found['layer']}.{leaf}", side
    return "", ""
