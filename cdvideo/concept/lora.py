"""Low-rank changes of the UNet's weights: LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353), in peft's layers.

peft's layers stand in the UNet only for the length of a training step; a learned concept acts through the merged
weight, which costs nothing while sampling. Names in a concept file are peft's own, after `unet.`, as diffusers has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from cdvideo.concept.config import AdapterConfig
from cdvideo.errors import UserError

_MAGNITUDE = "lora_magnitude_vector"


def lora_layers(unet: UNet2DConditionModel, config: AdapterConfig, *, seed: int) -> dict[str, nn.Module]:
    """peft's layers around the targeted ones, by the path of the layer they wrap; the UNet itself is as before.

    Raises:
        UserError: For targets that no layer of this UNet is called by.
    """
    settings = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets), use_dora=config.dora
    )
    if not any(name.endswith(tuple(f".{target}" for target in config.targets)) for name, _ in unet.named_modules()):
        raise UserError(
            f"adapter.targets={list(config.targets)}: no layer of the UNet is called so",
            allowed="the last parts of layers' names, such as to_q, to_k, to_v, to_out.0, ff.net.2, conv1",
            do="correct adapter.targets",
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # peft draws A from the global generator
        inject_adapter_in_model(settings, unet)
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)}
    for path, layer in layers.items():
        _put(unet, path, layer.get_base_layer())
        for name, parameter in layer.named_parameters():
            if "lora_" in name:  # in full precision, whatever the base's is
                parameter.data = parameter.data.float()
    del unet.peft_config
    return layers


def lora_factors(layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The trainable factors of these layers, by peft's names: `unet.<path>.lora_A.weight`."""
    return {
        f"unet.{path}.{name.replace('.default', '').replace(_MAGNITUDE + '.weight', _MAGNITUDE)}": parameter
        for path, layer in layers.items()
        for name, parameter in layer.named_parameters()
        if "lora_" in name
    }


@contextmanager
def layers_in_place(unet: UNet2DConditionModel, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the block these layers stand in the UNet, at their paths; then the former ones do again."""
    former = {path: unet.get_submodule(path) for path in layers}
    try:
        for path, layer in layers.items():
            _put(unet, path, layer)
        yield
    finally:
        for path, layer in former.items():
            _put(unet, path, layer)


def lora_paths(factors: Mapping[str, Tensor]) -> set[str]:
    """The layers that these factors change, as the file names them: `unet.<path>`."""
    return {name.partition(".lora_")[0] for name in factors}


def merged_weight(weight: Tensor, factors: Mapping[str, Tensor], layer: str, *, alpha: float) -> Tensor:
    """The weight that acts as the layer with its factors does, in float32.

    LoRA, eq. 3: W' = W + alpha / R * B A. DoRA, eq. 5: each output's part of W' is brought to its own magnitude m, so
    m * W' / |W'|.

    Args:
        weight: The layer's own; of a linear layer or a convolution.
        factors: By peft's names, of all layers.
        layer: This one, as the file names it.
        alpha: As it was trained with; the rank R is that of the factors.
    """
    down, up = factors[f"{layer}.lora_A.weight"].float(), factors[f"{layer}.lora_B.weight"].float()
    change = (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    merged = weight.float() + alpha / len(down) * change
    magnitude = factors.get(f"{layer}.{_MAGNITUDE}")
    if magnitude is None:
        return merged
    norms = merged.flatten(1).norm(dim=1)
    return merged * (magnitude.float().flatten() / norms).view(-1, *[1] * (merged.ndim - 1))


def _put(unet: UNet2DConditionModel, path: str, layer: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(unet.get_submodule(parent), leaf, layer)
