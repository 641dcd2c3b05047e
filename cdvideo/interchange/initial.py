"""PEFT's initialisations that take their first factors out of the base: what was trained is the change from them.

PiSSA (arXiv 2404.02948), OLoRA (2406.01775), CorDA, LoftQ and LoRA-GA begin with W = W_rest + s B0 A0. The file holds
B and A, so on the base as it was the change is s (B A - B0 A0). PiSSA and OLoRA have B0 A0 from W alone; of the others
only a copy of the first factors tells it, as PEFT's guides save it for the conversion into a plain LoRA.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from cdvideo.errors import UserError
from cdvideo.interchange.files import Foreign, read_foreign
from cdvideo.interchange.names import plain_key, within

_FACTORS = ("lora_A.weight", "lora_B.weight")


def unlearned(foreign: Foreign, how: str, name: str, weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """up and down that a layer's training began with, as the file's own are shaped and scaled.

    Args:
        how: PEFT's `init_lora_weights`.
        name: The layer's, in a concept file.
        weight: The base's own.
        scale: alpha / R.

    Raises:
        UserError: Where neither the method nor a copy beside the file tells them.
    """
    kept = _kept_factors(foreign.path)
    if kept is not None:
        down, up = (kept.get(f"{within(name)}.{part}") for part in _FACTORS)
        if down is not None and up is not None and down.shape[1:] == weight.shape[1:] and len(up) == len(weight):
            return up.float(), down.float()
    elif how.lower() in ("pissa", "olora") and weight.ndim == 2:
        return (_pissa if how.lower() == "pissa" else _olora)(weight.detach().float().cpu(), rank, scale)
    raise UserError(
        f"{foreign.path} was trained with init_lora_weights={how!r}, which changed the base: its factors alone do not "
        f"say what {name} learned",
        allowed="PiSSA and OLoRA, whose first factors follow from the base; others with the first factors in a folder "
        f"{how.partition('_')[0]}_init beside them",
        do="convert it with PEFT: save_pretrained(folder, path_initial_model_for_weight_conversion=...)",
    )


def _pissa(weight_OI: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    left, sizes_R, right = torch.linalg.svd(weight_OI, full_matrices=False)
    roots_R = (sizes_R[:rank] / scale).sqrt()
    return left[:, :rank] * roots_R, roots_R[:, None] * right[:rank]


def _olora(weight_OI: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    orthogonal, rest = torch.linalg.qr(weight_OI)
    return orthogonal[:, :rank], rest[:rank]


@lru_cache(maxsize=1)
def _kept_factors(path: Path) -> dict[str, Tensor] | None:
    """The first factors by their layers' ends, from a folder `..._init` within the adapter's or beside it."""
    folders = [
        folder
        for where in (path.parent, path.parent.parent)
        for folder in sorted(where.glob("*_init"))
        if folder.is_dir()
    ]
    for folder in folders:
        for file in (folder / "adapter_model.safetensors", folder / "adapter_model.bin"):
            if file.is_file():
                tensors = read_foreign(file).tensors
                return {within(plain_key(key)): tensor for key, tensor in tensors.items()}
    return None
