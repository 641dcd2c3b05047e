"""Custom Diffusion (arXiv 2212.04488) and ClassDiffusion (2405.17532): whole weights of the cross-attentions.

diffusers' script writes `<attention>.processor.to_k_custom_diffusion.weight` and each token in a file of its own; the
authors' code writes one pickle of the UNet's own names, where K and V may be compressed to the product u v of what
changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.concept.adapters import changed_parameters, delta_name
from cdvideo.concept.concept import Concept
from cdvideo.concept.kv import kv_projections
from cdvideo.errors import UserError
from cdvideo.interchange.files import Foreign

_PARTS = (("to_k", ".weight"), ("to_v", ".weight"), ("to_q", ".weight"), ("to_out", ".0.weight"), ("to_out", ".0.bias"))
_KEY = re.compile(r"(.+\.attn2)\.processor\.(to_[qkv]|to_out)_custom_diffusion(\.0)?\.(weight|bias)")


def read_custom_diffusion(foreign: Foreign, base: Base) -> dict[str, Tensor]:
    """The changes by their names in a concept file, out of diffusers' files. Raises UserError as `_changes`."""
    weights = {}
    for key, tensor in foreign.tensors.items():
        match = _KEY.fullmatch(key)
        weights[f"{match[1]}.{match[2]}{match[3] or ''}.{match[4]}" if match else key] = tensor
    return _changes(foreign, base, weights)


def read_delta(foreign: Foreign, base: Base) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The changes by their names in a concept file, and rows_KD by token, out of a file of the authors' code.

    Raises:
        UserError: As `_changes`; and for a file that brings a text encoder of its own, or is for SDXL.
    """
    content: Mapping[str, Any] = foreign.content
    unknown = content.keys() - {"unet", "modifier_token"}
    if unknown:
        raise UserError(
            f"{foreign.path} holds {min(unknown)} beside the UNet's weights and the tokens",
            allowed="a delta with the keys unet and modifier_token",
            do="train it again without tuning the text encoder",
        )
    tokens, changes = content.get("modifier_token", {}), content.get("unet", {})
    if not (isinstance(tokens, Mapping) and isinstance(changes, Mapping) and all(map(_is_change, changes.values()))):
        raise UserError(
            f"{foreign.path} is no whole delta",
            allowed="weights by name, whole or as u and v, and rows by token",
            do="fetch it again, or train it anew",
        )
    wrong = [token for token, row in tokens.items() if not isinstance(row, Tensor)]
    if wrong:
        raise UserError(
            f"{foreign.path} was made for SDXL: {wrong[0]} has rows for two text encoders",
            allowed="rows for one text encoder",
            do="use a delta for Stable Diffusion 1 or 2",
        )
    parameters = dict(base.unet.named_parameters())
    weights = {}
    for name, value in changes.items():
        if isinstance(value, Mapping):  # compressed: what changed is u v
            change = value["u"].float() @ value["v"].float()
            own = parameters.get(name)
            value = change if own is None or own.shape != change.shape else own.float().cpu() + change
        weights[name] = value
    rows = {token: row.detach().float().reshape(-1, row.shape[-1]) for token, row in tokens.items()}
    return (_changes(foreign, base, weights) if weights else {}), rows


def _is_change(value: Any) -> bool:
    """Whether it is a whole weight, or the two factors of what changed."""
    if not isinstance(value, Mapping):
        return isinstance(value, Tensor)
    left, right = (value.get(side) for side in ("u", "v"))
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return False
    return left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0]


def custom_diffusion_tensors(base: Base, concept: Concept) -> dict[str, Tensor | dict[str, Tensor]]:
    """The whole weights under diffusers' names; an empty entry for each attention that is left alone, as it asks for.

    Raises:
        UserError: For a concept that changes more than its format can hold.
    """
    whole = changed_parameters(base.unet, concept)
    attentions = [name.removesuffix(".processor") for name in base.unet.attn_processors]
    keys = {
        f"{path}.{part}{rest}": f"{path}.processor.{part}_custom_diffusion{rest}"
        for path in attentions
        if path.endswith(".attn2")
        for part, rest in _PARTS
    }
    beyond = [name for name in whole if name not in keys]
    beyond += [name for name in concept.weights if name.startswith("text_encoder")]
    if beyond or not whole:
        raise UserError(
            f"the concept changes {beyond[0] if beyond else 'no weight of the UNet'}",
            allowed="changes of cross-attentions, which is all that Custom Diffusion's files hold",
            do="write it as a LoRA: --to kohya or --to diffusers; a token alone: --to textual-inversion",
        )
    parameters = {**dict(base.unet.named_parameters()), **whole}
    parts = _PARTS if any(".to_q." in name or ".to_out." in name for name in whole) else _PARTS[:2]
    tensors: dict[str, Tensor | dict[str, Tensor]] = {}
    for path in attentions:
        if path.endswith(".attn2"):
            for name in (f"{path}.{part}{rest}" for part, rest in parts):
                tensors[keys[name]] = parameters[name].detach().float().cpu()
        else:
            tensors[f"{path}.processor"] = {}
    return tensors


def adapter_kind(unet: UNet2DConditionModel, changes: Mapping[str, Tensor]) -> str:
    """`kv` for changes of K and V alone, which are compiled into prompts; else `unet`."""
    return "kv" if changes.keys() <= kv_projections(unet).keys() else "unet"


@torch.no_grad()
def _changes(foreign: Foreign, base: Base, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What whole weights change of the base's.

    Raises:
        UserError: For names that this base has not, or has in other sizes.
    """
    parameters = dict(base.unet.named_parameters())
    lost = [
        name for name, weight in weights.items() if name not in parameters or parameters[name].shape != weight.shape
    ]
    if lost or not weights:
        raise UserError(
            f"{foreign.path}: matched {len(weights) - len(lost)}/{len(weights)} weights of base {base.name!r}; no "
            f"place for {lost[0] if lost else 'nothing'}",
            allowed="weights of cross-attentions that the base has, in its sizes",
            do="use the --base that the file was made for",
        )
    return {
        delta_name(name): weight.to(base.device).float() - parameters[name].float() for name, weight in weights.items()
    }
