from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.base.text import encode_text, tokenize
from cdvideo.concept.config import ConceptConfig, SemanticConfig, SubjectConfig
from cdvideo.concept.kv import initial_rows
from cdvideo.concept.losses import semantic_preservation_loss, semantic_relation_loss
from cdvideo.concept.phrases import fill
from cdvideo.concept.semantic import SemanticPreservation, phrase_features

PHRASES = ["a dog", "a photo of the dog in snow wearing headphones"]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_features_are_read_at_the_true_end_of_text(tiny_base: Base) -> None:
    """Also when a concept's token has the highest id, which is where transformers' legacy pooling would look."""
    full = tokenize(tiny_base.tokenizer, PHRASES)
    hidden_BLD = encode_text(tiny_base.text_encoder, full).hidden_BLD
    expected = torch.stack([hidden_BLD[0, 3], hidden_BLD[1, 10]])
    torch.testing.assert_close(phrase_features(tiny_base, PHRASES), expected)

    tiny_base.text_encoder.config.eos_token_id = tiny_base.text_encoder.eos_token_id = 2  # as SD 1.5 has it
    torch.testing.assert_close(phrase_features(tiny_base, PHRASES), expected)
    rows = {"zzz": tiny_base.text_encoder.get_input_embeddings().weight[-1:].clone()}  # the highest id's own row
    hidden_BLD = encode_text(
        tiny_base.text_encoder, tokenize(tiny_base.tokenizer, ["a zzz dog"], tokens={"zzz": 1}), rows=rows
    ).hidden_BLD
    torch.testing.assert_close(phrase_features(tiny_base, ["a zzz dog"], rows), hidden_BLD[:, 4])
    assert not torch.allclose(hidden_BLD[:, 4], hidden_BLD[:, 2])


def test_the_loss_is_zero_when_the_token_reads_as_nothing_new(tiny_base: Base, config: ConceptConfig) -> None:
    loss = SemanticPreservation(tiny_base, config)
    word_of_class = tiny_base.text_encoder.get_input_embeddings().weight[
        tiny_base.tokenizer("dog", add_special_tokens=False).input_ids
    ]
    # "sks dog" against the class "dog dog", with sks reading as dog: equal phrases.
    doubled = SemanticPreservation(tiny_base, dataclasses.replace(config, class_word="dog dog"))
    same = SemanticPreservation(tiny_base, dataclasses.replace(config, class_word="dog"))
    same.class_features = doubled.class_features
    assert same({"sks": word_of_class}, generator()).item() == pytest.approx(0, abs=1e-6)
    assert loss({"sks": word_of_class}, generator()).item() > 1e-4


def test_gradient_reaches_the_rows_alone(tiny_base: Base, config: ConceptConfig) -> None:
    rows_KD = initial_rows(tiny_base, "dog", 2)
    SemanticPreservation(tiny_base, config)({"sks": rows_KD}, generator()).backward()
    assert rows_KD.grad is not None and all(row.norm() > 0 for row in rows_KD.grad)
    assert all(parameter.grad is None for parameter in tiny_base.text_encoder.parameters())


def test_descending_the_loss_brings_the_concept_back_to_its_class(tiny_base: Base, config: ConceptConfig) -> None:
    loss = SemanticPreservation(tiny_base, dataclasses.replace(config, semantic=SemanticConfig(phrases=100)))
    rows_KD = torch.randn(1, 32, requires_grad=True)
    before = loss({"sks": rows_KD}, generator())
    optimizer = torch.optim.Adam([rows_KD], lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        loss({"sks": rows_KD}, generator()).backward()
        optimizer.step()
    assert loss({"sks": rows_KD}, generator()) < 0.7 * before


def test_drawn_phrases_average_to_the_loss_over_all(tiny_base: Base, config: ConceptConfig) -> None:
    rows_KD = torch.randn(1, 32)
    drawn = SemanticPreservation(tiny_base, config)
    whole = SemanticPreservation(tiny_base, dataclasses.replace(config, semantic=SemanticConfig(phrases=100)))
    draws, one = torch.stack([drawn({"sks": rows_KD}, one) for one in [generator()] for _ in range(60)]), generator()
    assert draws.std() > 0
    assert draws.mean().item() == pytest.approx(whole({"sks": rows_KD}, one).item(), rel=0.1)


def test_the_released_variant_pools_at_the_token_without_its_position(tiny_base: Base, config: ConceptConfig) -> None:
    released = dataclasses.replace(config, semantic=SemanticConfig(variant="released"))
    rows_KD = torch.randn(1, 32)
    loss = SemanticPreservation(tiny_base, released)
    assert len(loss.templates) == 1

    # By hand: the sum of token and position embedding, overwritten by the row, through the encoder's own layers.
    encoder, batch = (
        tiny_base.text_encoder,
        tokenize(tiny_base.tokenizer, ["a picture of a sks dog"], tokens={"sks": 1}),
    )
    at = batch.slots[0].at
    hook = next(m for n, m in encoder.named_modules() if n.endswith("embeddings")).register_forward_hook(
        lambda _module, _inputs, output: output.index_put((torch.tensor([0]), torch.tensor([at])), rows_KD)
    )
    hidden_BLD = encoder(input_ids=batch.ids_BL).last_hidden_state
    hook.remove()
    class_TD = phrase_features(tiny_base, ["a picture of a dog"])
    expected = 1 - F.cosine_similarity(hidden_BLD[:, at], class_TD)
    torch.testing.assert_close(loss({"sks": rows_KD}, generator()), expected[0])


def test_forms_and_margins_choose_the_loss(tiny_base: Base, config: ConceptConfig) -> None:
    rows = {"sks": torch.randn(1, 32)}

    def preservation(**settings: Any) -> SemanticPreservation:
        semantic = dataclasses.replace(config.semantic, **settings)
        return SemanticPreservation(tiny_base, dataclasses.replace(config, semantic=semantic))

    def loss(**settings: Any) -> float:
        return preservation(**settings)(rows, generator()).item()

    def draw(**settings: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The concept's features of the phrases drawn, the class's of all, and which were drawn."""
        form = preservation(**settings)
        drawn = torch.randperm(len(form.templates), generator=generator())[:4]
        features_TD = phrase_features(tiny_base, [fill(form.templates[t], "sks dog") for t in drawn], rows)
        return features_TD, form.class_features["sks"], drawn

    concept_TD, features_UD, drawn = draw()
    assert loss() == pytest.approx(semantic_preservation_loss(concept_TD, features_UD[drawn]).item())
    assert loss(margin=0.05) == pytest.approx(
        semantic_preservation_loss(concept_TD, features_UD[drawn], margin=0.05).item()
    )
    relation = dataclasses.replace(config, semantic=dataclasses.replace(config.semantic, form="relation"))
    of_relation = SemanticPreservation(tiny_base, relation)
    features_UD, templates = of_relation.class_features["sks"], of_relation.templates
    drawn = torch.randperm(len(features_UD), generator=generator())[:4]
    concept_TD = phrase_features(tiny_base, [fill(templates[t], "sks dog") for t in drawn], rows)
    assert loss(form="relation") == pytest.approx(semantic_relation_loss(concept_TD, features_UD, drawn).item())
    assert len({loss(), loss(margin=0.05), loss(form="relation"), loss(form="relation", margin=0.01)}) == 4


@pytest.mark.parametrize("variant", ["true_eos", "released"])
def test_several_subjects_share_the_loss(tiny_base: Base, config: ConceptConfig, variant: Any) -> None:
    """It is the mean of their own."""
    rows = {"sks": torch.randn(1, 32), "tom": torch.randn(2, 32)}
    semantic = SemanticConfig(phrases=3, variant=variant)
    other = SubjectConfig(images=Path("photos"), token="tom", class_word="cat")
    dog = dataclasses.replace(config, semantic=semantic)
    cat = dataclasses.replace(dog, token="tom", class_word="cat")
    both = dataclasses.replace(dog, others=(other,))
    dog_loss, cat_loss, loss = (SemanticPreservation(tiny_base, c)(rows, generator()) for c in (dog, cat, both))
    torch.testing.assert_close(loss, (dog_loss + cat_loss) / 2)
    assert not torch.allclose(dog_loss, cat_loss)


@pytest.mark.parametrize("style", ["photo", "picture"])
def test_a_phrase_has_no_relation_to_itself(tiny_base: Base, config: ConceptConfig, style: Any) -> None:
    """Training prompts and semantic phrases share some; a concept that is its class only there stays free there."""
    data = dataclasses.replace(config.data, style=style)
    relation = dataclasses.replace(config, data=data, semantic=SemanticConfig(form="relation", phrases=99))
    loss = SemanticPreservation(tiny_base, relation)
    assert len(set(loss.templates)) == len(loss.templates) == len(loss.class_features["sks"])
    rows = {"sks": initial_rows(tiny_base, "cat", 1)}
    phrases = [[fill(template, word) for template in loss.templates] for word in ("sks dog", "dog")]
    concept_TD = F.normalize(phrase_features(tiny_base, phrases[0], rows))
    class_TD = F.normalize(phrase_features(tiny_base, phrases[1]))
    change_TT = (concept_TD @ class_TD.T - class_TD @ class_TD.T).abs()
    count = len(class_TD)
    expected = (change_TT.sum() - change_TT.diagonal().sum()) / (count * (count - 1))
    torch.testing.assert_close(loss(rows, generator()), expected)
    point = dataclasses.replace(relation, semantic=SemanticConfig(phrases=99))
    drawn = SemanticPreservation(tiny_base, point).templates
    assert set(drawn) == set(loss.templates) and len(drawn) > len(loss.templates)  # both lists ask
