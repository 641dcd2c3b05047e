"""A concept and motion modules for the tiny base, with weights large enough to matter."""

from __future__ import annotations

import pytest
import torch

from cdvideo.base.loader import Base
from cdvideo.concept.concept import Concept, ConceptMetadata
from cdvideo.concept.kv import kv_projections
from cdvideo.motion.modules import MotionModules


@pytest.fixture
def tiny_motion(tiny_base: Base) -> MotionModules:
    motion = MotionModules.for_unet(
        tiny_base.unet, motion_num_attention_heads=2, motion_max_seq_length=8, norm_mode="diffusers"
    )
    generator = torch.Generator().manual_seed(11)
    for parameter in motion.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    return motion.eval().requires_grad_(False)


@pytest.fixture
def tiny_concept(tiny_base: Base) -> Concept:
    """The token `sks` of two rows, and a change of every K and V."""
    generator = torch.Generator().manual_seed(12)
    return Concept(
        tokens={"sks": torch.randn(2, 32, generator=generator)},
        weights={
            name: torch.randn(linear.weight.shape, generator=generator) * 0.3
            for name, linear in kv_projections(tiny_base.unet).items()
        },
        metadata=ConceptMetadata(
            class_words={"sks": "dog"},
            initialiser="dog",
            base_name="tiny",
            base_hash=tiny_base.hash,
            resolution=64,
            prediction_type="v_prediction",
            steps=1,
            lr=1e-4,
            token_lr=1e-3,
            seed=0,
            loss_weights={"semantic": 1.0},
            sample_prompt="a sks dog",
        ),
    )
