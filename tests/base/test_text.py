from __future__ import annotations

import logging

import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from cdvideo.base.text import Slot, encode_text, find_tokens, is_vocabulary_word, tokenize

WIDTH = 32


def rows(count: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_plain_prompts_are_the_tokenizers_own_ids(tiny_tokenizer: CLIPTokenizer) -> None:
    prompts = ["a photo of a dog", "", "Cat in the snow, surfing!"]
    batch = tokenize(tiny_tokenizer, prompts)
    own = tiny_tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(batch.ids_BL, own)
    assert batch.slots == ()
    assert torch.equal(batch.eos_B, (own == tiny_tokenizer.eos_token_id).int().argmax(dim=1))


def test_a_concept_token_takes_its_rows(tiny_tokenizer: CLIPTokenizer) -> None:
    batch = tokenize(tiny_tokenizer, ["a SKS dog", "the dog"], tokens={"sks": 2})
    assert batch.slots == (Slot(0, 2, "sks", 0), Slot(0, 3, "sks", 1))
    assert batch.eos_B.tolist() == [5, 3]
    plain = tokenize(tiny_tokenizer, ["a dog"]).ids_BL[0]
    assert batch.ids_BL[0, 1] == plain[1] and batch.ids_BL[0, 4] == plain[2]


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a sks dog", ["sks"]),
        ("a sksy dog", []),
        ("Sks, sks.", ["sks", "sks"]),
        ("a <new1> dog with sks", ["<new1>", "sks"]),
        ("my_sks", []),
        ("a \u017fks dog", ["sks"]),  # a long s, which lower() leaves as it is
    ],
)
def test_tokens_are_found_as_whole_words(prompt: str, found: list[str]) -> None:
    assert find_tokens(prompt, ["sks", "<new1>"]) == found


def test_the_longer_of_two_tokens_wins(tiny_tokenizer: CLIPTokenizer) -> None:
    batch = tokenize(tiny_tokenizer, ["a sks-2 dog"], tokens={"sks": 1, "sks-2": 1})
    assert [slot.token for slot in batch.slots] == ["sks-2"]


def test_truncation_keeps_start_and_end_and_warns_once(
    tiny_tokenizer: CLIPTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        batch = tokenize(tiny_tokenizer, ["dog " * 21 + "sks"], tokens={"sks": 3})
    length = tiny_tokenizer.model_max_length
    assert batch.ids_BL[0, 0] == tiny_tokenizer.bos_token_id and batch.ids_BL[0, -1] == tiny_tokenizer.eos_token_id
    assert batch.eos_B.tolist() == [length - 1]
    assert batch.slots == (Slot(0, 22, "sks", 0),)  # the two rows that were cut off have no slot
    assert len(caplog.records) == 1 and "\n" not in caplog.records[0].getMessage().strip()


def test_features_without_tokens_are_the_encoders_own(
    tiny_tokenizer: CLIPTokenizer, tiny_text_encoder: CLIPTextModel
) -> None:
    batch = tokenize(tiny_tokenizer, ["a dog", "the cat in the snow"])
    features = encode_text(tiny_text_encoder, batch)
    own = tiny_text_encoder(input_ids=batch.ids_BL)
    assert torch.equal(features.hidden_BLD, own.last_hidden_state)
    assert torch.equal(features.eos_BD, own.pooler_output)


def test_splicing_a_words_own_row_changes_nothing(
    tiny_tokenizer: CLIPTokenizer, tiny_text_encoder: CLIPTextModel
) -> None:
    dog = tiny_tokenizer("dog", add_special_tokens=False).input_ids[0]
    own_KD = tiny_text_encoder.get_input_embeddings().weight[dog][None].detach()
    spliced = encode_text(
        tiny_text_encoder, tokenize(tiny_tokenizer, ["a sks surfing"], tokens={"sks": 1}), rows={"sks": own_KD}
    )
    plain = encode_text(tiny_text_encoder, tokenize(tiny_tokenizer, ["a dog surfing"]))
    assert torch.equal(spliced.hidden_BLD, plain.hidden_BLD)
    assert torch.equal(spliced.eos_BD, plain.eos_BD)


def test_the_pooled_position_is_the_true_end_of_text(
    tiny_tokenizer: CLIPTokenizer, tiny_text_encoder: CLIPTextModel
) -> None:
    tiny_text_encoder.eos_token_id = 2  # the legacy branch of transformers: pools at the highest id
    batch = tokenize(tiny_tokenizer, ["a dog in the snow"])
    batch.ids_BL[0, 2] = tiny_tokenizer.eos_token_id  # as if a concept token had the highest id of all
    features = encode_text(tiny_text_encoder, batch)
    assert torch.equal(features.eos_BD[0], features.hidden_BLD[0, 6])
    own = tiny_text_encoder(input_ids=batch.ids_BL).pooler_output
    assert not torch.equal(own, features.eos_BD)


def test_gradient_flows_into_the_rows_alone(tiny_tokenizer: CLIPTokenizer, tiny_text_encoder: CLIPTextModel) -> None:
    tiny_text_encoder.requires_grad_(False)
    mine, other = rows(2).requires_grad_(), rows(1, seed=1).requires_grad_()
    batch = tokenize(tiny_tokenizer, ["a sks dog", "a dog"], tokens={"sks": 2, "pll": 1})
    encode_text(tiny_text_encoder, batch, rows={"sks": mine, "pll": other}).eos_BD[0].square().sum().backward()
    assert mine.grad is not None and mine.grad.abs().min(dim=1).values.gt(0).all()
    assert other.grad is None
    assert all(p.grad is None for p in tiny_text_encoder.parameters())


def test_no_hook_stays_behind(tiny_tokenizer: CLIPTokenizer, tiny_text_encoder: CLIPTextModel) -> None:
    batch = tokenize(tiny_tokenizer, ["a sks dog"], tokens={"sks": 1})
    with pytest.raises(KeyError):
        encode_text(tiny_text_encoder, batch, rows={"pll": rows(1)})
    assert not tiny_text_encoder.get_input_embeddings()._forward_hooks


def test_vocabulary_words(tiny_tokenizer: CLIPTokenizer) -> None:
    assert is_vocabulary_word(tiny_tokenizer, "dog") and is_vocabulary_word(tiny_tokenizer, " Dog ")
    assert not is_vocabulary_word(tiny_tokenizer, "sks")
    assert not is_vocabulary_word(tiny_tokenizer, "stuffed animal")


def test_a_long_s_takes_the_token_s_rows(tiny_tokenizer: CLIPTokenizer) -> None:
    odd, plain = (tokenize(tiny_tokenizer, [f"a {token} dog"], tokens={"sks": 2}) for token in ("\u017fks", "sks"))
    assert odd.slots == plain.slots and torch.equal(odd.ids_BL, plain.ids_BL)
