"""What a file from elsewhere is: told by its keys, never by its name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from cdvideo.base.checkpoint import read_content
from cdvideo.errors import UserError
from cdvideo.interchange.identify import other_kind, other_lora
from cdvideo.interchange.names import LYCORIS_PARTS

OWN = "cdvideo concept"
KOHYA = "kohya LoRA"
LYCORIS = "LyCORIS"
DIFFUSERS = "diffusers LoRA"
PEFT = "PEFT LoRA"
COMFY = "ComfyUI LoRA"
CLONEOFSIMO = "LoRA of cloneofsimo/lora"
TEXTUAL_INVERSION = "textual inversion"
CUSTOM_DIFFUSION = "Custom Diffusion"
DELTA = "Custom Diffusion delta"
READABLE = (
    "a cdvideo concept, a LoRA of kohya, LyCORIS, diffusers, PEFT, ComfyUI or cloneofsimo, a textual inversion, or a "
    "Custom Diffusion file"
)
BUNDLED = "bundle_emb."  # before the words of embeddings that OneTrainer keeps within a LoRA
# The rows of one word for SDXL's two text encoders: of web UIs, of Replicate's trainer.
TWO_ROWS = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))
MOST_ROWS = 75  # what a prompt takes

_PEFT_PREFIX = "base_model.model."
_LORA_PARTS = (
    *(".lora_A", ".lora_B", ".lora.down.", ".lora.up.", "_lora.down.", "_lora.up.", ".lora_linear_layer."),
    *(".lora_down.", ".lora_up."),
)
_COMFY = ("diffusion_model.", "text_encoders.", "clip_l.", "clip_g.", "clip_h.")
_SIMO_KEY = re.compile(r"(?P<model>[\w]+):(?P<index>\d+):(?P<side>up|down)")
_LYCORIS_ENDS = tuple(f".{part}" for part in LYCORIS_PARTS)
_LEAVES = (".weight", ".bias", ".alpha", ".scale", ".running_mean", ".running_var", ".weight_v", ".weight_g")
_NARROWEST = 16  # channels of a text that may be one
_PIECE = 2**24  # numbers that are looked at at once


@dataclass(frozen=True)
class Foreign:
    """One file as it was read: what it holds, its header, and what kind of file it is."""

    path: Path
    kind: str
    content: Any  # a mapping of tensors, of mappings of tensors, a list of tensors, or one tensor
    header: Mapping[str, str]

    @cached_property
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
    content, header = read_content(path)
    foreign = Foreign(path, tell_kind(path, content, header), content, header)
    if not foreign.tensors and foreign.kind != TEXTUAL_INVERSION:  # whose own reader says that it has no rows
        raise _unknown(path, "it holds no tensor where its names promise some")
    for key, tensor in foreign.tensors.items():
        _check_numbers(foreign, key, tensor)
    return foreign


def _check_numbers(foreign: Foreign, key: str, tensor: Tensor) -> None:
    """Raises UserError for numbers that are not finite, and for weights that are whole or complex numbers."""
    is_factor = tensor.ndim >= 2 and foreign.kind != OWN and not key.endswith((".bias_indices", "string_to_token"))
    if tensor.is_complex() or (is_factor and not tensor.is_floating_point()):
        raise UserError(
            f"{foreign.path}: {key} is of {str(tensor.dtype).removeprefix('torch.')}: quantised, or no weight",
            allowed="numbers of floating point, of 8 to 64 bits",
            do="get it in fp16 or fp32",
        )
    if key.endswith(".alpha") and tensor.numel() != 1:
        raise UserError(
            f"{foreign.path}: {key} holds {tensor.numel()} numbers", allowed="one", do="fetch or train it again"
        )
    if not tensor.is_floating_point():
        return
    for piece in tensor.detach().flatten().split(_PIECE):
        if not (piece.float() if piece.element_size() == 1 else piece).isfinite().all():
            raise UserError(
                f"{foreign.path}: {key} is not finite", allowed="finite numbers", do="fetch or train it again"
            )


def tell_kind(path: Path, content: Any, header: Mapping[str, str]) -> str:
    """What kind of file this is, by its keys. Raises UserError for none that can be read."""
    if isinstance(content, Tensor):
        _require_rows(path, content)
        return TEXTUAL_INVERSION
    if isinstance(content, list):
        return _tell_list(path, content)
    if not isinstance(content, Mapping):
        raise _unknown(path, f"a {type(content).__name__} in place of named weights")
    if "concept" in header:
        return OWN
    content = {str(key): value for key, value in content.items()}
    keys = list(content)
    if {"unet", "modifier_token"} & set(keys):
        return DELTA
    if {"string_to_param", "emb_params", *(name for pair in TWO_ROWS for name in pair)} & set(keys):
        return TEXTUAL_INVERSION
    flat = [key for key, _ in _flat("", content)]
    _refuse_motion(path, keys)
    if any(_SIMO_KEY.fullmatch(key) for key in keys):
        return CLONEOFSIMO
    is_lora = any(part in key for key in keys for part in _LORA_PARTS)
    other = (other_lora([key for key in keys if not key.startswith(BUNDLED)]) if is_lora else None) or other_kind(
        keys, flat
    )
    if other is not None:
        raise UserError(f"{path} is {other.what}: it holds {other.key}", allowed=READABLE, do=other.do)
    if any("custom_diffusion" in key for key in keys):
        return CUSTOM_DIFFUSION
    if found := _tell_lora(path, content, is_lora=is_lora):
        return found
    if keys and all(_is_word(key, content[key]) for key in keys):
        return TEXTUAL_INVERSION
    raise _unknown(path, f"it holds {', '.join(key[:80] for key in keys[:3]) or 'nothing'}")


def _tell_lora(path: Path, content: Mapping[str, Any], *, is_lora: bool) -> str | None:
    keys = [key for key in content if not key.startswith(BUNDLED)]
    is_kohya = any(key.startswith(("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")) for key in keys)
    is_lycoris = any(_is_of_lycoris(key, content[key]) for key in keys)
    if is_kohya:
        return LYCORIS if is_lycoris else KOHYA
    if found := next(
        (key for key in keys if key.startswith(_PEFT_PREFIX) and (".hada_w" in key or ".lokr_w" in key)), None
    ):
        raise UserError(
            f"{path} is a LoHa or LoKr in other names than kohya's: it holds {found}",
            allowed="LyCORIS in kohya's names, lora_unet_...",
            do="save it from LyCORIS, not from PEFT",
        )
    if is_lycoris and all(key.endswith((*_LYCORIS_ENDS, ".alpha", ".dora_scale")) or "lora" in key for key in keys):
        return LYCORIS
    if not is_lora:
        return None
    if any(key.startswith(_COMFY) for key in keys):
        return COMFY
    return PEFT if all(key.removeprefix("module.").startswith(_PEFT_PREFIX) for key in keys) else DIFFUSERS


def _tell_list(path: Path, content: Sequence[Any]) -> str:
    """A list of pairs, up and down, of which nothing but their order says where they belong."""
    tensors = [tensor for tensor in content if isinstance(tensor, Tensor) and tensor.ndim in (2, 4)]
    is_paired = len(tensors) == len(content) > 0 and len(content) % 2 == 0
    if is_paired and all(up.shape[1] == len(down) for up, down in zip(tensors[::2], tensors[1::2], strict=True)):
        return CLONEOFSIMO
    if content and all(isinstance(each, Mapping) and {"emb", "emb2"} <= each.keys() for each in content):
        raise _unknown(path, "a list of embeddings for SDXL in the form of oss-roettger's notebook, {emb, emb2}")
    kinds = ", ".join(sorted({type(each).__name__ for each in content})) or "nothing"
    raise _unknown(path, f"a list of {len(content)} entries ({kinds})")


def _require_rows(path: Path, tensor: Tensor) -> None:
    """Raises UserError for a bare tensor that is no rows of a word."""
    shape = tuple(tensor.shape)
    if tensor.ndim in (1, 2) and 0 < tensor.numel() <= MOST_ROWS * shape[-1] and tensor.is_floating_point():
        return
    what = "a tensor without a name"
    if tensor.ndim == 3 and shape[1] == MOST_ROWS + 2:
        what = "a prompt that was encoded, no textual inversion"
    elif tensor.ndim in (3, 4) and 3 in shape[:-2]:
        what = "a picture's pixels"
    raise UserError(
        f"{path} is {what}, of shape {shape}",
        allowed=f"rows of one word, of shape (rows, channels), {MOST_ROWS} at most",
        do="name another file",
    )


def _refuse_motion(path: Path, keys: Sequence[str]) -> None:
    if found := next((key for key in keys if "motion_modules." in key), None):
        is_lora = any("lora" in key for key in keys)
        raise UserError(
            f"{path} is {'a motion LoRA' if is_lora else 'motion modules'} of AnimateDiff: it holds {found}",
            allowed=READABLE,
            do=f"give it as {'--motion-lora' if is_lora else '--motion'}",
        )


def _unknown(path: Path, found: str) -> UserError:
    return UserError(
        f"{path} is none of the files that can be read: {found}",
        allowed=READABLE,
        do="name another file, or save this one anew from the program that made it",
    )


def _is_of_lycoris(key: str, tensor: Any) -> bool:
    """Whether an entry is more than a LoRA: DoRA's magnitudes of the inputs are, too."""
    return key.endswith(_LYCORIS_ENDS) or (
        key.endswith(".dora_scale") and isinstance(tensor, Tensor) and tensor.shape[:1] == (1,)
    )


def _is_word(key: str, rows: Any) -> bool:
    """Whether an entry can be a word and its rows: as many as a prompt takes. A dot may stand in a word, too."""
    if not isinstance(rows, Tensor) or rows.ndim not in (1, 2) or not rows.is_floating_point():
        return False
    is_path = "." in key and (key.endswith(_LEAVES) or rows.shape[-1] < _NARROWEST)
    return not is_path and 0 < rows.numel() <= MOST_ROWS * rows.shape[-1]


def _flat(prefix: str, content: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield prefix or "tensor", content.detach()
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), value)
    elif isinstance(content, (list, tuple)):
        for index, value in enumerate(content):
            yield from _flat(f"{prefix}.{index}" if prefix else str(index), value)
