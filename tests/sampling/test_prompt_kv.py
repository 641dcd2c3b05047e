"""Compiled prompts against the UNet that reads text itself, with the concept's weights in place."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from cdvideo.base.loader import Base
from cdvideo.base.text import encode_text, tokenize
from cdvideo.concept.concept import Concept
from cdvideo.concept.kv import kv_projections
from cdvideo.motion.modules import MotionModules
from cdvideo.motion.video_unet import VideoUNet
from cdvideo.sampling.prompt_kv import PromptKV, compile_prompts, cross_attentions, reading

PROMPTS = ["", "a photo of the sks dog surfing", "a cat in snow"]


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def text_with_concept(base: Base, concept: Concept) -> torch.Tensor:
    batch = tokenize(base.tokenizer, PROMPTS, tokens={"sks": 2})
    return encode_text(base.text_encoder, batch, rows=concept.tokens).hidden_BLD


def merge_in_place(unet: UNet2DConditionModel, concept: Concept) -> None:
    for name, linear in kv_projections(unet).items():
        linear.weight += concept.weights[name]


@torch.no_grad()
def test_pictures_equal_a_unet_with_the_concept_in_its_weights(tiny_base: Base, tiny_concept: Concept) -> None:
    unet, latents_BCHW = tiny_base.unet, latents(3, 4, 8, 8)
    text_BLD = text_with_concept(tiny_base, tiny_concept)
    plain = unet(latents_BCHW, 500, text_BLD).sample
    with reading(unet, compile_prompts(tiny_base, PROMPTS, concept=tiny_concept)):
        compiled = unet(latents_BCHW, 500, None).sample

    merge_in_place(unet, tiny_concept)
    merged = unet(latents_BCHW, 500, text_BLD).sample
    print(f"max abs difference {(compiled - merged).abs().max():.2e}, effect {(merged - plain).abs().max():.2e}")
    assert (merged - plain).abs().max() > 1e-2, "the concept must matter for this to compare anything"
    assert (compiled - merged).abs().max() <= 1e-5


@torch.no_grad()
def test_films_equal_a_unet_with_the_concept_in_its_weights(
    tiny_base: Base, tiny_motion: MotionModules, tiny_concept: Concept
) -> None:
    """All frames of a film read one copy of K and V; that is exact."""
    video_unet, latents_BFCHW = VideoUNet(tiny_base.unet, tiny_motion), latents(3, 5, 4, 8, 8)
    text_BLD = text_with_concept(tiny_base, tiny_concept)
    with reading(tiny_base.unet, compile_prompts(tiny_base, PROMPTS, concept=tiny_concept)):
        compiled = video_unet(latents_BFCHW, 500, None)

    merge_in_place(tiny_base.unet, tiny_concept)
    merged = video_unet(latents_BFCHW, 500, text_BLD)
    print(f"max abs difference {(compiled - merged).abs().max():.2e}")
    assert (compiled - merged).abs().max() <= 1e-5


@torch.no_grad()
def test_without_a_concept_it_is_the_plain_unet(tiny_base: Base) -> None:
    latents_BCHW = latents(3, 4, 8, 8)
    text_BLD = encode_text(tiny_base.text_encoder, tokenize(tiny_base.tokenizer, PROMPTS)).hidden_BLD
    plain = tiny_base.unet(latents_BCHW, 500, text_BLD).sample
    with reading(tiny_base.unet, compile_prompts(tiny_base, PROMPTS)):
        compiled = tiny_base.unet(latents_BCHW, 500, None).sample
    assert (compiled - plain).abs().max() <= 1e-6


def test_the_base_is_untouched(tiny_base: Base, tiny_concept: Concept) -> None:
    unet = tiny_base.unet
    weights = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    hooks = {name: len(linear._forward_hooks) for name, linear in kv_projections(unet).items()}
    processors = dict(unet.attn_processors)

    with reading(unet, compile_prompts(tiny_base, PROMPTS, concept=tiny_concept)):
        changed = {name for name, processor in unet.attn_processors.items() if processor is not processors[name]}
        assert changed == {name for name in processors if ".attn2." in name}

    after = unet.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
    assert all(unet.attn_processors[name] is processor for name, processor in processors.items())
    assert {name: len(linear._forward_hooks) for name, linear in kv_projections(unet).items()} == hooks


def test_the_former_processors_are_back_after_a_failure(tiny_base: Base) -> None:
    processors = dict(tiny_base.unet.attn_processors)
    compiled = compile_prompts(tiny_base, PROMPTS)
    with pytest.raises(KeyboardInterrupt), reading(tiny_base.unet, compiled):
        raise KeyboardInterrupt
    assert all(tiny_base.unet.attn_processors[name] is processor for name, processor in processors.items())


def test_refuses_a_prompt_of_another_unet(tiny_base: Base) -> None:
    compiled = compile_prompts(tiny_base, PROMPTS)
    shorter = PromptKV(dict(list(compiled.layers.items())[1:]))
    with pytest.raises(AssertionError, match="another UNet"), reading(tiny_base.unet, shorter):
        pass


def test_shapes(tiny_base: Base) -> None:
    compiled = compile_prompts(tiny_base, PROMPTS)
    attentions = cross_attentions(tiny_base.unet)
    assert compiled.layers.keys() == attentions.keys()
    assert len(attentions) == 4  # one down, one middle, two up
    for name, (keys_BNLE, values_BNLE) in compiled.layers.items():
        channels = attentions[name].to_k.out_features
        heads = attentions[name].heads
        assert keys_BNLE.shape == values_BNLE.shape == (3, heads, 24, channels // heads)
