"""No copy of the base is ever made: while it is loaded, taught and filmed with, each weight is there once."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from cdvideo.base.loader import Base
from cdvideo.concept.concept import Concept
from cdvideo.concept.config import AdapterConfig, ConceptConfig, DataConfig, OptimConfig, SampleConfig
from cdvideo.concept.trainer import train_concept
from cdvideo.media.images import Picture
from cdvideo.motion.modules import MotionModules
from cdvideo.runs import create_run
from cdvideo.sampling.image import sample_images
from cdvideo.sampling.video import sample_video

LARGE = 2000  # numbers in a weight that is looked for; smaller ones, such as norms', are alike by chance


def copies(base: Base) -> dict[str, int]:
    """In how many places of memory each large weight of the base lies, in whatever tensor and precision."""
    weights = {
        f"{part}.{name}".replace(".base_layer", ""): weight.detach()  # within peft's layers
        for part in ("unet", "vae", "text_encoder")
        for name, weight in getattr(base, part).named_parameters()
        if weight.numel() >= LARGE and "lora_" not in name
    }
    with torch.no_grad():
        kinds = (tensor for tensor in gc.get_objects() if issubclass(type(tensor), Tensor))
        found = [tensor.detach() for tensor in kinds if not issubclass(type(tensor), FakeTensor)]  # which hold nothing
        return {
            name: len(
                {
                    tensor.untyped_storage().data_ptr()
                    for tensor in found
                    if tensor.shape == weight.shape
                    and tensor.is_floating_point()
                    and torch.allclose(tensor.float(), weight.float(), rtol=1e-2, atol=1e-4)
                }
            )
            for name, weight in weights.items()
        }


def no_more_than(before: dict[str, int], base: Base) -> bool:
    found = copies(base)
    assert len(found) > 30
    more = {name: count for name, count in found.items() if count > before[name]}
    assert not more
    return True


@pytest.fixture
def watched(tiny_base: Base) -> Iterator[tuple[Base, list[bool]]]:
    """The base, and what was found each time its UNet began to work; bases that other tests left are not counted."""
    gc.collect()
    before = copies(tiny_base)
    found: list[bool] = []
    hook = tiny_base.unet.conv_in.register_forward_pre_hook(lambda *_: found.append(no_more_than(before, tiny_base)))
    yield tiny_base, found
    hook.remove()


def test_a_copy_is_seen(tiny_base: Base) -> None:
    gc.collect()
    before = copies(tiny_base)
    kept = [weight.detach().half() for weight in tiny_base.unet.parameters()]
    found = copies(tiny_base)
    assert kept and all(count == before[name] + name.startswith("unet.") for name, count in found.items())


@pytest.mark.parametrize("kind", ["kv", "lora", "token"])
def test_while_a_concept_is_taught(watched: tuple[Base, list[bool]], tmp_path: Path, kind: Any) -> None:
    base, found = watched
    config = ConceptConfig(
        steps=2,
        data=DataConfig(variants=1),
        adapter=AdapterConfig(kind=kind),
        optim=OptimConfig(batch_size=1),
        sample=SampleConfig(prompts=("a {}",), steps=1),
    )
    drawer = drawing(base)
    with create_run(tmp_path, "run") as run:
        pictures = [Picture(name="0.png", image=Image.new("RGB", (64, 64), "red"))]
        train_concept(base, pictures, config, run, sample=drawer, quiet=True)
    assert len(found) >= 4


def drawing(base: Base) -> Callable[[Concept, Sequence[str]], Tensor]:
    def draw(concept: Concept, prompts: Sequence[str]) -> Tensor:
        # What a LoRA changes stands beside the base's own weights for as long as it is drawn with.
        used = None if concept.metadata.adapter == "lora" else concept
        return sample_images(base, prompts, seeds=[0] * len(prompts), concept=used, steps=1)

    return draw


def test_while_a_film_is_made(
    watched: tuple[Base, list[bool]], tiny_motion: MotionModules, tiny_concept: Concept
) -> None:
    base, found = watched
    before = {id(parameter) for parameter in base.unet.parameters()}
    sample_video(base, tiny_motion, "a sks dog", seed=0, frames=2, steps=2, concept=tiny_concept)
    assert len(found) == 2
    assert {id(parameter) for parameter in base.unet.parameters()} == before
