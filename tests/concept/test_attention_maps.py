from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from transformers import CLIPTokenizer

from cdvideo.base.loader import Base
from cdvideo.concept.adapters import changed_parameters, make_adapter
from cdvideo.concept.attention_maps import REST, START, attention_maps, word_positions
from cdvideo.concept.concept import Concept
from cdvideo.concept.config import AdapterConfig, ConceptConfig
from cdvideo.concept.trainer import new_concept

PROMPT = "a sks dog wearing headphones"


def concept_of(base: Base, kind: Literal["kv", "token", "unet", "lora"]) -> Concept:
    """A concept of two rows whose tensors are all random, and large enough to matter."""
    config = ConceptConfig(adapter=AdapterConfig(kind=kind, num_rows=2))
    concept = new_concept(base, config, make_adapter(base.unet, config.adapter, seed=0))
    for tensor in (*concept.tokens.values(), *concept.weights.values()):
        tensor.data = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5)) * 0.2
    return concept


def maps_of(base: Base, concept: Concept | None, prompt: str = PROMPT) -> dict[str, dict[int, torch.Tensor]]:
    latents_NCHW = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return attention_maps(base, concept, prompt, latents_NCHW, [200, 700], torch.Generator().manual_seed(4))


def test_every_position_belongs_to_one_word(tiny_tokenizer: CLIPTokenizer) -> None:
    words = word_positions(tiny_tokenizer, "a sks, dog in snow, a photo", {"sks": 3})
    assert [*words] == [START, "a", "sks", "dog", "in", "snow,", "photo", REST]
    assert words[START] == [0]
    assert words["a"] == [1, words["snow,"][-1] + 1]
    assert words["sks"][:3] == [2, 3, 4]
    assert sorted(at for positions in words.values() for at in positions) == list(range(24))


def test_words_stand_where_the_prompt_has_them(tiny_tokenizer: CLIPTokenizer) -> None:
    prompt = "a photo of a zebra, surfing in the rain"
    ids = tiny_tokenizer(prompt, add_special_tokens=False).input_ids
    words = word_positions(tiny_tokenizer, prompt, {})
    for word in ("photo", "zebra,", "surfing", "rain"):
        assert tiny_tokenizer.decode([ids[at - 1] for at in words[word]]).replace(" ", "") == word
    assert words[REST][0] == len(ids) + 1


def test_a_prompt_that_is_cut_leaves_words_without_attention(tiny_tokenizer: CLIPTokenizer) -> None:
    words = word_positions(tiny_tokenizer, " ".join(["dog"] * 22 + ["cat", "robot"]), {})
    assert (words["dog"], words["cat"], words[REST]) == (list(range(1, 23)), [], [23])


def test_shares_of_every_pixel_sum_to_one(tiny_base: Base) -> None:
    maps = maps_of(tiny_base, concept_of(tiny_base, "kv"))
    assert [*maps] == [START, "a", "sks", "dog", "wearing", "headphones", REST]
    for height in (8, 4):
        total_NHW = torch.stack([by_height[height] for by_height in maps.values()]).sum(dim=0)
        assert total_NHW.shape == (3, height, height)
        assert torch.allclose(total_NHW, torch.ones_like(total_NHW), atol=1e-5)


def test_maps_are_softmax_of_query_and_key(tiny_base: Base) -> None:
    """Of one layer, against diffusers' own scores; the UNet's only one at this resolution."""
    layer, caught = tiny_base.unet.mid_block.attentions[0].transformer_blocks[0].attn2, []
    with layer.register_forward_pre_hook(lambda _, args, kwargs: caught.append((*args, kwargs)), with_kwargs=True):
        maps = maps_of(tiny_base, None)
    hidden_BQC, text_BLD = caught[0][0], caught[0][-1]["encoder_hidden_states"]
    query, key = layer.head_to_batch_dim(layer.to_q(hidden_BQC)), layer.head_to_batch_dim(layer.to_k(text_BLD))
    scores_BQL = layer.get_attention_scores(query, key).unflatten(0, (-1, layer.heads)).mean(dim=1)
    dog_at = word_positions(tiny_base.tokenizer, PROMPT, {})["dog"]
    by_hand_NHW = scores_BQL[..., dog_at].sum(-1).view(2, 3, 4, 4).mean(dim=0)
    assert torch.allclose(maps["dog"][4], by_hand_NHW, atol=1e-6)
    assert by_hand_NHW.std() > 1e-5


@pytest.mark.parametrize("kind", ["kv", "token", "unet", "lora"])
def test_every_adapter_acts_while_attention_is_measured(
    tiny_base: Base, kind: Literal["kv", "token", "unet", "lora"]
) -> None:
    concept = concept_of(tiny_base, kind)
    before = copy.deepcopy(tiny_base.unet.state_dict())
    maps = maps_of(tiny_base, concept)

    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_base.unet.state_dict().items())
    folded = copy.deepcopy(tiny_base)
    folded.unet.load_state_dict({**before, **changed_parameters(tiny_base.unet, concept)})
    of_folded = maps_of(folded, Concept(concept.tokens, {}, concept.metadata))
    assert torch.allclose(maps["sks"][8], of_folded["sks"][8], atol=1e-5)
    if kind != "token":
        rows_alone = maps_of(tiny_base, Concept(concept.tokens, {}, concept.metadata))
        assert (maps["sks"][8] - rows_alone["sks"][8]).abs().max() > 1e-4


def test_the_unet_computes_the_same_and_gets_its_processors_back(tiny_base: Base) -> None:
    former = {**tiny_base.unet.attn_processors}
    caught: list[torch.Tensor] = []
    with tiny_base.unet.conv_out.register_forward_hook(lambda _, __, output: caught.append(output)):
        maps_of(tiny_base, None, "a dog")
    assert {**tiny_base.unet.attn_processors} == former
    with pytest.raises(RuntimeError, match="channels"):  # of latents with one channel too many
        attention_maps(tiny_base, None, "a dog", torch.randn(3, 5, 8, 8), [10], torch.Generator())
    assert {**tiny_base.unet.attn_processors} == former

    inputs: list[tuple[torch.Tensor, ...]] = []
    with tiny_base.unet.register_forward_pre_hook(lambda _, args: inputs.append(args)):
        maps_of(tiny_base, None, "a dog")
    with torch.no_grad():
        assert torch.allclose(tiny_base.unet(*inputs[0]).sample, caught[0], atol=1e-5)


def test_maps_are_repeatable(tiny_base: Base) -> None:
    one, two = (maps_of(tiny_base, None) for _ in range(2))
    assert all(torch.equal(maps[height], two[word][height]) for word, maps in one.items() for height in maps)


def test_maps_of_pictures_that_are_not_square(tiny_base: Base) -> None:
    latents_NCHW = torch.randn(1, 4, 8, 16)
    maps = attention_maps(tiny_base, None, "a dog", latents_NCHW, [500], torch.Generator())
    assert [tuple(m.shape) for m in maps["dog"].values()] == [(1, 8, 16), (1, 4, 8)]


def test_scores_beyond_half_precision_are_still_measured(tiny_base: Base) -> None:
    """Queries and keys that fp16 can hold, and their products not."""
    tiny_base.to(torch.device("cpu"), torch.float16)
    with torch.no_grad():
        for name, weight in tiny_base.unet.named_parameters():
            if "attn2.to_q" in name or "attn2.to_k" in name:
                weight *= 1500
    maps = maps_of(tiny_base, None, "a dog wearing headphones")
    for height in (8, 4):
        total_NHW = sum(maps[word][height] for word in maps)
        torch.testing.assert_close(total_NHW, torch.ones_like(total_NHW), rtol=1e-3, atol=1e-3)
