"""Prompts as UNets read them: through one encoder as it is, through SDXL's two as diffusers' pipeline has it."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from cdvideo.base.loader import Base
from cdvideo.base.prompts import (
    encode_batch,
    encode_each,
    encode_prompts,
    joined_features,
    picture_sizes,
    split_rows,
    tokenize_prompts,
)
from cdvideo.base.text import encode_text, tokenize
from tests.sdxl import POOLED, WIDTHS, peer_parts

PROMPTS = ["a photo of the dog surfing", "cat in snow"]


def rows(count: int, width: int = sum(WIDTHS)) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(3))


def test_one_encoder_is_read_as_it_is(tiny_base: Base) -> None:
    text = encode_prompts(tiny_base, PROMPTS)
    own = encode_text(tiny_base.text_encoder, tokenize(tiny_base.tokenizer, PROMPTS))
    assert torch.equal(text.hidden_BLD, own.hidden_BLD)
    assert text.pooled_BP is None and text.added(picture_sizes(64, 64)) is None


@torch.no_grad()
def test_two_encoders_are_read_as_in_diffusers(tiny_sdxl: Base) -> None:
    pipeline = StableDiffusionXLPipeline(**peer_parts(tiny_sdxl))
    theirs = pipeline.encode_prompt(PROMPTS, device=torch.device("cpu"), do_classifier_free_guidance=True)
    text = encode_prompts(tiny_sdxl, [*PROMPTS, "", ""])
    assert text.pooled_BP is not None and text.pooled_BP.shape == (4, POOLED)
    torch.testing.assert_close(text.hidden_BLD, torch.cat(theirs[:2]))
    torch.testing.assert_close(text.pooled_BP, torch.cat(theirs[2:]))
    assert not text.hidden_BLD[2:].any() and not text.pooled_BP[2:].any()


@torch.no_grad()
def test_the_empty_prompt_is_encoded_where_the_base_says_so(tiny_sdxl: Base) -> None:
    tiny_sdxl.zero_empty_prompt = False
    pipeline = StableDiffusionXLPipeline(**peer_parts(tiny_sdxl))
    theirs = pipeline.encode_prompt([""], device=torch.device("cpu"), do_classifier_free_guidance=False)
    text = encode_prompts(tiny_sdxl, [""])
    torch.testing.assert_close(text.hidden_BLD, theirs[0])
    torch.testing.assert_close(text.pooled_BP, theirs[2])
    assert text.hidden_BLD.abs().max() > 0.1


@torch.no_grad()
def test_a_concepts_rows_stand_in_both_encoders(tiny_sdxl: Base) -> None:
    """As if both tables held them: the words' own rows, spliced, change nothing."""
    dog = tiny_sdxl.tokenizer("dog", add_special_tokens=False).input_ids
    tables = [encoder.get_input_embeddings().weight[dog] for encoder in tiny_sdxl.text_encoders.values()]
    spliced = encode_prompts(tiny_sdxl, ["a sks surfing"], rows={"sks": torch.cat(tables, dim=1)})
    plain = encode_prompts(tiny_sdxl, ["a dog surfing"])
    assert torch.equal(spliced.hidden_BLD, plain.hidden_BLD)
    assert torch.equal(spliced.pooled_BP, plain.pooled_BP)  # type: ignore[arg-type]


@pytest.mark.parametrize("encoder", [0, 1])
@torch.no_grad()
def test_each_encoder_has_its_own_part_of_the_rows(tiny_sdxl: Base, encoder: int) -> None:
    mine, prompts = rows(2), ["a sks dog"]
    other = mine.clone()
    other[:, slice(0, WIDTHS[0]) if encoder == 0 else slice(WIDTHS[0], None)] += 1
    batch = tokenize_prompts(tiny_sdxl, prompts, {"sks": mine})
    before, after = (encode_each(tiny_sdxl, batch, rows={"sks": r}) for r in (mine, other))
    for index in range(2):
        assert torch.equal(before[index].eos_BD, after[index].eos_BD) is (index != encoder)
    parts = split_rows(tiny_sdxl, {"sks": mine})
    assert torch.equal(torch.cat([part["sks"] for part in parts], dim=1), mine)


def test_the_pooled_text_is_of_the_true_end(tiny_sdxl: Base) -> None:
    """transformers pools at the first end-of-text id; a slot before it must not take its place."""
    assert tiny_sdxl.text_encoder_2 is not None
    batch = tokenize_prompts(tiny_sdxl, ["a dog in the snow"])
    batch.ids_BL[0, 2] = tiny_sdxl.tokenizer.eos_token_id
    own = tiny_sdxl.text_encoder_2(input_ids=batch.ids_BL, output_hidden_states=True)
    pooled = encode_batch(tiny_sdxl, batch).pooled_BP
    padded = encode_each(tiny_sdxl, batch)[1]
    torch.testing.assert_close(pooled, tiny_sdxl.text_encoder_2.text_projection(padded.eos_BD))
    assert (own.text_embeds - pooled).abs().max() > 1e-3


def test_gradient_reaches_the_rows_of_both_encoders_alone(tiny_sdxl: Base) -> None:
    mine = rows(1).requires_grad_()
    text = encode_prompts(tiny_sdxl, ["a sks dog"], rows={"sks": mine})
    assert text.pooled_BP is not None
    (text.hidden_BLD.square().sum() + text.pooled_BP.square().sum()).backward()
    assert mine.grad is not None and all(part.abs().min() > 0 for part in mine.grad.split(WIDTHS, dim=1))
    assert all(p.grad is None for module in tiny_sdxl.modules for p in module.parameters())


def test_a_prompt_that_is_too_long_is_told_once(tiny_sdxl: Base, caplog: pytest.LogCaptureFixture) -> None:
    encode_prompts(tiny_sdxl, ["dog " * 30])
    assert len([record for record in caplog.records if record.name == "cdvideo.base.text"]) == 1


def test_the_cosine_of_joined_features_is_the_mean() -> None:
    one, other = (tuple(torch.randn(4, width) * 3 for width in WIDTHS) for _ in range(2))
    cosines = [torch.cosine_similarity(a, b) for a, b in zip(one, other, strict=True)]
    joined = torch.cosine_similarity(joined_features(one), joined_features(other))
    torch.testing.assert_close(joined, torch.stack(cosines).mean(dim=0))
    assert joined_features(one[:1]) is one[0]
