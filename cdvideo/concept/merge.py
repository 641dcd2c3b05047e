"""Concepts that were trained apart, in one: for prompts that hold several of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.base.text import encode_text, tokenize
from cdvideo.concept.adapters import delta_name, parameter_changes
from cdvideo.concept.file import Concept
from cdvideo.concept.phrases import SEMANTIC_PHRASES, fill, training_prompts
from cdvideo.errors import UserError

# What prompts are about besides the concepts, whose reading is to stay.
_ORDINARY_WORDS = ("dog", "cat", "bird", "person", "robot", "car", "house", "flower")


@torch.no_grad()
def merge_concepts(base: Base, concepts: Sequence[Concept]) -> Concept:
    """One concept with the tokens of all.

    Changes of K and V are merged in closed form (`constrained_merge`), so that each concept's words are read as its own
    training made them and other words as the base does. Of adapters that tune more of the UNet the changes are summed:
    no such form is known for what does not read text.

    Args:
        base: The base that all were trained on; the concepts' tensors are on its device.

    Raises:
        UserError: When two concepts share a token, or were trained on different weights.
    """
    tokens = [token for concept in concepts for token in concept.tokens]
    twice = sorted({token for token in tokens if tokens.count(token) > 1})
    if twice:
        raise UserError(
            f"several of the concepts are called {', '.join(twice)}",
            allowed="concepts with different tokens",
            do="train one of them again with another --token",
        )
    if len({concept.metadata.base_hash for concept in concepts}) > 1:
        raise UserError(
            "the concepts were trained on bases with different weights",
            allowed="concepts of one base",
            do="train them on the same --base",
        )
    reading = all(concept.metadata.adapter in ("kv", "token") for concept in concepts)
    weights = _merged_kv(base, concepts) if reading else _summed(base, concepts)
    metadata = dataclasses.replace(
        concepts[0].metadata,
        class_words={token: word for c in concepts for token, word in c.metadata.class_words.items()},
        adapter=("kv" if weights else "token") if reading else "unet",
        adapter_settings={},
        sample_prompt="",
        preview="",
    )
    return Concept({token: rows for c in concepts for token, rows in c.tokens.items()}, weights, metadata)


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


def _merged_kv(base: Base, concepts: Sequence[Concept]) -> dict[str, Tensor]:
    targets = [_concept_features(base, concept) for concept in concepts]
    words = {*_ORDINARY_WORDS, *(word for concept in concepts for word in concept.metadata.class_words.values())}
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
        for name, change in parameter_changes(base.unet, concept).items():
            summed[delta_name(name)] = summed.get(delta_name(name), 0) + change.float()
    return {name: change.half() for name, change in summed.items()}


def _concept_features(base: Base, concept: Concept) -> Tensor:
    """features_SD of the concept's words in its training prompts: from each token to the end of the text."""
    phrases = [f"{token} {word}" for token, word in concept.metadata.class_words.items()]
    prompts = [fill(template, phrase) for phrase in phrases for template in training_prompts("photo")]
    batch = tokenize(base.tokenizer, prompts, tokens={token: len(rows) for token, rows in concept.tokens.items()})
    hidden_BLD = encode_text(base.text_encoder, batch, rows=concept.tokens).hidden_BLD.float()
    starts = {slot.prompt: slot.at for slot in reversed(batch.slots)}
    return torch.cat([hidden_BLD[b, start : batch.eos_B[b] + 1] for b, start in sorted(starts.items())])


def _text_features(base: Base, prompts: Sequence[str]) -> Tensor:
    """features_ND of all positions of prompts, start and end included."""
    batch = tokenize(base.tokenizer, prompts)
    hidden_BLD = encode_text(base.text_encoder, batch).hidden_BLD.float()
    return torch.cat([hidden_LD[: end + 1] for hidden_LD, end in zip(hidden_BLD, batch.eos_B, strict=True)])
