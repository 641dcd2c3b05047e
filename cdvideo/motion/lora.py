"""Motion LoRAs (arXiv 2307.04725, section 4.3): small changes of motion modules, for movements of the camera."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from cdvideo.base.checkpoint import SUFFIXES, read_tensors
from cdvideo.errors import UserError
from cdvideo.motion.checkpoints import rename
from cdvideo.motion.modules import MotionModules

logger = logging.getLogger(__name__)

# As AnimateDiff has it (attn1.processor.to_q_lora.down), as diffusers had it (attn1.to_q.lora.down), as PEFT has it.
_FORMS = (
    re.compile(r"(?P<attention>.+)\.processor\.(?P<projection>to_[qkv]|to_out)_lora\.(?P<side>down|up)\.weight"),
    re.compile(r"(?P<attention>.+)\.(?P<projection>to_[qkv]|to_out\.0)\.lora\.(?P<side>down|up)\.weight"),
    re.compile(r"(?P<attention>.+)\.(?P<projection>to_[qkv]|to_out\.0)\.lora_(?P<side>A|B)(\.\w+)?\.weight"),
    # As MotionDirector has it (arXiv 2310.08465), which also tunes the layers between attentions.
    re.compile(r"(?P<attention>.+)\.(?P<projection>to_out)\.processor\.0_lora\.(?P<side>down|up)\.weight"),
    re.compile(r"(?P<attention>.+\.ff\.net\.0)\.(processor\.)?(?P<projection>proj)_lora\.(?P<side>down|up)\.weight"),
    re.compile(r"(?P<attention>.+\.ff\.net)\.(processor\.)?(?P<projection>2)_lora\.(?P<side>down|up)\.weight"),
)
_DOWN = ("down", "A")


@torch.no_grad()
def fold_motion_lora(
    motion: MotionModules, path: Path, *, strength: float = 1.0, report: Callable[[str], object] = logger.info
) -> None:
    """Adds a motion LoRA to the weights of motion modules, in place: W + strength * up @ down.

    Args:
        path: a .ckpt or .safetensors file, as released for AnimateDiff v2 or converted for diffusers, which keeps it in
            a folder of its own; or MotionDirector's temporal LoRA.
        report: is told in a line how many tensors found their place.

    Raises:
        UserError: another kind of file, a key without a place in these motion modules, or a LoRA without effect.
    """
    path = _file_of(path)
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


def _file_of(path: Path) -> Path:
    """The file itself, or a folder's one file of weights. Raises UserError for a folder of none or of several."""
    if not path.is_dir():
        return path
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    safe = [file for file in files if file.suffix.lower() == ".safetensors"] or files
    if len(safe) != 1:
        raise UserError(
            f"{path} holds {len(safe)} files of weights",
            allowed="a motion LoRA, or a folder with one file of weights",
            do="name one of its files with --motion-lora" if safe else "name another --motion-lora",
        )
    return safe[0]


def _pairs(tensors: dict[str, Tensor], linears: dict[str, nn.Linear], path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(up_CR, down_RC) for each linear layer that the file changes; every tensor of the file is in one."""
    ups: dict[str, Tensor] = {}
    downs: dict[str, Tensor] = {}
    strangers = []
    for key, tensor in tensors.items():
        name, is_down = _place(key)
        fits = name in linears and tensor.ndim == 2 and tensor.is_floating_point()
        if not fits or tensor.shape[int(is_down)] != linears[name].weight.shape[int(is_down)]:
            strangers.append(key)
        else:
            (downs if is_down else ups)[name] = tensor.float()
    strangers += [f"half a pair at {name}" for name in downs.keys() ^ ups.keys()]
    unequal = (name for name in downs.keys() & ups.keys() if len(downs[name]) != ups[name].shape[1])
    strangers += [f"a pair of two ranks at {name}" for name in unequal]
    if strangers:
        hint = " (it was made for AnimateDiff v2, which has a middle block)" if "mid_block" in strangers[0] else ""
        raise UserError(
            f"{path.name}: {len(strangers)} of {len(tensors)} keys have no place in these motion modules, "
            f"such as {strangers[0][:80]}{hint}",
            allowed="a motion LoRA made for the motion modules that are given with --motion",
            do="choose motion modules and a motion LoRA of the same version",
        )
    return {name: (ups[name], downs[name]) for name in ups}


def _place(key: str) -> tuple[str, bool]:
    """The linear layer that a key of a LoRA changes, and whether it is the half that narrows; "" for other keys."""
    name = rename(key.removeprefix("unet."))
    for form in _FORMS:
        if found := form.fullmatch(name):
            projection = "to_out.0" if found["projection"] == "to_out" else found["projection"]
            return f"{found['attention']}.{projection}", found["side"] in _DOWN
    return "", False
