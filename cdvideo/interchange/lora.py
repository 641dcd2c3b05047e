"""LoRA files of kohya's scripts, of diffusers and of PEFT: their names and scales, both ways.

All say the same (LoRA, arXiv 2106.09685, eq. 3): W' = W + alpha / R * up down. They differ in how they name a layer and
in where alpha stands: kohya keeps it in a tensor, diffusers and PEFT in a header or a JSON file beside. Where it is
missing the scale is 1.
"""

from __future__ import annotations

import json
import math
import re
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

PEFT_CONFIG = "adapter_config.json"  # where PEFT keeps alpha, beside the factors
METADATA = "lora_adapter_metadata"  # where diffusers keeps the settings, in the header
_MODELS = ("unet", "text_encoder", "text_encoder_2")
_KOHYA_PARTS = {"lora_down.weight": "A", "lora_up.weight": "B", "lora_mid.weight": "mid", "alpha": "alpha"}
_KOHYA_PARTS["dora_scale"] = "m"
_PEFT_PARTS = {"lora_A.weight": "A", "lora_B.weight": "B", "down.weight": "A", "up.weight": "B", "alpha": "alpha"}
_PEFT_PARTS |= {"lora_magnitude_vector": "m", "lora_magnitude_vector.weight": "m"}
# diffusers has named its layers in three ways: lora_A and lora_B are the newest, to_q_lora.down the oldest.
_PEFT_KEY = re.compile(
    r"(?P<path>.+?)(?:\.(?P<oldest>to_(?:q|k|v|out))_lora|\.lora_linear_layer|\.lora)?\."
    rf"(?P<part>{'|'.join(re.escape(part) for part in sorted(_PEFT_PARTS, key=len, reverse=True))})"
)


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


def read_lora(foreign: Foreign, base: Base) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The factors by their names in a concept file, and the adapter's settings.

    Raises:
        UserError: For keys that are unknown or incomplete, and for layers that this base has not or has in other sizes.
    """
    layers = adaptable_layers(base)
    kohya = {kohya_name(name): name for name in layers}
    if base.is_sdxl:
        kohya |= {sdxl.kohya_name(name): name for name in layers}
    tensors = foreign.tensors
    keys: dict[str, dict[str, str]] = {}
    family = sdxl.made_for(tensors)
    lost = [] if sdxl.fits_family(family, base) else [*tensors]  # though a text encoder may have the same sizes
    for key in [] if lost else tensors:
        name, part = _kohya_place(key, kohya) if foreign.kind == KOHYA else _peft_place(key, layers)
        if name is None or part is None:
            lost.append(key)
        else:
            keys.setdefault(name, {})[part] = key
    settings = _settings_by_model(foreign)
    read: dict[str, LoraLayer] = {}
    for name, places in keys.items():
        parts = {part: tensors[key] for part, key in places.items()}
        layer = _read_layer(parts, layers[name].weight, kohya=foreign.kind == KOHYA)
        if layer is None:
            lost += places.values()
        else:
            alpha = float(parts["alpha"]) if "alpha" in parts else _peft_alpha(name, layer.rank, settings)
            read[name] = replace(layer, alpha=alpha)
    if lost:
        raise UserError(
            f"{foreign.path}: matched {len(tensors) - len(lost)}/{len(tensors)} tensors of base "
            f"{base.name!r}; no place for {lost[0]}" + (f"; the file was made for {family}" if family else ""),
            allowed="LoRA factors (down, up, mid, alpha, DoRA's magnitudes) of layers that the base has, in its sizes",
            do="use the --base that the file was made for",
        )
    return as_factors(read)


def as_factors(layers: Mapping[str, LoraLayer]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Layers as a concept holds them, with one alpha for all: what differs from the most common one goes into B."""
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
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


def kohya_name(name: str) -> str:
    """unet.mid_block.x is lora_unet_mid_block_x, text_encoder.text_model.x is lora_te_text_model_x."""
    return f"lora_{name.replace('text_encoder.', 'te.', 1).replace('.', '_')}"


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
    ranks = {_within(name): layer.rank for name, layer in layers.items()}
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


def _within(name: str) -> str:
    """A layer's path in its model, as the ends of paths that all versions of transformers have."""
    return re.sub(r"^(unet|text_encoder|text_encoder_2)\.", "", name).removeprefix("text_model.")


def _kohya_place(key: str, names: Mapping[str, str]) -> tuple[str | None, str | None]:
    stem, _, part = key.partition(".")
    return names.get(re.sub("^lora_te1_", "lora_te_", stem)), _KOHYA_PARTS.get(part)


def _peft_place(key: str, layers: Mapping[str, nn.Module]) -> tuple[str | None, str | None]:
    """The layer that a key of diffusers or PEFT means, and its part; paths may lack what model they belong to."""
    plain = key.removeprefix("base_model.model.").replace(".processor.", ".").replace(".default.", ".")
    match = _PEFT_KEY.fullmatch(plain)
    if match is None:
        return None, None
    path = _within(match["path"])
    old = match["oldest"]
    unet, text = (f".{old}{'.0' * (old == 'to_out')}", f".{old.removeprefix('to_')}_proj") if old else ("", "")
    places = [f"unet.{path}{unet}", f"text_encoder.text_model.{path}{text}"]
    if match["path"].startswith("text_encoder_2."):
        places = [f"text_encoder_2.text_model.{path}{text}"]
    return next((place for place in places if place in layers), None), _PEFT_PARTS[match["part"]]


def _settings_by_model(foreign: Foreign) -> dict[str, dict[str, Any]]:
    """PEFT's settings of each of `_MODELS`, out of the header or, in PEFT's own folders, the file beside."""
    beside = foreign.path.with_name(PEFT_CONFIG)
    if foreign.kind == PEFT and beside.is_file():
        return dict.fromkeys(_MODELS, json.loads(beside.read_text(encoding="utf-8")))
    flat = json.loads(foreign.header.get(METADATA, "{}"))
    return {
        model: {key.removeprefix(f"{model}."): value for key, value in flat.items() if key.startswith(f"{model}.")}
        for model in _MODELS
    }


def _read_layer(parts: Mapping[str, Tensor], weight: Tensor, *, kohya: bool) -> LoraLayer | None:
    """A layer, alpha still its rank; None where parts are missing or of other sizes than the layer's weight."""
    if not {"A", "B"} <= parts.keys():
        return None
    down, up = parts["A"].float(), parts["B"].float().flatten(1)
    if "mid" in parts:  # LoCon's convolution in three: 1x1 down, kxk within the rank, 1x1 up
        down = torch.einsum("srhw,ri->sihw", parts["mid"].float(), down.flatten(1))
    rank, magnitude = len(down), parts.get("m")
    if down[0].numel() != weight[0].numel() or up.shape != (len(weight), rank):
        return None
    if magnitude is not None:
        # LyCORIS also has magnitudes of the inputs, in the second dimension; peft writes (1, out, 1, 1).
        if magnitude.numel() != len(weight) or (kohya and len(magnitude) != len(weight)):
            return None
        magnitude = magnitude.float().flatten()
    down = down.reshape(rank, *weight.shape[1:])
    return LoraLayer(down, up.reshape(len(weight), rank, *[1] * (weight.ndim - 2)), rank, magnitude)


def _peft_alpha(name: str, rank: int, settings: Mapping[str, Mapping[str, Any]]) -> float:
    """alpha of a layer by peft's rules: a pattern that its path ends with, else the common one, else the rank."""
    of_model = settings[name.partition(".")[0]]
    patterns = of_model.get("alpha_pattern") or {}
    own = [value for key, value in patterns.items() if re.match(rf"(.*\.)?({_unrooted(key)})$", _within(name))]
    alpha = float(own[0] if own else of_model.get("lora_alpha", rank))
    return alpha * math.sqrt(rank) if of_model.get("use_rslora") else alpha


def _unrooted(pattern: str) -> str:
    """A pattern of a path within the text encoder, whether or not it was written where `text_model` is part of it."""
    return re.sub(r"^(\^?)text_model\.", r"\1", pattern)
