"""LyCORIS (arXiv 2309.14859, section 3): changes of weights kept in their factors, which take little room.

    LoCon   up (mid down)                      LoRA of convolutions; with mid in three parts
    LoHa    (w1_a w1_b) * (w2_a w2_b)          elementwise: FedPara, arXiv 2108.06098
    LoKr    w1 (x) w2, each whole or a b       Kronecker: KronA, arXiv 2212.10650

A layer's change is made where it is wanted, one layer after the other: all at once they are as large as the model,
while the factors are a thousandth of it. The scale, alpha / R, is within the factors. Formulas and shapes are those of
lycoris/modules and lycoris/functional of LyCORIS 3.4. In a concept file a part is `<layer>.<part>`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

# By the part that every layer of a form has, and that the scale is multiplied into.
LEADING = {"lora_up": "LoCon", "hada_w1_a": "LoHa", "lokr_w1": "LoKr", "lokr_w1_a": "LoKr"}
PARTS = {
    "LoCon": {"lora_up", "lora_down", "lora_mid"},
    "LoHa": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"},
    "LoKr": {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"},
}
# `sparse`: single numbers of the change beside the factors, `sparse_at` their rows and columns.
BESIDE = {"dora_scale", "sparse", "sparse_at"}
_ALL_PARTS = set().union(*PARTS.values()) | BESIDE

Parts = Mapping[str, Tensor]


def by_layer(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The factors of a concept's weights, by layer and part; whole changes (`.delta`) are left out."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        layer, _, part = name.rpartition(".")
        if part in _ALL_PARTS:
            layers.setdefault(layer, {})[part] = tensor
    return layers


def form_of(parts: Parts) -> str | None:
    """LoCon, LoHa or LoKr; None for parts of none of them, or of several."""
    form = next((form for part, form in LEADING.items() if part in parts), None)
    return form if form is not None and parts.keys() <= PARTS[form] | BESIDE else None


def change_of(parts: Parts, weight: Tensor) -> Tensor:
    """What the parts add to a layer's weight, float32.

    Raises:
        KeyError, RuntimeError, IndexError: For parts that lack, do not multiply, or do not fit the weight.
    """
    form = form_of(parts)
    if form is None:
        raise KeyError(f"parts {', '.join(parts)}")
    change = _FOLDS[form]({name: part.float() for name, part in parts.items()})
    if len(change) != len(weight):
        raise RuntimeError(f"{len(change)} outputs for {len(weight)}")
    change = change.reshape(weight.shape)
    if "sparse" in parts:
        flat_OI = change.flatten(1)
        flat_OI = flat_OI.index_put(tuple(parts["sparse_at"].long()), parts["sparse"].float(), accumulate=True)
        change = flat_OI.reshape(weight.shape)
    if "dora_scale" in parts:
        merged = weight.float() + change
        return _with_magnitude(merged, parts["dora_scale"].float()) - weight.float()
    return change


def has_effect(parts: Parts) -> bool:
    """Whether the parts change anything; a Kronecker product does where no factor is zero."""
    if "dora_scale" in parts or ("sparse" in parts and parts["sparse"].any()):
        return True
    form = form_of(parts)
    assert form is not None
    if form == "LoKr":
        return bool(_outer(parts).any() and _inner(parts).any())
    return bool(_FOLDS[form](parts).any())


def low_rank_of(parts: Parts, weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """up_OR and down_RI with `change_of` = up_OR down_RI, of as few R as the form tells, made without the change.

    None for what is of full rank: magnitudes, and single numbers.
    """
    if {"dora_scale", "sparse"} & parts.keys():
        return None
    parts = {name: part.double() for name, part in parts.items()}
    form = form_of(parts)
    if form == "LoCon":
        return _locon_pair(parts)
    if form == "LoHa":
        (a1, b1), (a2, b2) = (_hadamard_pair(parts, number) for number in (1, 2))
        return _rows_times(a1.T, a2.T).T, _rows_times(b1, b2)
    (u1, v1), (u2, v2) = _outer_pair(parts), _inner_pair(parts)
    return torch.kron(u1, u2.contiguous()), torch.kron(v1, v2.contiguous())


def _locon(parts: Parts) -> Tensor:
    up_OR, down_RI = _locon_pair(parts)
    return up_OR @ down_RI


def _locon_pair(parts: Parts) -> tuple[Tensor, Tensor]:
    up_OR, down_RI = parts["lora_up"].flatten(1), parts["lora_down"].flatten(1)
    if "lora_mid" in parts:
        down_RI = torch.einsum("mn...,ni->mi...", parts["lora_mid"], down_RI).flatten(1)
    return up_OR, down_RI


def _loha(parts: Parts) -> Tensor:
    (a1, b1), (a2, b2) = (_hadamard_pair(parts, number) for number in (1, 2))
    return (a1 @ b1) * (a2 @ b2)


def _hadamard_pair(parts: Parts, number: int) -> tuple[Tensor, Tensor]:
    """One of the two that are multiplied, as (out, R) (R, in). In Tucker's form a is (R, out), b (R, in)."""
    a, b = parts[f"hada_w{number}_a"], parts[f"hada_w{number}_b"]
    if "hada_t1" in parts or "hada_t2" in parts:
        return _tucker_pair(parts[f"hada_t{number}"], a, b)
    return a.flatten(1), b.flatten(1)


def _lokr(parts: Parts) -> Tensor:
    return torch.kron(_outer(parts).contiguous(), _inner(parts).contiguous())


def _outer(parts: Parts) -> Tensor:
    return parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]


def _inner(parts: Parts) -> Tensor:
    if "lokr_w2" in parts:
        return parts["lokr_w2"].flatten(1)
    a, b = _inner_factors(parts)
    return a @ b


def _outer_pair(parts: Parts) -> tuple[Tensor, Tensor]:
    return _halves(parts["lokr_w1"]) if "lokr_w1" in parts else (parts["lokr_w1_a"], parts["lokr_w1_b"])


def _inner_pair(parts: Parts) -> tuple[Tensor, Tensor]:
    return _halves(parts["lokr_w2"].flatten(1)) if "lokr_w2" in parts else _inner_factors(parts)


def _inner_factors(parts: Parts) -> tuple[Tensor, Tensor]:
    if "lokr_t2" in parts:
        return _tucker_pair(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    return parts["lokr_w2_a"], parts["lokr_w2_b"].flatten(1)


def _tucker_pair(core_SR: Tensor, a_SO: Tensor, b_RI: Tensor) -> tuple[Tensor, Tensor]:
    return a_SO.T, torch.einsum("sr...,ri->si...", core_SR, b_RI).flatten(1)


def _halves(whole: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as a product over its shorter side."""
    one = torch.eye(min(whole.shape), dtype=whole.dtype, device=whole.device)
    return (one, whole) if len(whole) <= whole.shape[1] else (whole, one)


def _rows_times(one_RN: Tensor, other_SN: Tensor) -> Tensor:
    """Each row of one times each of the other: (R S, N), so that products of sums become sums of products."""
    return (one_RN[:, None] * other_SN[None]).flatten(0, 1)


_FOLDS = {"LoCon": _locon, "LoHa": _loha, "LoKr": _lokr}


def _with_magnitude(merged: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA (arXiv 2402.09353, eq. 5): m * W' / |W'|, the norms over each output's part, or over each input's.

    LyCORIS writes one as (out, 1, ...), the other, its older form, as (1, in, ...).
    """
    of_outputs, of_inputs = (len(merged), *[1] * (merged.ndim - 1)), (1, merged.shape[1], *[1] * (merged.ndim - 2))
    if tuple(magnitude.shape) not in (of_outputs, of_inputs):
        raise RuntimeError(f"magnitudes of shape {tuple(magnitude.shape)}")
    kept = 0 if tuple(magnitude.shape) == of_outputs else 1
    others = [axis for axis in range(merged.ndim) if axis != kept]
    norms = merged.square().sum(others, keepdim=True).sqrt() + torch.finfo(torch.float32).eps
    return merged * (magnitude / norms)


def multiplied(weights: Mapping[str, Tensor], factor: float) -> dict[str, Tensor] | None:
    """The weights with their changes multiplied; None where magnitudes make that impossible within the factors."""
    if any(name.endswith(".dora_scale") for name in weights):
        return None
    return {
        name: tensor * factor if name.rpartition(".")[2] in {*LEADING, "sparse", "delta"} else tensor
        for name, tensor in weights.items()
    }


def each_change(weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """By layer, what the factors add to its weight, one after the other.

    Args:
        parameters: The layers' weights, by the layers' names.
    """
    for layer, parts in by_layer(weights).items():
        yield layer, change_of(parts, parameters[layer])
