"""What a file from elsewhere is: told by its keys, never by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cdvideo.base.checkpoint import read_content
from cdvideo.errors import UserError

OWN = "cdvideo concept"
KOHYA = "kohya LoRA"
LYCORIS = "LyCORIS"
DIFFUSERS = "diffusers LoRA"
PEFT = "PEFT LoRA"
TEXTUAL_INVERSION = "textual inversion"
CUSTOM_DIFFUSION = "Custom Diffusion"
DELTA = "Custom Diffusion delta"
READABLE = (
    "a cdvideo concept, a kohya, LyCORIS, diffusers or PEFT LoRA, a textual inversion, or a Custom Diffusion file"
)

_PEFT_PREFIX = "base_model.model."
_LORA_PARTS = (".lora_A.", ".lora_B.", ".lora.down.", ".lora.up.", "_lora.down.", "_lora.up.", ".lora_linear_layer.")
# What keys of other files contain, and what such files are.
_OTHER_KINDS = {
    "oft_": "an OFT adapter",
    ".on_input": "an (IA)^3 of LyCORIS",
    ".a1.weight": "a GLoRA of LyCORIS",
    "model.diffusion_model.": "a whole image model, or a part of one in its first layout",
    "ip_adapter.": "an IP-Adapter",
    "control_model.": "a ControlNet",
}
_LYCORIS_PARTS = (".hada_w", ".lokr_w", ".diff", ".w_norm")


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
    content, header = read_content(path)
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
    if found := next((key for key in keys if "motion_modules." in key), None):
        is_lora = any("lora" in key for key in keys)
        raise UserError(
            f"{path} is {'a motion LoRA' if is_lora else 'motion modules'} of AnimateDiff: it holds {found}",
            allowed=READABLE,
            do=f"give it as {'--motion-lora' if is_lora else '--motion'}",
        )
    for part, what in _OTHER_KINDS.items():
        if found := next((key for key in dict(_flat("", content)) if part in key), None):
            raise UserError(f"{path} is {what}: it holds {found}", allowed=READABLE, do="name another file")
    if any("custom_diffusion" in key for key in keys):
        return CUSTOM_DIFFUSION
    if any(key.startswith(("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")) for key in keys):
        return LYCORIS if any(_is_of_lycoris(key, content[key]) for key in content) else KOHYA
    if found := next((key for key in keys if ".hada_w" in key or ".lokr_w" in key), None):
        raise UserError(
            f"{path} is a LoHa or LoKr in other names than kohya's: it holds {found}",
            allowed="LyCORIS in kohya's names, lora_unet_...",
            do="save it from LyCORIS, not from PEFT",
        )
    if any(part in key for key in keys for part in _LORA_PARTS):
        return PEFT if all(key.startswith(_PEFT_PREFIX) for key in keys) else DIFFUSERS
    if keys and all(_is_word(key, content[key]) for key in content):
        return TEXTUAL_INVERSION
    found = ", ".join(keys[:3]) or "nothing"
    raise UserError(
        f"{path} is none of the files that can be read: it holds {found}", allowed=READABLE, do="look inside"
    )


def _is_of_lycoris(key: str, tensor: Any) -> bool:
    """Whether an entry of kohya's names is more than a LoRA: DoRA's magnitudes of the inputs are, too."""
    return any(part in key for part in _LYCORIS_PARTS) or (key.endswith(".dora_scale") and len(tensor) == 1)


def _is_word(key: Any, rows: Any) -> bool:
    """Whether an entry can be a word and its rows: no more of them than a prompt takes, and no path for a name."""
    plausible = isinstance(rows, Tensor) and rows.ndim in (1, 2) and "." not in str(key)
    return plausible and rows.numel() <= 75 * rows.shape[-1]


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
