"""Concepts that tune more than K and V: pictures and films against a UNet that has the change in its own weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cdvideo.base.loader import Base
from cdvideo.concept.adapters import changed_parameters, make_adapter
from cdvideo.concept.concept import Concept
from cdvideo.concept.config import AdapterConfig
from cdvideo.motion.modules import MotionModules
from cdvideo.sampling.image import sample_images
from cdvideo.sampling.video import sample_video

ADAPTERS = {
    "unet": AdapterConfig(kind="unet"),
    "lora": AdapterConfig(kind="lora", targets=("to_q", "to_k", "to_v", "to_out.0", "conv2")),
    "dora": AdapterConfig(kind="lora", dora=True),
}


@pytest.fixture(params=ADAPTERS)
def concept(request: pytest.FixtureRequest, tiny_base: Base, tiny_concept: Concept) -> Concept:
    config = ADAPTERS[request.param]
    weights = {
        name: (tensor + 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(4))).detach()
        for name, tensor in make_adapter(tiny_base.unet, config, seed=0).weights.items()
    }
    metadata = dataclasses.replace(tiny_concept.metadata, adapter=config.kind, adapter_settings=config.settings)
    return Concept(tokens=tiny_concept.tokens, weights=weights, metadata=metadata)


@torch.no_grad()
def merge_in_place(base: Base, concept: Concept) -> Concept:
    """Writes the change into the UNet; what is left of the concept is its token."""
    parameters = dict(base.unet.named_parameters())
    for name, tensor in changed_parameters(base.unet, concept).items():
        parameters[name].copy_(tensor)
    return dataclasses.replace(concept, weights={})


def test_pictures(tiny_base: Base, concept: Concept) -> None:
    def draw(concept: Concept | None) -> torch.Tensor:
        return sample_images(tiny_base, ["a sks dog surfing"], seeds=[1], concept=concept, steps=2)

    plain, before = draw(dataclasses.replace(concept, weights={})), dict(tiny_base.unet.named_parameters())
    pixels = draw(concept)
    assert all(before[name] is parameter for name, parameter in tiny_base.unet.named_parameters())
    assert torch.equal(draw(dataclasses.replace(concept, weights={})), plain)
    assert (pixels - plain).abs().max() > 1e-3
    torch.testing.assert_close(pixels, draw(merge_in_place(tiny_base, concept)), rtol=1e-4, atol=1e-4)


def test_films(tiny_base: Base, tiny_motion: MotionModules, concept: Concept) -> None:
    def film(concept: Concept | None) -> torch.Tensor:
        frames = sample_video(tiny_base, tiny_motion, "a sks dog surfing", seed=1, concept=concept, frames=3, steps=2)
        return torch.from_numpy(frames).int()

    plain, tuned = film(dataclasses.replace(concept, weights={})), film(concept)
    merged = film(merge_in_place(tiny_base, concept))
    assert (tuned - merged).abs().max() <= 1 < (tuned - plain).abs().max()
