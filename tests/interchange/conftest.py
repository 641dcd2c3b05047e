"""Our sampler and diffusers' pipelines on the same weights and the same noise, down to the latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from cdvideo.base.loader import Base, load_base
from cdvideo.concept.concept import Concept
from cdvideo.sampling.image import sample_images
from tests.interchange.parts import NEGATIVE, PROMPT, peer_parts


@pytest.fixture
def draw(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """Latents of our sampler for a concept: latents_BCHW."""
    monkeypatch.setattr("cdvideo.sampling.image.decode_latents", lambda _vae, latents_BCHW, **_: latents_BCHW)

    def draw(concept: Concept | None, prompt: str = PROMPT) -> Tensor:
        return sample_images(
            tiny_base, [prompt], seeds=[5], concept=concept, negative_prompt=NEGATIVE, guidance=4.0, steps=3
        )

    return draw


@pytest.fixture
def pipeline(tiny_base_folder: Path) -> StableDiffusionPipeline:
    """diffusers' own, of the same weights, which may be changed."""
    return StableDiffusionPipeline(**peer_parts(load_base(str(tiny_base_folder), device=torch.device("cpu"))))
