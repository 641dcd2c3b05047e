"""The kinds of adapters: what is learned in the UNet beside the token's rows, and how it acts.

    token   nothing: the rows alone        Textual Inversion, arXiv 2208.01618
    kv      K and V of cross-attention     Custom Diffusion, arXiv 2212.04488
    unet    every weight of the UNet       DreamBooth, arXiv 2208.12242
    lora    low-rank changes               LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353
    lycoris other factors, whole changes   LyCORIS, arXiv 2309.14859; from files of others alone

The base is never written: while a concept acts, the UNet holds other tensors in place of its own, and gets them back.

Concepts that were trained here leave the text encoder as it is. LoRA files from elsewhere often change it too: `lora`,
`lycoris` and `unet` may hold weights for it, whose names begin with `text_encoder.text_model.`, in SDXL's second one
with `text_encoder_2.text_model.`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from cdvideo.base.loader import Base
from cdvideo.concept import lycoris
from cdvideo.concept.config import AdapterConfig
from cdvideo.concept.kv import attached, kv_projections, zero_deltas
from cdvideo.concept.lora import layers_in_place, lora_factors, lora_layers, lora_paths, merged_weight
from cdvideo.concept.losses import anchor_loss

if TYPE_CHECKING:
    from cdvideo.concept.concept import Concept


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
            delta_name(name): torch.zeros_like(parameter, dtype=torch.float32).requires_grad_()
            for name, parameter in unet.named_parameters()
        }
        changes = {name: deltas[delta_name(name)] for name, _ in unet.named_parameters()}
        return Adapter(deltas, lambda: replaced(unet, _sums(unet, changes.items())))
    if config.kind == "lora":
        layers = lora_layers(unet, config, seed=seed)
        return Adapter(lora_factors(layers), lambda: layers_in_place(unet, layers))
    return Adapter({}, nullcontext)


@contextmanager
def tuned(
    unet: UNet2DConditionModel, concept: Concept | None, *, share: Callable[[str], float] | None = None
) -> Iterator[None]:
    """Within the block the UNet acts as the concept has tuned it; afterwards it is bit-equal to what it was.

    The token's rows are not the UNet's matter: they go to `encode_text`.

    Args:
        share: of the change of a parameter of that name that acts; None is all of every one.
    """
    if concept is None or not concept.weights:
        yield
    elif share is not None:
        changes = ((name, share(name) * change) for name, change in _each_change(unet, concept, "unet."))
        with replaced(unet, _sums(unet, changes)):
            yield
    elif concept.metadata.adapter == "kv":
        with attached(unet, concept.weights):
            yield
    else:
        with replaced(unet, changed_parameters(unet, concept)):
            yield


@contextmanager
def tuned_text(base: Base, concept: Concept | None) -> Iterator[None]:
    """Within the block the text encoders act as the concept has tuned them; afterwards they are bit-equal to before."""
    with ExitStack() as stack:
        if concept is not None:
            for prefix, encoder in text_models(base).items():
                stack.enter_context(replaced(encoder, _sums(encoder, _each_change(encoder, concept, prefix))))
        yield


def changed_parameters(unet: UNet2DConditionModel, concept: Concept) -> dict[str, Tensor]:
    """Those of the UNet's parameters that the concept changes, as it has them, by their names in the UNet.

    In the base's precision; the sums are made in float32.
    """
    return _sums(unet, _each_change(unet, concept, "unet."))


def parameter_changes(unet: UNet2DConditionModel, concept: Concept) -> dict[str, Tensor]:
    """What the concept adds to the UNet's parameters, by their names in the UNet; gradients reach its weights."""
    return dict(_each_change(unet, concept, "unet."))


def text_changes(base: Base, concept: Concept) -> dict[str, Tensor]:
    """What the concept adds to the text encoders' parameters, by `delta_name`; of most concepts nothing."""
    return {
        delta_name(name, prefix): change
        for prefix, encoder in text_models(base).items()
        for name, change in _each_change(encoder, concept, prefix)
    }


def iter_changes(base: Base, concept: Concept) -> Iterator[tuple[str, Tensor]]:
    """What the concept adds to UNet and text encoders, by `delta_name`, each made only when it is asked for."""
    models: dict[str, nn.Module] = {"unet.": base.unet, **text_models(base)}
    for prefix, model in models.items():
        yield from ((delta_name(name, prefix), change) for name, change in _each_change(model, concept, prefix))


def text_models(base: Base) -> dict[str, nn.Module]:
    """The base's text encoders, by how names of their layers begin in a file.

    transformers 5 took `text_model` out of the first; files keep it.
    """
    return {
        f"{name}." if hasattr(encoder, "text_model") else f"{name}.text_model.": encoder
        for name, encoder in base.text_encoders.items()
    }


def squared_change(unet: UNet2DConditionModel, concept: Concept) -> Tensor:
    """`anchor_loss` of the concept: its change beside the weights that it changes; 0 where it changes none."""
    if not any(name.startswith("unet.") for name in concept.weights):
        return torch.zeros(())
    parameters = dict(unet.named_parameters())
    # One by one: together a LoRA's changes are as large as all the weights that it changes.
    return anchor_loss((change, parameters[name]) for name, change in _each_change(unet, concept, "unet."))


def unfit_weights(base: Base, concept: Concept) -> list[str]:
    """The names of those of the concept's weights that have no place in this base's UNet or text encoders."""
    models: dict[str, nn.Module] = {"unet.": base.unet, **text_models(base)}
    if concept.metadata.adapter == "lora":
        layers = {prefix + path: layer for prefix, model in models.items() for path, layer in model.named_modules()}
        return [name for name in concept.weights if not _fits_layer(layers, name, concept.weights)]
    parameters = {prefix + name: p for prefix, model in models.items() for name, p in model.named_parameters()}
    places = {delta_name(name, ""): parameter.shape for name, parameter in parameters.items()}
    if concept.metadata.adapter == "lycoris":
        factors = lycoris.by_layer(concept.weights)
        unfit = [layer for layer, parts in factors.items() if not fits_layer(parts, parameters.get(f"{layer}.weight"))]
        inside = {f"{layer}.{part}" for layer, parts in factors.items() for part in parts}
        whole = {name: delta for name, delta in concept.weights.items() if name not in inside}
        return unfit + [name for name, delta in whole.items() if places.get(name) != delta.shape]
    if concept.metadata.adapter == "kv":
        places = {name: places[name] for name in kv_projections(base.unet)}
    return [name for name, delta in concept.weights.items() if places.get(name) != delta.shape]


def delta_name(parameter: str, prefix: str = "unet.") -> str:
    """How the file calls the change of a parameter: `unet.<path>.delta` for a weight, `unet.<path>.bias.delta`."""
    return f"{prefix}{parameter.removesuffix('.weight')}.delta"


def fits_layer(parts: Mapping[str, Tensor], weight: Tensor | None) -> bool:
    """Whether these factors of LyCORIS make a change of the weight's shape; nothing is computed."""
    if weight is None:
        return False
    try:
        lycoris.change_of({name: part.to("meta") for name, part in parts.items()}, weight.to("meta"))
    except (KeyError, RuntimeError, IndexError, TypeError):
        return False
    return True


@contextmanager
def replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block these tensors stand in place of the model's parameters of their names; no value is copied."""
    homes: list[tuple[dict[str, Any], str, Tensor]] = [
        (model.get_submodule(path)._parameters, leaf, tensor) for path, leaf, tensor in _split(tensors)
    ]
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


def _each_change(model: nn.Module, concept: Concept, prefix: str) -> Iterator[tuple[str, Tensor]]:
    weights = {name: tensor for name, tensor in concept.weights.items() if name.startswith(prefix)}
    parameters = dict(model.named_parameters())
    if concept.metadata.adapter != "lora":
        names = {delta_name(name, prefix): name for name in parameters}
        yield from ((names[name], delta) for name, delta in weights.items() if name in names)
        by_name = {delta_name(name, prefix).removesuffix(".delta"): weight for name, weight in parameters.items()}
        yield from ((names[f"{layer}.delta"], change) for layer, change in lycoris.each_change(weights, by_name))
        return
    alpha = float(concept.metadata.adapter_settings["alpha"])
    for layer in sorted(lora_paths(weights)):
        name = f"{layer.removeprefix(prefix)}.weight"
        yield name, merged_weight(parameters[name], weights, layer, alpha=alpha) - parameters[name].float()


def _sums(model: nn.Module, changes: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Parameters plus their changes, made one after the other, in the parameters' precision."""
    parameters = dict(model.named_parameters())
    return {name: (parameters[name].float() + change.float()).to(parameters[name].dtype) for name, change in changes}


def _fits_layer(layers: Mapping[str, nn.Module], name: str, factors: Mapping[str, Tensor]) -> bool:
    """Whether a LoRA factor belongs to a layer of these: A reads what the layer reads, B and m make what it makes, and
    A and B have the same rank."""
    path, _, part = name.partition(".lora_")
    layer, factor = layers.get(path), factors[name]
    down, up = factors.get(f"{path}.lora_A.weight"), factors.get(f"{path}.lora_B.weight")
    if not isinstance(layer, (nn.Linear, nn.Conv2d)) or not factor.is_floating_point() or down is None or up is None:
        return False
    weight = layer.weight
    if part == "A.weight":
        return factor.ndim == weight.ndim and factor.shape[1:] == weight.shape[1:]
    if part == "B.weight":
        rank = len(down) if down.ndim else 0
        return 0 < rank == factor.numel() // len(weight) and factor.shape[:2] == (len(weight), rank)
    return part == "magnitude_vector" and factor.numel() == len(weight)
