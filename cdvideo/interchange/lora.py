"""LoRA files of kohya's scripts, of diffusers, of PEFT and of ComfyUI: their scales, both ways.

All say the same (LoRA, arXiv 2106.09685, eq. 3): W' = W + alpha / R * up down. They differ in how they name a layer
(names.py) and in where alpha stands: kohya keeps it in a tensor, diffusers and PEFT in a header or a JSON file beside.
Where it is missing the scale is 1.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cdvideo.base.loader import Base
from cdvideo.concept.adapters import text_models
from cdvideo.concept.lora import lora_paths
from cdvideo.errors import UserError
from cdvideo.interchange import sdxl
from cdvideo.interchange.files import KOHYA, PEFT, Foreign
from cdvideo.interchange.initial import unlearned
from cdvideo.interchange.names import Found, Places, kohya_name, within
from cdvideo.interchange.settings import PEFT_CONFIG, Settings, model_of, read_settings

logger = logging.getLogger(__name__)

PLAIN_PARTS = {"A", "B", "mid", "alpha", "m"}  # of a layer that is a LoRA, or a DoRA, and nothing more


@dataclass(frozen=True)
class LoraLayer:
    """A low-rank change of one layer: down (R, in, ...) and up (out, R, ...) as peft shapes them; DoRA's magnitude."""

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down)


def adaptable_layers(base: Base) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every linear layer and convolution of UNet and text encoders, by its name in a concept file."""
    models: dict[str, nn.Module] = {"unet.": base.unet, **text_models(base)}
    return {
        prefix + path: layer
        for prefix, model in models.items()
        for path, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }


def place_keys(foreign: Foreign, base: Base, places: Places) -> Found:
    """Where the file's keys belong in this base; none do where the file is of another family of bases.

    SDXL's first text encoder has the sizes of Stable Diffusion 1's, so sizes alone do not tell.
    """
    keys = [key for key in foreign.tensors if not key.startswith("bundle_emb.")]
    if not sdxl.fits_family(family_of(foreign), base):
        return Found(lost=keys)
    return places.of(keys, model=model_of(foreign))


def family_of(foreign: Foreign) -> str | None:
    """The family of bases that a file is of: by the name in PEFT's settings, else by its keys and sizes."""
    named = read_settings(foreign).family if foreign.kind == PEFT else None
    return named or sdxl.made_for(foreign.tensors, of_one_model=foreign.kind == PEFT)


def read_lora(foreign: Foreign, base: Base, found: Found, places: Places) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The factors by their names in a concept file, and the adapter's settings.

    Raises:
        UserError: For keys that are unknown or incomplete, and for layers that this base has not or has in other sizes.
    """
    tensors, settings = foreign.tensors, read_settings(foreign)
    if foreign.kind == PEFT and not settings.told:
        logger.warning(
            "%s has no %s beside it, which says how strong it is: alpha is taken for the rank",
            foreign.path,
            PEFT_CONFIG,
        )
    read: dict[str, LoraLayer] = {}
    for name, keys in found.layers.items():
        parts, layer = {part: tensors[key] for part, key in keys.items()}, places.layers[name]
        is_kohya = foreign.kind == KOHYA
        whole = _read_layer(parts, layer.weight, kohya=is_kohya) if isinstance(layer, (nn.Linear, nn.Conv2d)) else None
        if whole is None:
            found.lost += keys.values()
        else:
            alpha = alpha_of(parts, whole.rank) if "alpha" in parts else settings.alpha(name, whole.rank)
            read[name] = replace(whole, alpha=alpha)
    require_places(foreign, base, found)
    return as_factors({name: _as_trained(foreign, settings, name, layer, places) for name, layer in read.items()})


def _as_trained(foreign: Foreign, settings: Settings, name: str, layer: LoraLayer, places: Places) -> LoraLayer:
    """The layer as it changes the base: without what its factors began with, where that was taken from the base."""
    how = settings.initialised(name)
    if not how:
        return layer
    scale, weight = layer.alpha / layer.rank, places.layers[name].weight
    assert isinstance(weight, Tensor)
    up, down = unlearned(foreign, how, name, weight, layer.rank, scale)
    downs, ups = torch.cat([layer.down, down]), torch.cat([scale * layer.up, -scale * up], dim=1)
    return LoraLayer(downs, ups, alpha=len(downs), magnitude=layer.magnitude)


def alpha_of(parts: Mapping[str, Tensor], rank: int) -> float:
    """alpha of a layer in kohya's files, where 0 stands for the rank."""
    return float(parts["alpha"].float().flatten()[0]) or float(rank)


def require_places(foreign: Foreign, base: Base, found: Found) -> None:
    """Raises UserError, with the name of a key, where keys have no place in the base."""
    lost, count = found.lost, len(foreign.tensors)
    if not lost:
        return
    family, width = family_of(foreign), base.unet.config.cross_attention_dim
    agree = isinstance(width, int) and family is not None and sdxl.FAMILIES.get(width) == family
    # Names that nobody knows, beside others that have their place, are not the base's fault.
    placed = {key for keys in found.layers.values() for key in keys.values()}
    unknown = agree or (len(lost) < count and not placed & set(lost))
    raise UserError(
        f"{foreign.path}: matched {count - len(lost)}/{count} tensors of base "
        f"{base.name!r}; no place for {lost[0]}" + (f"; the file was made for {family}" if family else ""),
        allowed="factors of LoRA or LyCORIS, under names of kohya, diffusers, PEFT or ComfyUI, for layers that the "
        "base has, in its sizes",
        do="save it again from its trainer: its names are not those of any that is known"
        if unknown
        else "use the --base that the file was made for",
    )


def as_factors(layers: Mapping[str, LoraLayer]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Layers as a concept holds them, with one alpha for all: what differs from the most common one goes into B."""
    alphas = Counter(layer.alpha for layer in layers.values() if layer.alpha)  # a layer of 0 changes nothing
    alpha = alphas.most_common(1)[0][0] if alphas else 1.0
    factors = {}
    for name, layer in layers.items():
        factors[f"{name}.lora_A.weight"] = layer.down.float()
        factors[f"{name}.lora_B.weight"] = layer.up.float() * (layer.alpha / alpha)
        if layer.magnitude is not None:
            factors[f"{name}.lora_magnitude_vector"] = _peft_magnitude(layer)
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    dora = any(layer.magnitude is not None for layer in layers.values())
    return factors, {"rank": rank, "alpha": alpha, "dora": dora}


def as_layers(factors: Mapping[str, Tensor], alpha: float) -> dict[str, LoraLayer]:
    """What a concept holds, layer by layer."""
    return {
        name: LoraLayer(
            factors[f"{name}.lora_A.weight"],
            factors[f"{name}.lora_B.weight"],
            alpha,
            factors.get(f"{name}.lora_magnitude_vector"),
        )
        for name in sorted(lora_paths(factors))
    }


def low_rank(change: Tensor, rank: int | None) -> tuple[LoraLayer, float, float]:
    """The nearest change of a rank (Eckart and Young), its squared error, and the change's own squared norm.

    Args:
        change: Of a linear layer's or a convolution's weight.
        rank: None is as many as the change has in single precision.
    """
    left, sizes_R, right = torch.linalg.svd(change.flatten(1).double(), full_matrices=False)
    whole = int((sizes_R > 1e-7 * sizes_R[0]).sum())
    kept = max(1, min(whole, rank or whole))
    roots_R = sizes_R[:kept].sqrt()
    down = (roots_R[:, None] * right[:kept]).view(kept, *change.shape[1:])
    up = (left[:, :kept] * roots_R).view(len(change), kept, *[1] * (change.ndim - 2))
    error = sizes_R[kept:].square().sum().item()
    return LoraLayer(down.float(), up.float(), alpha=kept), error, sizes_R.square().sum().item()


def low_rank_product(
    up_OR: Tensor, down_RI: Tensor, shape: torch.Size, rank: int | None
) -> tuple[LoraLayer, float, float]:
    """`low_rank` of up down, a weight of that shape, without making it: of triangles R x R alone."""
    up_basis, up_rest = torch.linalg.qr(up_OR)
    down_basis, down_rest = torch.linalg.qr(down_RI.T)
    small, error, whole = low_rank(up_rest @ down_rest.T, rank)
    down = (small.down.double() @ down_basis.T).float().view(small.rank, *shape[1:])
    up = (up_basis @ small.up.double()).float().view(len(up_OR), small.rank, *[1] * (len(shape) - 2))
    return LoraLayer(down, up, small.alpha), error, whole


def kohya_tensors(layers: Mapping[str, LoraLayer], *, is_sdxl: bool = False) -> dict[str, Tensor]:
    """As kohya's scripts name and shape them."""
    tensors = {}
    for name, layer in layers.items():
        stem = sdxl.kohya_name(name) if is_sdxl else kohya_name(name)
        tensors[f"{stem}.lora_down.weight"] = layer.down
        tensors[f"{stem}.lora_up.weight"] = layer.up
        tensors[f"{stem}.alpha"] = torch.tensor(float(layer.alpha))
        if layer.magnitude is not None:
            tensors[f"{stem}.dora_scale"] = layer.magnitude.view(-1, *[1] * (layer.down.ndim - 1))
    return tensors


def peft_tensors(layers: Mapping[str, LoraLayer]) -> dict[str, Tensor]:
    """As diffusers names and shapes them; scaled so that alpha is the rank, and readers without settings are right."""
    factors = {}
    for name, layer in layers.items():
        factors[f"{name}.lora_A.weight"] = layer.down
        factors[f"{name}.lora_B.weight"] = layer.up * (layer.alpha / layer.rank)
        if layer.magnitude is not None:
            factors[f"{name}.lora_magnitude_vector"] = _peft_magnitude(layer)
    return factors


def peft_settings(layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """What peft's LoraConfig has to know of layers of one model, named within it, as `peft_tensors` scales them."""
    ranks = {within(name): layer.rank for name, layer in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: own for name, own in ranks.items() if own != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_dora": any(layer.magnitude is not None for layer in layers.values()),
    }


def _peft_magnitude(layer: LoraLayer) -> Tensor:
    """(out) of linear layers, (1, out, 1, 1) of convolutions."""
    assert layer.magnitude is not None
    magnitude = layer.magnitude.float().flatten()
    return magnitude if layer.down.ndim == 2 else magnitude.view(1, -1, 1, 1)


def _read_layer(parts: Mapping[str, Tensor], weight: Tensor, *, kohya: bool) -> LoraLayer | None:
    """A layer, alpha still its rank; None where parts are missing or of other sizes than the layer's weight."""
    if not {"A", "B"} <= parts.keys() or min(parts["A"].ndim, parts["B"].ndim) < 2:
        return None
    down, up = parts["A"].float(), parts["B"].float().flatten(1)
    if "mid" in parts:  # LoCon's convolution in three: 1x1 down, kxk within the rank, 1x1 up
        mid = parts["mid"].float()
        if mid.ndim != 4 or mid.shape[1] != len(down):
            return None
        down = torch.einsum("srhw,ri->sihw", mid, down.flatten(1))
    rank, magnitude = len(down), parts.get("m")
    if rank == 0 or down[0].numel() != weight[0].numel() or up.shape != (len(weight), rank):
        return None
    if magnitude is not None:
        # LyCORIS also has magnitudes of the inputs, in the second dimension; peft writes (1, out, 1, 1).
        if magnitude.numel() != len(weight) or (kohya and len(magnitude) != len(weight)):
            return None
        magnitude = magnitude.float().flatten()
    down = down.reshape(rank, *weight.shape[1:])
    return LoraLayer(down, up.reshape(len(weight), rank, *[1] * (weight.ndim - 2)), rank, magnitude)
