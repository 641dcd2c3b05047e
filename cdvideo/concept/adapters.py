"""The kinds of adapters: what is learned in the UNet beside the token's rows, and how it acts.

    token   nothing: the rows alone        Textual Inversion, arXiv 2208.01618
    kv      K and V of cross-attention     Custom Diffusion, arXiv 2212.04488
    unet    every weight of the UNet       DreamBooth, arXiv 2208.12242
    lora    low-rank changes               LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353

The base is never written: while a concept acts, the UNet holds other tensors in place of its own, and gets them back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from cdvideo.concept.config import AdapterConfig
from cdvideo.concept.kv import attached, kv_projections, zero_deltas
from cdvideo.concept.lora import layers_in_place, lora_factors, lora_layers, lora_paths, merged_weight

if TYPE_CHECKING:
    from cdvideo.concept.file import Concept


@dataclass(frozen=True)
class Adapter:
    """An adapter in training: its weights by their names in the concept file, float32, and how they act.

    Gradients reach the weights from what is computed within `attached()`; the backward pass belongs within it too.
    """

    weights: dict[str, Tensor]
    attached: Callable[[], AbstractContextManager[None]]


def make_adapter(unet: UNet2DConditionModel, config: AdapterConfig, *, seed: int) -> Adapter:
    """An adapter of the kind that is asked for, which has no effect on the UNet yet."""
    if config.kind == "kv":
        deltas = zero_deltas(unet, keys=config.keys == "tuned")
        return Adapter(deltas, lambda: attached(unet, deltas))
    if config.kind == "unet":
        deltas = {
            name: torch.zeros_like(parameter, dtype=torch.float32).requires_grad_()
            for name, parameter in parameters_by_delta(unet).items()
        }
        return Adapter(deltas, lambda: replaced(unet, _added(unet, deltas)))
    if config.kind == "lora":
        layers = lora_layers(unet, config, seed=seed)
        return Adapter(lora_factors(layers), lambda: layers_in_place(unet, layers))
    return Adapter({}, nullcontext)


@contextmanager
def tuned(unet: UNet2DConditionModel, concept: Concept | None) -> Iterator[None]:
    """Within the block the UNet acts as the concept has tuned it; afterwards it is bit-equal to what it was.

    The token's rows are not the UNet's matter: they go to `encode_text`.
    """
    if concept is None or not concept.weights:
        yield
    elif concept.metadata.adapter == "kv":
        with attached(unet, concept.weights):
            yield
    else:
        with replaced(unet, changed_parameters(unet, concept)):
            yield


def changed_parameters(unet: UNet2DConditionModel, concept: Concept) -> dict[str, Tensor]:
    """Those of the UNet's parameters that the concept changes, as it has them, by their names in the UNet.

    In the base's precision; the sums are made in float32.
    """
    if concept.metadata.adapter != "lora":
        return _added(unet, concept.weights)
    alpha = float(concept.metadata.adapter_settings["alpha"])
    merged = {}
    for path in sorted(lora_paths(concept.weights)):
        weight = unet.get_submodule(path).weight
        merged[f"{path}.weight"] = merged_weight(weight, concept.weights, path, alpha=alpha).to(weight.dtype)
    return merged


def relative_change(unet: UNet2DConditionModel, concept: Concept) -> Tensor:
    """The norm of the concept's change beside that of the weights that it changes; 0 where it changes none."""
    parameters, change, own = dict(unet.named_parameters()), [], []
    for name, tensor in changed_parameters(unet, concept).items():
        change.append((tensor.float() - parameters[name].float()).square().sum())
        own.append(parameters[name].float().square().sum())
    return torch.stack(change).sum().div(torch.stack(own).sum()).sqrt() if change else torch.zeros(())


def unfit_weights(unet: UNet2DConditionModel, concept: Concept) -> list[str]:
    """The names of those of the concept's weights that have no place in this UNet."""
    if concept.metadata.adapter == "lora":
        layers = dict(unet.named_modules())
        return [name for name, factor in concept.weights.items() if not _fits_layer(layers, name, factor)]
    kv = concept.metadata.adapter == "kv"
    places = {name: linear.weight for name, linear in kv_projections(unet).items()} if kv else parameters_by_delta(unet)
    return [name for name, delta in concept.weights.items() if name not in places or places[name].shape != delta.shape]


def parameters_by_delta(unet: UNet2DConditionModel) -> dict[str, nn.Parameter]:
    """All parameters by the name of their change: `unet.<path>.delta` for weights, `unet.<path>.bias.delta`."""
    return {f"unet.{name.removesuffix('.weight')}.delta": parameter for name, parameter in unet.named_parameters()}


@contextmanager
def replaced(unet: UNet2DConditionModel, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block these tensors stand in place of the UNet's parameters of their names; no value is copied."""
    homes = [(unet.get_submodule(path)._parameters, leaf, tensor) for path, leaf, tensor in _split(tensors)]
    former = [home[leaf] for home, leaf, _ in homes]
    try:
        for home, leaf, tensor in homes:
            home[leaf] = tensor  # as torch.func.functional_call does it
        yield
    finally:
        for (home, leaf, _), parameter in zip(homes, former, strict=True):
            home[leaf] = parameter


def _split(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        yield path, leaf, tensor


def _added(unet: UNet2DConditionModel, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters plus their changes, by the parameters' names."""
    changed = {}
    for name, parameter in unet.named_parameters():
        delta = deltas.get(f"unet.{name.removesuffix('.weight')}.delta")
        if delta is not None:
            changed[name] = (parameter.float() + delta.float()).to(parameter.dtype)
    return changed


def _fits_layer(layers: Mapping[str, nn.Module], name: str, factor: Tensor) -> bool:
    """Whether a LoRA factor belongs to a layer of these: A reads what the layer reads, B and m make what it makes."""
    path, _, part = name.removeprefix("unet.").partition(".lora_")
    layer = layers.get(path)
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        return False
    if part == "A.weight":
        return factor.shape[1:] == layer.weight.shape[1:]
    if part == "B.weight":
        return len(factor) == len(layer.weight)
    return part == "magnitude_vector" and factor.numel() == len(layer.weight)
