"""Files of LyCORIS, in any names that a LoRA may have: kept in their factors (concept/lycoris.py), or as whole changes.

    full    diff, diff_b                       whole changes of weight and bias
    norm    w_norm, b_norm                     the same for layers that normalise

A file may mix them with LoCon, LoHa and LoKr, and each of those may have DoRA's magnitudes, of the outputs or of the
inputs, a scalar, and single numbers beside the factors (bias_indices). Biases that PEFT trained come here too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from cdvideo.base.loader import Base
from cdvideo.concept import lycoris
from cdvideo.concept.adapters import delta_name, fits_layer
from cdvideo.concept.kv import kv_projections
from cdvideo.interchange.files import Foreign
from cdvideo.interchange.lora import alpha_of, require_places
from cdvideo.interchange.names import Found, Places
from cdvideo.interchange.settings import Settings, read_settings

# What names.py calls the parts of a LoRA, as LyCORIS does.
_AS_LOCON = {"A": "lora_down", "B": "lora_up", "mid": "lora_mid", "m": "dora_scale"}
# Whole changes, and the parameter that they change; `bias` is PEFT's, and is the whole new bias.
_WHOLE = {"diff": "weight", "w_norm": "weight", "diff_b": "bias", "b_norm": "bias", "bias": "bias", "B.bias": "bias"}
_FORMS = {"lora_up.weight": "LoCon", "hada_w1_a": "LoHa", "lokr_w1": "LoKr", "lokr_w1_a": "LoKr"}
_FORMS |= {"diff": "full", "w_norm": "norm"}
_RANKS = ("lora_down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")  # by the length of the first of these that there is
_SPARSE = {"bias_indices", "bias_values", "bias_size"}


def forms(keys: Iterable[str]) -> Counter[str]:
    """How many layers a file changes in each form."""
    return Counter(form for key in keys for end, form in _FORMS.items() if key.endswith(f".{end}"))


@torch.no_grad()
def read_lycoris(foreign: Foreign, base: Base, found: Found, places: Places) -> tuple[str, dict[str, Tensor]]:
    """The kind of the adapter, and its factors and changes by their names in a concept file.

    Of K and V alone it is `kv`, which is compiled into prompts; of whole changes alone `unet`; else `lycoris`.

    Raises:
        UserError: For keys that are unknown or incomplete, and for layers that this base has not or has in other sizes.
    """
    tensors, settings = foreign.tensors, read_settings(foreign)
    weights: dict[str, Tensor] = {}
    for name, keys in found.layers.items():
        parts = {part: tensors[key] for part, key in keys.items()}
        layer = places.layers[name]
        if "m" in parts and not keys["m"].endswith("dora_scale"):  # PEFT's, (out) or (1, out, 1, 1)
            parts["m"] = parts["m"].reshape(-1, *[1] * (_weight(layer).ndim - 1))
        whole = {part: parts.pop(part) for part in _WHOLE.keys() & parts.keys()}
        changes = _whole_changes(whole, parts, settings, name, layer)
        factors = _factors(parts, settings, name) if parts.keys() - {"alpha"} else {}
        if changes is None:
            found.lost += [keys[part] for part in whole]
            continue
        if factors is None or (factors and not fits_layer(factors, _weight(layer))):
            found.lost += [keys[part] for part in parts]
            continue
        weights |= {delta_name(f"{name}.{parameter}", ""): change for parameter, change in changes.items()}
        weights |= {f"{name}.{part}": tensor for part, tensor in factors.items()}
    require_places(foreign, base, found)
    layers = lycoris.by_layer(weights)
    whole_names = {name for name in weights if name.endswith(".delta")}
    if {*(f"{layer}.delta" for layer in layers), *whole_names} <= kv_projections(base.unet).keys():
        by_name = {layer: _weight(places.layers[layer]) for layer in layers}
        unfolded = {f"{layer}.delta": change for layer, change in lycoris.each_change(weights, by_name)}
        return "kv", unfolded | {name: weights[name].float() for name in whole_names}
    return ("lycoris" if layers else "unet"), weights


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach()


def _whole_changes(
    whole: Mapping[str, Tensor], factors: Mapping[str, Tensor], settings: Settings, name: str, layer: nn.Module
) -> dict[str, Tensor] | None:
    """What is added to the layer's `weight` and `bias`, as the file has it; None where it does not fit."""
    own = dict(layer.named_parameters(recurse=False))
    changes: dict[str, Tensor] = {}
    for part, change in whole.items():
        parameter = own.get(_WHOLE[part])
        if parameter is None or parameter.shape != change.shape:
            return None
        if part == "bias":
            change = change.float() - parameter.detach().float().cpu()
        elif part == "B.bias":
            if "B" not in factors:
                return None
            rank = factors["B"].shape[1]
            change = settings.alpha(name, rank) / rank * change.float()
        elif change.element_size() == 1:
            change = change.float()
        changes[_WHOLE[part]] = changes[_WHOLE[part]] + change if _WHOLE[part] in changes else change
    return changes


def _factors(parts: Mapping[str, Tensor], settings: Settings, name: str) -> dict[str, Tensor] | None:
    """A layer's factors with its scale within; None for parts of no form."""
    parts = {_AS_LOCON.get(part, part): tensor for part, tensor in parts.items()}
    alpha, scalar = parts.pop("alpha", None), parts.pop("scalar", None)
    sparse = {part: parts.pop(part) for part in _SPARSE & parts.keys()}
    form = lycoris.form_of(parts)
    leading = next((part for part in lycoris.LEADING if part in parts), None)
    if form is None or leading is None or (sparse and sparse.keys() != _SPARSE):
        return None
    whole = form == "LoKr" and {"lokr_w1", "lokr_w2"} <= parts.keys()  # no rank, and so no scale
    rank = next((len(parts[part]) for part in _RANKS if part in parts), 0)
    scale = 1.0
    if rank and not whole:
        scale = (settings.alpha(name, rank) if alpha is None else alpha_of({"alpha": alpha}, rank)) / rank
    if scalar is not None:
        scale *= float(scalar.float().flatten()[0])
    factors = {part: tensor.float() for part, tensor in parts.items()}
    factors[leading] = factors[leading] * scale
    if sparse:
        if sparse["bias_size"].numel() != 2 or sparse["bias_indices"].shape != (2, sparse["bias_values"].numel()):
            return None
        factors |= {"sparse": sparse["bias_values"].float() * scale, "sparse_at": sparse["bias_indices"].float()}
    return factors
