"""Pictures and films from the tiny base: shapes, ranges, seeds, and what must not matter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cdvideo.base.latents import decode_latents
from cdvideo.base.loader import Base
from cdvideo.concept.concept import Concept
from cdvideo.motion.modules import MotionModules
from cdvideo.sampling.image import sample_images
from cdvideo.sampling.video import decode_frames, sample_video, to_uint8


def film(base: Base, motion: MotionModules, prompt: str = "a dog surfing", **options: Any) -> np.ndarray:
    return sample_video(base, motion, prompt, **{"seed": 1, "frames": 3, "steps": 2, "guidance": 3.0, **options})


def test_pictures(tiny_base: Base) -> None:
    pixels_BCHW = sample_images(tiny_base, ["a dog", "a cat"], seeds=[1, 2], steps=2, guidance=3.0)
    assert pixels_BCHW.shape == (2, 3, 64, 64)
    assert pixels_BCHW.dtype == torch.float32
    assert -1 <= pixels_BCHW.min() < pixels_BCHW.max() <= 1


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++"])
def test_a_picture_does_not_depend_on_its_company(tiny_base: Base, scheduler: Any) -> None:
    options: dict[str, Any] = {"steps": 3, "guidance": 3.0, "scheduler": scheduler}
    both = sample_images(tiny_base, ["a dog", "a cat"], seeds=[1, 2], **options)
    alone = sample_images(tiny_base, ["a cat"], seeds=[2], **options)
    assert (both[1] - alone[0]).abs().max() <= 1e-4


def test_pictures_of_another_size(tiny_base: Base) -> None:
    pixels_BCHW = sample_images(tiny_base, ["a dog"], seeds=[1], steps=1, width=96, height=40)
    assert pixels_BCHW.shape == (1, 3, 40, 96)


def test_film(tiny_base: Base, tiny_motion: MotionModules) -> None:
    frames_FHWC = film(tiny_base, tiny_motion, frames=5)
    assert frames_FHWC.shape == (5, 64, 64, 3)
    assert frames_FHWC.dtype == np.uint8
    assert not np.array_equal(frames_FHWC[0], frames_FHWC[1])


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++"])
def test_same_seed_same_bytes(tiny_base: Base, tiny_motion: MotionModules, scheduler: Any) -> None:
    first = film(tiny_base, tiny_motion, scheduler=scheduler)
    assert np.array_equal(first, film(tiny_base, tiny_motion, scheduler=scheduler))
    assert not np.array_equal(first, film(tiny_base, tiny_motion, scheduler=scheduler, seed=2))


def test_everything_asked_for_matters(tiny_base: Base, tiny_motion: MotionModules, tiny_concept: Concept) -> None:
    prompt = "a photo of the sks dog"
    plain = film(tiny_base, tiny_motion, prompt)
    changes: list[dict[str, Any]] = [
        {"concept": tiny_concept},
        {"negative_prompt": "snow"},
        {"guidance": 6.0},
        {"guidance": 1.0},
        {"steps": 3},
        {"scheduler": "dpm++", "steps": 3},
    ]
    for change in changes:
        assert not np.array_equal(plain, film(tiny_base, tiny_motion, prompt, **change)), change
    assert not np.array_equal(plain, film(tiny_base, tiny_motion, "a cat"))


def test_sampling_leaves_the_base_as_it_was(tiny_base: Base, tiny_motion: MotionModules, tiny_concept: Concept) -> None:
    weights = {name: tensor.clone() for name, tensor in tiny_base.unet.state_dict().items()}
    processors = dict(tiny_base.unet.attn_processors)
    before = film(tiny_base, tiny_motion)
    film(tiny_base, tiny_motion, "a sks dog", concept=tiny_concept)
    assert all(torch.equal(tiny_base.unet.state_dict()[name], tensor) for name, tensor in weights.items())
    assert all(tiny_base.unet.attn_processors[name] is processor for name, processor in processors.items())
    assert np.array_equal(before, film(tiny_base, tiny_motion))


def test_decode_in_chunks_is_decode_at_once(tiny_base: Base) -> None:
    latents_FCHW = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    at_once = to_uint8(decode_latents(tiny_base.vae, latents_FCHW, chunk=6))
    in_chunks = decode_frames(tiny_base, latents_FCHW)
    assert np.abs(at_once.astype(int) - in_chunks).max() <= 1  # another batch, other kernels: a rounding may flip


def test_to_uint8_rounds_to_the_nearest_level() -> None:
    pixels_BCHW = torch.tensor([-1.0, 1.0, 0.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 1.5]).view(1, 6, 1, 1)
    assert to_uint8(pixels_BCHW).flatten().tolist() == [0, 255, 128, 0, 1, 255]


def test_bfloat16(tiny_base: Base, tiny_motion: MotionModules) -> None:
    """The loop stays in float32; only the models compute in less."""
    exact = film(tiny_base, tiny_motion)
    tiny_base.to(torch.device("cpu"), torch.bfloat16)
    rough = film(tiny_base, tiny_motion.to(torch.bfloat16))
    assert 0 < np.abs(exact.astype(int) - rough).mean() < 8
