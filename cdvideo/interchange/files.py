"""What a file from elsewhere is: told by its keys, never by its name. Pickles are read through weights_only alone."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cdvideo.errors import UserError

OWN = "cdvideo concept"
KOHYA = "kohya LoRA"
DIFFUSERS = "diffusers LoRA"
PEFT = "PEFT LoRA"
TEXTUAL_INVERSION = "textual inversion"
CUSTOM_DIFFUSION = "Custom Diffusion"
DELTA = "Custom Diffusion delta"
READABLE = "a cdvideo concept, a kohya, diffusers or PEFT LoRA, a textual inversion, or a Custom Diffusion file"

_PEFT_PREFIX = "base_model.model."
_LORA_PARTS = (".lora_A.", ".lora_B.", ".lora.down.", ".lora.up.", "_lora.down.", "_lora.up.", ".lora_linear_layer.")
# What keys of other files contain, and what such files are.
_OTHER_KINDS = {
    "motion_modules.": "motion modules of AnimateDiff, or a LoRA for them (--motion takes motion modules)",
    "hada_w1": "a LoHa of LyCORIS",
    "lokr_w": "a LoKr of LyCORIS",
    "oft_": "an OFT adapter",
    "model.diffusion_model.": "a whole image model, or a part of one in its first layout",
    "ip_adapter.": "an IP-Adapter",
    "control_model.": "a ControlNet",
}


@dataclass(frozen=True)
class Foreign:
    """One file as it was read: what it holds, its header, and what kind of file it is."""

    path: Path
    kind: str
    content: Any  # a mapping of tensors, of mappings of tensors, or one tensor
    header: Mapping[str, str]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by their keys; nested keys joined by dots."""
        return dict(_flat("", self.content))


def read_foreign(path: Path) -> Foreign:
    """Reads a file and tells its kind.

    Raises:
        UserError: For a file that is missing, damaged, unsafe, or of no kind that can be read.
    """
    if not path.is_file():
        raise UserError(f"there is no concept file {path}", allowed=READABLE, do="correct the path")
    content, header = _read_pickle(path) if _is_pickle(path) else _read_safetensors(path)
    foreign = Foreign(path, tell_kind(path, content, header), content, header)
    broken = [key for key, tensor in foreign.tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{path}: {broken[0]} is not finite", allowed="finite numbers", do="fetch or train it again")
    return foreign


def tell_kind(path: Path, content: Any, header: Mapping[str, str]) -> str:
    """What kind of file this is, by its keys. Raises UserError for none that can be read."""
    if isinstance(content, Tensor):
        return TEXTUAL_INVERSION
    if "concept" in header:
        return OWN
    keys = [str(key) for key in content]
    if {"unet", "modifier_token"} & set(keys):
        return DELTA
    if {"string_to_param", "emb_params", "clip_l", "clip_g"} & set(keys):
        return TEXTUAL_INVERSION
    for part, what in _OTHER_KINDS.items():
        if found := next((key for key in dict(_flat("", content)) if part in key), None):
            raise UserError(f"{path} is {what}: it holds {found}", allowed=READABLE, do="name another file")
    if any("custom_diffusion" in key for key in keys):
        return CUSTOM_DIFFUSION
    if any(key.startswith(("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")) for key in keys):
        return KOHYA
    if any(part in key for key in keys for part in _LORA_PARTS):
        return PEFT if all(key.startswith(_PEFT_PREFIX) for key in keys) else DIFFUSERS
    if keys and all(_is_word(key, content[key]) for key in content):
        return TEXTUAL_INVERSION
    found = ", ".join(keys[:3]) or "nothing"
    raise UserError(
        f"{path} is none of the files that can be read: it holds {found}", allowed=READABLE, do="look inside"
    )


def _is_word(key: Any, rows: Any) -> bool:
    """Whether an entry can be a word and its rows: no more of them than a prompt takes, and no path for a name."""
    plausible = isinstance(rows, Tensor) and rows.ndim in (1, 2) and "." not in str(key)
    return plausible and rows.numel() <= 75 * rows.shape[-1]


def _is_pickle(path: Path) -> bool:
    """Whether a file begins as torch.save writes it, in a zip or as it did before 1.6. Safetensors begin with a length,
    which may look like either, and a JSON object."""
    with path.open("rb") as file:
        start = file.read(9)
    return start.startswith((b"PK", b"\x80")) and start[8:] != b"{"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is damaged or no file of weights ({error})", allowed=READABLE, do="copy or fetch it again"
        ) from error


def _read_pickle(path: Path) -> tuple[Any, dict[str, str]]:
    try:
        with torch.serialization.safe_globals([nn.ParameterDict]):  # in which textual inversion first kept its rows
            return torch.load(path, map_location="cpu", weights_only=True), {}
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise UserError(
            f"{path} is damaged, or a pickle that would run code ({str(error).splitlines()[0]})",
            allowed="tensors and plain values",
            do="ask for the file as .safetensors",
        ) from error


def _flat(prefix: str, content: Any) -> list[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        return [(prefix or "tensor", content)]
    if isinstance(content, (Mapping, nn.ParameterDict)):
        return [
            pair for key, value in content.items() for pair in _flat(f"{prefix}.{key}" if prefix else str(key), value)
        ]
    if isinstance(content, (list, tuple)):
        return [pair for index, value in enumerate(content) for pair in _flat(f"{prefix}.{index}", value)]
    return []
