"""Concepts that were trained apart, in one: for prompts that hold several of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.base.prompts import encode_batch, tokenize_prompts
from cdvideo.concept import lycoris
from cdvideo.concept.adapters import iter_changes
from cdvideo.concept.concept import Concept, public_base_name
from cdvideo.concept.lora import lora_paths
from cdvideo.concept.phrases import SEMANTIC_PHRASES, fill, training_prompts
from cdvideo.errors import UserError

# What prompts are about besides the concepts, whose reading is to stay.
_ORDINARY_WORDS = ("dog", "cat", "bird", "person", "robot", "car", "house", "flower")
# What is true of a concept that was learned at once, as files from elsewhere have it.
_OF_ONE_TRAINING: dict[str, Any] = {
    "initialiser": "",
    "steps": 0,
    "lr": 0.0,
    "token_lr": 0.0,
    "seed": 0,
    "loss_weights": {},
    "sample_prompt": "",
    "preview": "",
}


@torch.no_grad()
def merge_concepts(base: Base, concepts: Sequence[Concept]) -> Concept:
    """One concept with the tokens of all.

    Changes of K and V are merged in closed form (`constrained_merge`), so that each concept's words are read as its own
    training made them and other words as the base does. That needs words: K and V without a token, and adapters that
    tune more, are summed, since no such form is known for them.

    Args:
        base: The base that they fit, with which they are to be used; the concepts' tensors are on its device.

    Raises:
        UserError: When two concepts share a token.
    """
    tokens = [token for concept in concepts for token in concept.tokens]
    twice = sorted({token for token in tokens if tokens.count(token) > 1})
    if twice:
        raise UserError(
            f"several of the concepts are called {', '.join(twice)}",
            allowed="concepts with different tokens",
            do="give one of them another word: scripts/convert.py FILE --to textual-inversion --token WORD",
        )
    kind, weights, settings = _merged_weights(base, concepts)
    metadata = dataclasses.replace(
        concepts[0].metadata,
        class_words={token: word for c in concepts for token, word in c.metadata.class_words.items()},
        base_name=public_base_name(base.name),  # whose reading of the words it is made for
        base_hash=base.hash,
        adapter=kind,
        adapter_settings=settings,
        **_OF_ONE_TRAINING,
    )
    return Concept({token: rows for c in concepts for token, rows in c.tokens.items()}, weights, metadata)


@torch.no_grad()
def weighted(base: Base, concept: Concept, weight: float) -> Concept:
    """The concept with its change of the model's weights multiplied; rows of tokens stay as they are.

    Raises:
        UserError: For a concept that is rows of tokens alone.
    """
    if weight == 1:
        return concept
    metadata = concept.metadata
    if not concept.weights:
        raise UserError(
            f"a weight of {weight:g} for a concept that is a token alone",
            allowed="weights for what changes the model: LoRA, K and V, whole UNets",
            do="leave the weight out",
        )
    if metadata.adapter == "lycoris":
        multiplied = lycoris.multiplied(concept.weights, weight)
        if multiplied is not None:
            return Concept(concept.tokens, multiplied, metadata)
    if metadata.adapter == "lycoris" or metadata.adapter_settings.get("dora"):  # not linear in its factors
        concept = Concept(concept.tokens, _summed(base, [concept]), metadata)
        metadata = dataclasses.replace(metadata, adapter="unet", adapter_settings={})
    weights = {
        name: tensor if name.endswith(".lora_A.weight") else tensor * weight for name, tensor in concept.weights.items()
    }
    return Concept(concept.tokens, weights, metadata)


def constrained_merge(targets_SD: Tensor, values_SO: Tensor, regular_ND: Tensor) -> Tensor:
    """The change of a weight that reads S text features as it is told to, and all others as nearly as before as it can.

    Custom Diffusion (arXiv 2212.04488, eq. 4 and its closed form in appendix A), written for the change:
    argmin |change C_reg'| subject to change C' = V, which is V' (C G^-1 C')^-1 C G^-1 with G = C_reg' C_reg.

    Args:
        targets_SD: Features of the concepts' words (C); S well below D.
        values_SO: What the change is to make of each (V).
        regular_ND: Features of ordinary prompts (C_reg).

    Returns:
        change_OD.
    """
    regular_ND, targets_SD = regular_ND.double(), targets_SD.double()
    gram_DD = regular_ND.T @ regular_ND / len(regular_ND)
    gram_DD += 1e-5 * gram_DD.diagonal().mean() * torch.eye(len(gram_DD), dtype=torch.float64, device=gram_DD.device)
    directions_SD = torch.linalg.solve(gram_DD, targets_SD.T).T
    # Words in alike prompts have alike features: pinv takes them for one where solve would tell their noise apart.
    inverse_SS = torch.linalg.pinv(directions_SD @ targets_SD.T, rtol=1e-4, hermitian=True)
    return (values_SO.double().T @ inverse_SS @ directions_SD).float()


def _merged_weights(
    base: Base, concepts: Sequence[Concept]
) -> tuple[str, dict[str, Tensor], dict[str, str | int | float | bool]]:
    """The kind of the merged adapter, its weights, its settings."""
    tuning = [concept for concept in concepts if concept.weights]
    if all(concept.metadata.adapter == "kv" and concept.tokens for concept in tuning):
        return ("kv" if tuning else "token"), _merged_kv(base, concepts), {}
    if len(tuning) == 1:
        return tuning[0].metadata.adapter, tuning[0].weights, tuning[0].metadata.adapter_settings
    if all(c.metadata.adapter == "lora" and not c.metadata.adapter_settings["dora"] for c in tuning):
        weights = _stacked(tuning)
        rank = max(len(factor) for name, factor in weights.items() if name.endswith("lora_A.weight"))
        return "lora", weights, {"rank": rank, "alpha": 1.0, "dora": False}
    return "unet", _summed(base, tuning), {}


def _merged_kv(base: Base, concepts: Sequence[Concept]) -> dict[str, Tensor]:
    targets = [_concept_features(base, concept) for concept in concepts]
    words = {
        *_ORDINARY_WORDS,
        *(word for concept in concepts for word in concept.metadata.class_words.values() if word),
    }
    regular_ND = _text_features(base, [fill(t, word) for word in sorted(words) for t in SEMANTIC_PHRASES])
    merged = {}
    for name in dict.fromkeys(name for concept in concepts for name in concept.weights):
        size = next(len(concept.weights[name]) for concept in concepts if name in concept.weights)
        values = [
            features_SD @ concept.weights[name].float().T
            if name in concept.weights
            else features_SD.new_zeros(len(features_SD), size)
            for concept, features_SD in zip(concepts, targets, strict=True)
        ]
        merged[name] = constrained_merge(torch.cat(targets), torch.cat(values), regular_ND).half()
    return merged


def _summed(base: Base, concepts: Sequence[Concept]) -> dict[str, Tensor]:
    summed: dict[str, Tensor] = {}
    for concept in concepts:
        for name, change in iter_changes(base, concept):
            summed[name] = summed.get(name, 0) + change.float()
    return {name: change.half() for name, change in summed.items()}


def _stacked(concepts: Sequence[Concept]) -> dict[str, Tensor]:
    """LoRA factors whose product is the sum of all: A upon A, B beside B; for alpha = 1."""
    stacked: dict[str, Tensor] = {}
    for layer in sorted({layer for concept in concepts for layer in lora_paths(concept.weights)}):
        downs, ups = [], []
        for concept in concepts:
            if (down := concept.weights.get(f"{layer}.lora_A.weight")) is not None:
                downs.append(down.float())
                alpha = float(concept.metadata.adapter_settings["alpha"])
                ups.append(concept.weights[f"{layer}.lora_B.weight"].float() * (alpha / len(down)))
        rank = sum(len(down) for down in downs)
        stacked[f"{layer}.lora_A.weight"] = torch.cat(downs)
        stacked[f"{layer}.lora_B.weight"] = torch.cat(ups, dim=1) * rank
    return stacked


def _concept_features(base: Base, concept: Concept) -> Tensor:
    """features_SD of the concept's words in training prompts: from each token to the end of the text.

    In those of both styles, since a concept's file does not say which one it was learned in.
    """
    phrases = [f"{token} {word}" for token, word in concept.metadata.class_words.items()]
    templates = dict.fromkeys((*training_prompts("photo"), *training_prompts("picture")))
    prompts = [fill(template, phrase) for phrase in phrases for template in templates]
    batch = tokenize_prompts(base, prompts, concept.tokens)
    hidden_BLD = encode_batch(base, batch, rows=concept.tokens).hidden_BLD.float()
    starts = {slot.prompt: slot.at for slot in reversed(batch.slots)}
    return torch.cat([hidden_BLD[b, start : batch.eos_B[b] + 1] for b, start in sorted(starts.items())])


def _text_features(base: Base, prompts: Sequence[str]) -> Tensor:
    """features_ND of all positions of prompts, start and end included."""
    batch = tokenize_prompts(base, prompts)
    hidden_BLD = encode_batch(base, batch).hidden_BLD.float()
    return torch.cat([hidden_LD[: end + 1] for hidden_LD, end in zip(hidden_BLD, batch.eos_B, strict=True)])
