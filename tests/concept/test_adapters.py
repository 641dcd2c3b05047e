"""Every kind of adapter: how it acts while it learns and afterwards, and that the UNet gets back its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from cdvideo.base.loader import Base
from cdvideo.concept.adapters import (
    Adapter,
    changed_parameters,
    make_adapter,
    replaced,
    squared_change,
    tuned,
    unfit_weights,
)
from cdvideo.concept.concept import Concept
from cdvideo.concept.config import AdapterConfig, ConceptConfig
from cdvideo.concept.file import frozen_copy
from cdvideo.concept.lora import lora_layers, merged_weight
from cdvideo.concept.trainer import new_concept
from cdvideo.errors import UserError

SETTINGS: dict[str, dict[str, Any]] = {
    "kv": {"kind": "kv"},
    "locked": {"kind": "kv", "keys": "locked"},
    "unet": {"kind": "unet"},
    "lora": {"kind": "lora", "rank": 3, "alpha": 5.0, "targets": ("to_q", "to_out.0", "conv1", "ff.net.2")},
    "dora": {"kind": "lora", "rank": 3, "alpha": 5.0, "targets": ("to_k", "to_v", "conv1"), "dora": True},
}


def predict(base: Base) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 6, 32, generator=generator)
    return base.unet(latents, torch.tensor([10, 700]), text).sample


def learned(base: Base, config: ConceptConfig, name: str) -> tuple[Adapter, Concept]:
    """An adapter with random weights, as if it had learned them, and its concept."""
    config = dataclasses.replace(config, adapter=AdapterConfig(**SETTINGS[name]))
    adapter = make_adapter(base.unet, config.adapter, seed=0)
    with torch.no_grad():
        for tensor in adapter.weights.values():
            tensor += 0.1 * torch.randn_like(tensor)
    return adapter, new_concept(base, config, adapter)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_new_adapter_has_no_effect(tiny_base: Base, name: str) -> None:
    before = predict(tiny_base)
    with make_adapter(tiny_base.unet, AdapterConfig(**SETTINGS[name]), seed=0).attached():
        torch.testing.assert_close(predict(tiny_base), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_learned_concept_acts_as_it_did_while_learning_and_leaves_no_trace(
    tiny_base: Base, config: ConceptConfig, name: str
) -> None:
    before, modules = predict(tiny_base), dict(tiny_base.unet.named_modules())
    parameters = dict(tiny_base.unet.named_parameters())
    adapter, concept = learned(tiny_base, config, name)
    with adapter.attached():
        learning = predict(tiny_base)
    assert torch.equal(predict(tiny_base), before)
    with tuned(tiny_base.unet, concept), torch.no_grad():
        acting = predict(tiny_base)
    assert (learning - before).abs().max() > 1e-3
    torch.testing.assert_close(acting, learning, rtol=1e-4, atol=1e-5)
    assert torch.equal(predict(tiny_base), before)
    assert all(parameters[name] is parameter for name, parameter in tiny_base.unet.named_parameters())
    assert all(modules[name] is module for name, module in tiny_base.unet.named_modules())
    assert not hasattr(tiny_base.unet, "peft_config")


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_reach_every_weight_and_nothing_else(tiny_base: Base, config: ConceptConfig, name: str) -> None:
    adapter, _ = learned(tiny_base, config, name)
    tiny_base.unet.enable_gradient_checkpointing()  # recomputes in the backward pass, with the adapter in place
    with adapter.attached():
        predict(tiny_base).square().mean().backward()
    assert all(tensor.grad is not None and tensor.dtype == torch.float32 for tensor in adapter.weights.values())
    assert all(parameter.grad is None for parameter in tiny_base.unet.parameters())


@pytest.mark.parametrize("dora", [False, True])
def test_the_merged_weight_is_what_peft_merges(tiny_base: Base, config: ConceptConfig, dora: bool) -> None:
    settings = AdapterConfig(kind="lora", rank=3, alpha=5.0, dora=dora, targets=("to_k", "conv1", "proj_in"))
    adapter = make_adapter(tiny_base.unet, settings, seed=0)
    layers = lora_layers(tiny_base.unet, settings, seed=0)
    own = {path: tiny_base.unet.get_submodule(path).weight.detach().clone() for path in layers}
    with torch.no_grad():
        for path, layer in layers.items():
            assert isinstance(layer, LoraLayer)
            for part in ("lora_A", "lora_B"):
                factor = getattr(layer, part)["default"].weight
                factor += 0.1 * torch.randn_like(factor)
                adapter.weights[f"unet.{path}.{part}.weight"].copy_(factor)
            if dora:
                layer.lora_magnitude_vector["default"].weight *= 1.3
                adapter.weights[f"unet.{path}.lora_magnitude_vector"] *= 1.3
            merged = merged_weight(own[path], adapter.weights, f"unet.{path}", alpha=5.0)
            layer.merge()
            torch.testing.assert_close(merged, layer.get_base_layer().weight, rtol=1e-5, atol=1e-6)
            assert (merged - own[path]).abs().max() > 1e-2
    assert {own[path].ndim for path in own} == {2, 4}


def test_lora_starts_from_its_seed_and_leaves_the_global_one_alone(tiny_base: Base) -> None:
    settings = AdapterConfig(**SETTINGS["lora"])
    torch.manual_seed(3)
    one = make_adapter(tiny_base.unet, settings, seed=1).weights
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)
    again, other = (make_adapter(tiny_base.unet, settings, seed=seed).weights for seed in (1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_targets_that_are_nowhere_are_told(tiny_base: Base) -> None:
    with pytest.raises(UserError, match=r"adapter\.targets"):
        make_adapter(tiny_base.unet, AdapterConfig(kind="lora", targets=("to_nothing",)), seed=0)


def test_the_change_is_measured_beside_the_weights_that_it_changes(tiny_base: Base, config: ConceptConfig) -> None:
    _, concept = learned(tiny_base, config, "unet")
    for name, delta in concept.weights.items():
        delta.data = 0.25 * dict(tiny_base.unet.named_parameters())[_parameter(name)].detach()
    assert squared_change(tiny_base.unet, concept).item() == pytest.approx(0.0625, rel=1e-5)


def _parameter(delta: str) -> str:
    path = delta.removeprefix("unet.").removesuffix(".delta")
    return path if path.endswith(".bias") else f"{path}.weight"


def test_half_precision_bases_keep_their_precision(tiny_base: Base, config: ConceptConfig) -> None:
    tiny_base.to(torch.device("cpu"), torch.bfloat16)
    for name in ("unet", "lora"):
        _, concept = learned(tiny_base, config, name)
        changed = changed_parameters(tiny_base.unet, frozen_copy(concept))
        assert changed and all(tensor.dtype == torch.bfloat16 for tensor in changed.values())


@pytest.mark.parametrize("name", SETTINGS)
def test_what_has_no_place_in_the_unet_is_named(tiny_base: Base, config: ConceptConfig, name: str) -> None:
    _, concept = learned(tiny_base, config, name)
    assert unfit_weights(tiny_base, concept) == []
    first, *_ = concept.weights
    strange = first.replace("unet.", "unet.elsewhere.")
    other = {strange: concept.weights[first], first: torch.zeros(1, 1)}
    assert set(unfit_weights(tiny_base, dataclasses.replace(concept, weights=other))) == {strange, first}


def test_parameters_are_back_after_an_error(tiny_base: Base) -> None:
    own = tiny_base.unet.conv_in.weight
    with pytest.raises(KeyboardInterrupt), replaced(tiny_base.unet, {"conv_in.weight": torch.zeros_like(own)}):
        assert not tiny_base.unet.conv_in.weight.any()
        raise KeyboardInterrupt
    assert tiny_base.unet.conv_in.weight is own
