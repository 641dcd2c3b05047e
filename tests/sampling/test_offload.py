from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cdvideo.base.folder import HASHED_PARTS
from cdvideo.base.loader import Base, load_base
from cdvideo.base.offload import at_work
from cdvideo.concept.concept import Concept
from cdvideo.motion.modules import MotionModules
from cdvideo.sampling.image import sample_images
from cdvideo.sampling.video import sample_video

CPU = torch.device("cpu")
# Stands in for a GPU: it computes shapes without numbers, and takes no tensor of the CPU beside its own.
ELSEWHERE = torch.device("meta")


def devices(module: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in [*module.parameters(), *module.buffers()]}


def test_a_module_is_elsewhere_for_the_length_of_the_block(tiny_base: Base) -> None:
    before = dict(tiny_base.unet.named_parameters())
    with at_work(ELSEWHERE, tiny_base.unet, tiny_base.text_encoder):
        assert devices(tiny_base.unet) == devices(tiny_base.text_encoder) == {"meta"}
        assert devices(tiny_base.vae) == {"cpu"}
    assert all(dict(tiny_base.unet.named_parameters())[name] is parameter for name, parameter in before.items())
    assert devices(tiny_base.text_encoder) == {"cpu"}


def test_it_is_back_after_an_error_too(tiny_base: Base) -> None:
    with pytest.raises(RuntimeError), at_work(ELSEWHERE, tiny_base.vae):
        raise RuntimeError
    assert devices(tiny_base.vae) == {"cpu"}


def test_where_it_is_already_nothing_is_touched(tiny_base: Base) -> None:
    before = dict(tiny_base.unet.named_parameters())
    with at_work(CPU, tiny_base.unet):
        assert all(dict(tiny_base.unet.named_parameters())[name] is parameter for name, parameter in before.items())


def watch(base: Base, motion: MotionModules, seen: list[tuple[str, set[str]]]) -> None:
    """Notes which modules are elsewhere whenever one begins to work."""
    modules = {"text": base.text_encoder, "unet": base.unet, "vae": base.vae, "motion": motion}

    def note(name: str) -> None:
        seen.append((name, {other for other, module in modules.items() if devices(module) == {"meta"}}))

    base.text_encoder.register_forward_pre_hook(lambda *_: note("text"))
    base.unet.conv_in.register_forward_pre_hook(lambda *_: note("unet"))
    base.vae.decoder.register_forward_pre_hook(lambda *_: note("vae"))


def test_only_what_works_is_on_the_device(tiny_base: Base, tiny_motion: MotionModules, tiny_concept: Concept) -> None:
    seen: list[tuple[str, set[str]]] = []
    watch(tiny_base, tiny_motion, seen)
    base = dataclasses.replace(tiny_base, device=ELSEWHERE)
    concept = dataclasses.replace(
        tiny_concept,
        tokens={name: tensor.to(ELSEWHERE) for name, tensor in tiny_concept.tokens.items()},
        weights={name: tensor.to(ELSEWHERE) for name, tensor in tiny_concept.weights.items()},
    )
    pixels_BCHW = sample_images(base, ["a sks dog"], seeds=[0], concept=concept, steps=2)
    assert pixels_BCHW.shape == (1, 3, 64, 64) and pixels_BCHW.device == ELSEWHERE
    assert seen == [("text", {"text"}), ("unet", {"unet"}), ("unet", {"unet"}), ("vae", {"vae"})]
    seen.clear()
    with pytest.raises(NotImplementedError, match="meta"):  # its frames have no numbers to be written
        sample_video(base, tiny_motion, "a sks dog", seed=0, frames=2, steps=1, concept=concept)
    assert seen == [("text", {"text"}), ("unet", {"unet", "motion"}), ("vae", {"vae"})]


def test_on_the_cpu_nothing_changes(tiny_base_folder: Path, tiny_motion: MotionModules, tiny_concept: Concept) -> None:
    bases = [load_base(str(tiny_base_folder), device=CPU, resting=resting) for resting in ((), HASHED_PARTS)]
    films = [
        sample_video(base, tiny_motion, "a sks dog", seed=0, frames=2, steps=2, concept=tiny_concept) for base in bases
    ]
    assert np.array_equal(*films)


@pytest.mark.gpu
def test_on_cuda_the_film_is_the_same_in_less_memory() -> None:
    from cdvideo.base.loader import TINY_BASE
    from cdvideo.motion.files import load_motion

    device, films, peaks = torch.device("cuda:0"), [], []
    for resting in ((), HASHED_PARTS):
        base = load_base("tiny", device=device, resting=resting)
        motion = load_motion(TINY_BASE / "motion", device=CPU if resting else device)
        torch.cuda.reset_peak_memory_stats()
        films.append(sample_video(base, motion, "a dog surfing", seed=0, frames=8, steps=3))
        peaks.append(torch.cuda.max_memory_allocated())
        if resting:
            assert all(devices(module) == {"cpu"} for module in (base.unet, base.vae, base.text_encoder, motion))
        del base, motion
    assert np.array_equal(*films)
    assert peaks[1] < peaks[0]
