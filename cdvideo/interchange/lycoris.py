"""LyCORIS (arXiv 2309.14859, section 3) in kohya's names: each layer's factors folded into the change they stand for.

    LoCon   up (mid down)                      LoRA of convolutions; with mid in three parts
    LoHa    (w1_a w1_b) * (w2_a w2_b)          elementwise: FedPara, arXiv 2108.06098
    LoKr    w1 (x) w2, each whole or a b       Kronecker: KronA, arXiv 2212.10650
    full    diff, diff_b                       whole changes of weight and bias
    norm    w_norm, b_norm                     the same for layers that normalise

times alpha / R. A file may mix them, and each may have DoRA's magnitudes, of the outputs or of the inputs. Formulas and
shapes are those of lycoris/modules and lycoris/functional of LyCORIS 3.4.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cdvideo.base.loader import Base
from cdvideo.concept.adapters import delta_name, text_models
from cdvideo.errors import UserError
from cdvideo.interchange import sdxl
from cdvideo.interchange.files import Foreign
from cdvideo.interchange.lora import kohya_name

_FORMS = {"lora_up.weight": "LoCon", "hada_w1_a": "LoHa", "lokr_w1": "LoKr", "lokr_w1_a": "LoKr"}
_FORMS |= {"diff": "full", "w_norm": "norm"}
_PARTS = {
    "LoCon": {"lora_up.weight", "lora_down.weight", "lora_mid.weight"},
    "LoHa": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"},
    "LoKr": {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"},
    "full": {"diff", "diff_b"},
    "norm": {"w_norm", "b_norm"},
}
_BESIDE = {"alpha", "dora_scale"}


def forms(tensors: Mapping[str, Tensor]) -> Counter[str]:
    """How many layers a file changes in each form."""
    return Counter(_FORMS[part] for key in tensors if (part := key.partition(".")[2]) in _FORMS)


@torch.no_grad()
def read_lycoris(foreign: Foreign, base: Base) -> dict[str, Tensor]:
    """The changes by their names in a concept file, float32.

    Raises:
        UserError: For keys that are unknown or incomplete, and for layers that this base has not or has in other sizes.
    """
    places = _places(base)
    layers: dict[str, dict[str, str]] = {}
    for key in foreign.tensors:
        stem, _, part = key.partition(".")
        layers.setdefault(re.sub("^lora_te1_", "lora_te_", stem), {})[part] = key
    tensors, changes = foreign.tensors, dict[str, Tensor]()
    family = sdxl.made_for(tensors)
    lost = [] if sdxl.fits_family(family, base) else [*tensors]
    for stem, keys in () if lost else layers.items():
        parts = {part: tensors[key].float().to(base.device) for part, key in keys.items()}
        prefix, path, layer = places.get(stem, ("", "", nn.Module()))
        form = next((form for part, form in _FORMS.items() if part in parts), None)
        strange = [key for part, key in keys.items() if form is None or part not in _PARTS[form] | _BESIDE]
        folded = None if form is None or strange else _fold(form, parts, layer)
        if folded is None:
            lost += strange or keys.values()
        else:
            changes |= {delta_name(f"{path}.{name}", prefix): change for name, change in folded.items()}
    if lost:
        raise UserError(
            f"{foreign.path}: matched {len(tensors) - len(lost)}/{len(tensors)} tensors of base {base.name!r}; no "
            f"place for {lost[0]}" + (f"; the file was made for {family}" if family else ""),
            allowed=f"{', '.join(_PARTS)} of LyCORIS, for layers that the base has, in its sizes",
            do="use the --base that the file was made for",
        )
    return changes


def _places(base: Base) -> dict[str, tuple[str, str, nn.Module]]:
    """By kohya's names: the model's prefix, the path within it, and the layer, of all that has a weight."""
    models: dict[str, nn.Module] = {"unet.": base.unet, **text_models(base)}
    names = (kohya_name, sdxl.kohya_name) if base.is_sdxl else (kohya_name,)
    return {
        name(prefix + path): (prefix, path, layer)
        for prefix, model in models.items()
        for path, layer in model.named_modules()
        if isinstance(getattr(layer, "weight", None), Tensor)
        for name in names
    }


def _fold(form: str, parts: Mapping[str, Tensor], layer: nn.Module) -> dict[str, Tensor] | None:
    """What a layer's parts add to its `weight` and `bias`; None where parts lack, or do not fit it."""
    own = dict(layer.named_parameters(recurse=False))
    if form in ("full", "norm"):
        names = {"diff": "weight", "diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}
        whole = {names[part]: parts[part] for part in parts.keys() & names.keys()}
        fits = all(name in own and own[name].shape == change.shape for name, change in whole.items())
        return whole if fits else None
    if "weight" not in own:
        return None
    weight = own["weight"].float()
    try:
        change, rank = {"LoCon": _low_rank, "LoHa": _hadamard, "LoKr": _kronecker}[form](parts)
    except (KeyError, RuntimeError):  # a factor lacks, or two of them do not multiply
        return None
    if len(change) != len(weight) or change.numel() != weight.numel():
        return None
    scale = float(parts["alpha"]) / rank if "alpha" in parts and rank else 1.0
    change = scale * change.reshape(weight.shape)
    if "dora_scale" in parts:
        merged = _with_magnitude(weight + change, parts["dora_scale"])
        return None if merged is None else {"weight": merged - weight}
    return {"weight": change}


def _low_rank(parts: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    up_OR, down_RI = parts["lora_up.weight"].flatten(1), parts["lora_down.weight"].flatten(1)
    if "lora_mid.weight" in parts:
        return torch.einsum("mn...,om,ni->oi...", parts["lora_mid.weight"], up_OR, down_RI), len(down_RI)
    return up_OR @ down_RI, len(down_RI)


def _hadamard(parts: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Of convolutions in Tucker's form the a are (R, out), the b (R, in), the t (R, R, height, width)."""
    w1_a, w1_b, w2_a, w2_b = (parts[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    if "hada_t1" in parts or "hada_t2" in parts:
        return _tucker(parts["hada_t1"], w1_a, w1_b) * _tucker(parts["hada_t2"], w2_a, w2_b), len(w1_b)
    return (w1_a.flatten(1) @ w1_b.flatten(1)) * (w2_a.flatten(1) @ w2_b.flatten(1)), len(w1_b)


def _kronecker(parts: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Where both factors are whole there is no rank (0), and the scale is 1."""
    w1 = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if "lokr_w2" in parts:
        w2 = parts["lokr_w2"]
    elif "lokr_t2" in parts:
        w2 = _tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    else:
        w2 = parts["lokr_w2_a"] @ parts["lokr_w2_b"].flatten(1)
    ranks = [len(parts[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in parts]
    return torch.kron(w1, w2.flatten(1)), ranks[0] if ranks else 0


def _tucker(core_SR: Tensor, a_SO: Tensor, b_RI: Tensor) -> Tensor:
    return torch.einsum("sr...,so,ri->oi...", core_SR, a_SO, b_RI)


def _with_magnitude(merged: Tensor, magnitude: Tensor) -> Tensor | None:
    """DoRA (arXiv 2402.09353, eq. 5): m * W' / |W'|, the norms over each output's part, or over each input's.

    LyCORIS writes one as (out, 1, ...), the other, its older form, as (1, in, ...).
    """
    of_outputs, of_inputs = (len(merged), *[1] * (merged.ndim - 1)), (1, merged.shape[1], *[1] * (merged.ndim - 2))
    if magnitude.shape not in (of_outputs, of_inputs):
        return None
    kept = 0 if magnitude.shape == of_outputs else 1
    others = [axis for axis in range(merged.ndim) if axis != kept]
    norms = merged.square().sum(others, keepdim=True).sqrt() + torch.finfo(torch.float32).eps
    return merged * (magnitude / norms)
