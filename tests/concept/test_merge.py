"""Concepts trained apart, in one: what the closed form promises, and what can not be merged."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cdvideo.base.loader import Base
from cdvideo.base.text import encode_text, tokenize
from cdvideo.concept.adapters import delta_name, make_adapter, parameter_changes, unfit_weights
from cdvideo.concept.config import AdapterConfig, ConceptConfig
from cdvideo.concept.file import Concept, frozen_copy
from cdvideo.concept.merge import constrained_merge, merge_concepts
from cdvideo.concept.trainer import new_concept
from cdvideo.errors import UserError


def learned(base: Base, config: ConceptConfig, token: str, **adapter: object) -> Concept:
    """A concept with random rows and weights, as if it had learned them."""
    config = dataclasses.replace(config, token=token, adapter=AdapterConfig(**adapter))  # type: ignore[arg-type]
    concept = new_concept(base, config, make_adapter(base.unet, config.adapter, seed=0))
    with torch.no_grad():
        for tensor in (*concept.weights.values(), *concept.tokens.values()):
            tensor += 0.1 * torch.randn_like(tensor)
    return frozen_copy(concept)


def test_the_closed_form_does_as_told_and_no_more() -> None:
    targets_SD, values_SO, regular_ND = torch.randn(3, 16), torch.randn(3, 5), torch.randn(400, 16)
    change_OD = constrained_merge(targets_SD, values_SO, regular_ND)
    torch.testing.assert_close(targets_SD @ change_OD.T, values_SO, rtol=1e-3, atol=1e-3)
    # Of all changes that do so, none moves ordinary features less: any step within the constraint moves them more.
    free_DD = torch.eye(16) - torch.linalg.pinv(targets_SD) @ targets_SD
    moved = (regular_ND @ change_OD.T).norm()
    for _ in range(10):
        other_OD = change_OD + 0.1 * torch.randn(5, 16) @ free_DD
        torch.testing.assert_close(targets_SD @ other_OD.T, values_SO, rtol=1e-3, atol=1e-3)
        assert (regular_ND @ other_OD.T).norm() > moved


def test_words_told_twice_are_no_trouble() -> None:
    targets_SD, values_SO = torch.randn(3, 16).repeat(2, 1), torch.randn(3, 5).repeat(2, 1)
    change_OD = constrained_merge(targets_SD, values_SO, torch.randn(400, 16))
    torch.testing.assert_close(targets_SD @ change_OD.T, values_SO, rtol=1e-3, atol=1e-3)


def test_each_concept_s_words_are_read_as_it_learned(tiny_base: Base, config: ConceptConfig) -> None:
    one, other = learned(tiny_base, config, "sks"), learned(tiny_base, config, "rex", keys="locked", kind="kv")
    merged = merge_concepts(tiny_base, [one, other])
    assert merged.metadata.class_words == {"sks": "dog", "rex": "dog"} and merged.tokens.keys() == {"sks", "rex"}
    assert merged.weights.keys() == one.weights.keys() and unfit_weights(tiny_base.unet, merged) == []
    name = next(name for name in other.weights)
    for concept, token in ((one, "sks"), (other, "rex")):
        batch = tokenize(tiny_base.tokenizer, [f"a photo of a {token} dog"], tokens={token: 1})
        hidden_LD = encode_text(tiny_base.text_encoder, batch, rows=concept.tokens).hidden_BLD[0].detach()
        words_SD = hidden_LD[batch.slots[0].at : batch.eos_B[0] + 1]
        wanted = words_SD @ concept.weights[name].float().T
        got = words_SD @ merged.weights[name].float().T
        summed = words_SD @ (one.weights[name].float() + other.weights[name].float()).T
        assert (got - wanted).norm() < 0.3 * (summed - wanted).norm()


def test_changes_of_the_whole_unet_are_summed(tiny_base: Base, config: ConceptConfig) -> None:
    one, other = learned(tiny_base, config, "sks", kind="lora", dora=True), learned(tiny_base, config, "rex", kind="kv")
    merged = merge_concepts(tiny_base, [one, other])
    assert merged.metadata.adapter == "unet" and unfit_weights(tiny_base.unet, merged) == []
    changes = parameter_changes(tiny_base.unet, one), parameter_changes(tiny_base.unet, other)
    for name in changes[0].keys() | changes[1].keys():
        expected = sum(change[name].float() for change in changes if name in change)
        torch.testing.assert_close(merged.weights[delta_name(name)].float(), expected, rtol=1e-3, atol=1e-4)


def test_tokens_alone_stay_tokens_alone(tiny_base: Base, config: ConceptConfig) -> None:
    merged = merge_concepts(tiny_base, [learned(tiny_base, config, token, kind="token") for token in ("sks", "rex")])
    assert merged.weights == {} and merged.metadata.adapter == "token" and len(merged.tokens) == 2


def test_what_does_not_go_together_is_told(tiny_base: Base, config: ConceptConfig) -> None:
    one, other = learned(tiny_base, config, "sks"), learned(tiny_base, config, "rex")
    with pytest.raises(UserError, match="called sks"):
        merge_concepts(tiny_base, [one, one])
    foreign = dataclasses.replace(other, metadata=dataclasses.replace(other.metadata, base_hash="0" * 16))
    with pytest.raises(UserError, match="different weights"):
        merge_concepts(tiny_base, [one, foreign])
