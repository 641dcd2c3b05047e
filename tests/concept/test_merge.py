"""Concepts trained apart, in one: what the closed form promises, and what can not be merged."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cdvideo.base.loader import Base, load_base
from cdvideo.base.text import encode_text, tokenize
from cdvideo.concept.adapters import delta_name, make_adapter, parameter_changes, text_changes, unfit_weights
from cdvideo.concept.concept import Concept
from cdvideo.concept.config import AdapterConfig, ConceptConfig
from cdvideo.concept.file import frozen_copy
from cdvideo.concept.merge import constrained_merge, merge_concepts, weighted
from cdvideo.concept.phrases import fill
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
    one = learned(tiny_base, config, "sks", kind="kv")
    other = learned(tiny_base, config, "rex", keys="locked", kind="kv")
    merged = merge_concepts(tiny_base, [one, other])
    assert merged.metadata.class_words == {"sks": "dog", "rex": "dog"} and merged.tokens.keys() == {"sks", "rex"}
    assert merged.weights.keys() == one.weights.keys() and unfit_weights(tiny_base, merged) == []
    name = next(name for name in other.weights)
    for concept, token in ((one, "sks"), (other, "rex")):
        batch = tokenize(tiny_base.tokenizer, [f"a photo of a {token} dog"], tokens={token: 1})
        hidden_LD = encode_text(tiny_base.text_encoder, batch, rows=concept.tokens).hidden_BLD[0].detach()
        words_SD = hidden_LD[batch.slots[0].at : batch.eos_B[0] + 1]
        wanted = words_SD @ concept.weights[name].float().T
        got = words_SD @ merged.weights[name].float().T
        summed = words_SD @ (one.weights[name].float() + other.weights[name].float()).T
        assert (got - wanted).norm() < 0.3 * (summed - wanted).norm()


def test_words_are_read_so_in_the_prompts_of_either_style(config: ConceptConfig) -> None:
    """A concept's file does not say which it was learned in; the embedded base's text is wide enough for both."""
    base = load_base("tiny", device=torch.device("cpu"))
    concepts = {token: learned(base, config, token, kind="kv") for token in ("sks", "rex")}
    merged = merge_concepts(base, [*concepts.values()])
    name = next(name for name in merged.weights if "to_v" in name)
    for template in ("a good photo of a {}", "a picture of a {}", "an illustration of a {}", "a {}"):
        for token, concept in concepts.items():
            batch = tokenize(base.tokenizer, [fill(template, f"{token} dog")], tokens={token: 1})
            hidden_LD = encode_text(base.text_encoder, batch, rows=concept.tokens).hidden_BLD[0].detach()
            words_SD = hidden_LD[batch.slots[0].at : batch.eos_B[0] + 1]
            wanted = words_SD @ concept.weights[name].float().T
            missed = words_SD @ merged.weights[name].float().T - wanted
            assert missed.norm() < 0.1 * wanted.norm(), (template, token)


def test_changes_of_the_whole_unet_are_summed(tiny_base: Base, config: ConceptConfig) -> None:
    one, other = learned(tiny_base, config, "sks", kind="lora", dora=True), learned(tiny_base, config, "rex", kind="kv")
    merged = merge_concepts(tiny_base, [one, other])
    assert merged.metadata.adapter == "unet" and unfit_weights(tiny_base, merged) == []
    changes = parameter_changes(tiny_base.unet, one), parameter_changes(tiny_base.unet, other)
    for name in changes[0].keys() | changes[1].keys():
        expected = sum(change[name].float() for change in changes if name in change)
        torch.testing.assert_close(merged.weights[delta_name(name)].float(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["kv", "lora", "token"])
def test_what_was_true_of_one_training_is_not_said_of_the_merged(
    tiny_base: Base, config: ConceptConfig, kind: str
) -> None:
    config = dataclasses.replace(config, seed=7)
    one, other = (learned(tiny_base, config, token, kind=kind) for token in ("sks", "rex"))
    assert one.metadata.seed == 7 and one.metadata.steps and one.metadata.lr and one.metadata.loss_weights
    merged = merge_concepts(tiny_base, [one, other]).metadata
    said = merged.seed, merged.steps, merged.lr, merged.token_lr, merged.loss_weights, merged.initialiser
    assert said == (0, 0, 0.0, 0.0, {}, "")
    kept = ("base_name", "base_hash", "resolution", "prediction_type")
    assert all(getattr(merged, name) == getattr(one.metadata, name) for name in kept)


def test_tokens_alone_stay_tokens_alone(tiny_base: Base, config: ConceptConfig) -> None:
    merged = merge_concepts(tiny_base, [learned(tiny_base, config, token, kind="token") for token in ("sks", "rex")])
    assert merged.weights == {} and merged.metadata.adapter == "token" and len(merged.tokens) == 2


def test_what_does_not_go_together_is_told(tiny_base: Base, config: ConceptConfig) -> None:
    one = learned(tiny_base, config, "sks")
    with pytest.raises(UserError, match="called sks"):
        merge_concepts(tiny_base, [one, one])


def test_concepts_of_relatives_of_a_base_go_together(tiny_base: Base, config: ConceptConfig) -> None:
    """Such as one of a folder and one of the same weights in a single file; each was told of when it was loaded."""
    one, other = learned(tiny_base, config, "sks"), learned(tiny_base, config, "rex")
    foreign = dataclasses.replace(other, metadata=dataclasses.replace(other.metadata, base_hash="0" * 16))
    assert merge_concepts(tiny_base, [one, foreign]).tokens.keys() == {"sks", "rex"}


def with_text(base: Base, concept: Concept) -> Concept:
    """A LoRA that changes a layer of the text encoder too."""
    layer = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    factors = {f"{layer}.lora_A.weight": torch.randn(2, 32), f"{layer}.lora_B.weight": torch.randn(64, 2)}
    return dataclasses.replace(concept, weights={**concept.weights, **factors})


def test_low_rank_changes_stay_low_rank(tiny_base: Base, config: ConceptConfig) -> None:
    """Of several ranks and alphas, with different layers, one of them in the text encoder."""
    one = with_text(
        tiny_base, learned(tiny_base, config, "sks", kind="lora", rank=3, alpha=5.0, targets=("to_k", "conv1"))
    )
    other = with_text(tiny_base, learned(tiny_base, config, "rex", kind="lora", rank=2, targets=("to_k", "to_q")))
    merged = merge_concepts(tiny_base, [one, other])
    assert merged.metadata.adapter == "lora" and merged.tokens.keys() == {"sks", "rex"}
    assert unfit_weights(tiny_base, merged) == []
    for changes_of, model in ((parameter_changes, tiny_base.unet), (text_changes, tiny_base)):
        changes = [changes_of(model, concept) for concept in (one, other)]  # type: ignore[arg-type]
        summed = changes_of(model, merged)  # type: ignore[arg-type]
        assert summed.keys() == changes[0].keys() | changes[1].keys() and summed
        for name, change in summed.items():
            expected = sum(part[name] for part in changes if name in part)
            torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-6)


def test_what_only_one_changes_stays_as_it_is(tiny_base: Base, config: ConceptConfig) -> None:
    tuned, token = learned(tiny_base, config, "sks", kind="lora"), learned(tiny_base, config, "rex", kind="token")
    merged = merge_concepts(tiny_base, [token, tuned])
    assert merged.weights is tuned.weights and merged.metadata.adapter_settings == tuned.metadata.adapter_settings
    kv = learned(tiny_base, config, "sks", kind="kv")
    nameless = dataclasses.replace(kv, tokens={}, metadata=dataclasses.replace(kv.metadata, class_words={}))
    merged = merge_concepts(tiny_base, [token, nameless])
    assert merged.weights is kv.weights and merged.metadata.adapter == "kv" and merged.tokens.keys() == {"rex"}


@pytest.mark.parametrize("adapter", [{"kind": "kv"}, {"kind": "lora"}, {"kind": "lora", "dora": True}])
def test_a_weight_multiplies_the_change(tiny_base: Base, config: ConceptConfig, adapter: dict[str, object]) -> None:
    concept = learned(tiny_base, config, "sks", **adapter)
    weaker = weighted(tiny_base, concept, -0.4)
    whole, part = (parameter_changes(tiny_base.unet, each) for each in (concept, weaker))
    assert whole.keys() == part.keys() and weaker.tokens is concept.tokens
    for name, change in whole.items():
        torch.testing.assert_close(part[name].float(), -0.4 * change.float(), rtol=2e-3, atol=1e-5)
    assert weighted(tiny_base, concept, 1.0) is concept
    with pytest.raises(UserError, match="token alone"):
        weighted(tiny_base, learned(tiny_base, config, "sks", kind="token"), 0.5)


def test_a_merged_concept_claims_no_training_of_its_own(tiny_base: Base, config: ConceptConfig) -> None:
    one, other = learned(tiny_base, config, "sks"), learned(tiny_base, config, "rex")
    one = dataclasses.replace(one, metadata=dataclasses.replace(one.metadata, seed=7, base_hash="0" * 16))
    found = merge_concepts(tiny_base, [one, other]).metadata
    assert (found.steps, found.lr, found.token_lr, found.seed, found.loss_weights, found.initialiser) == (
        0,
        0,
        0,
        0,
        {},
        "",
    )
    assert (found.base_hash, found.base_name) == (tiny_base.hash, tiny_base.path.name)
    assert found.class_words == {"sks": "dog", "rex": "dog"}
