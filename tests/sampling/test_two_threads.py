"""Two threads on one base, and what sampling refuses when it is asked from Python."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from cdvideo.base.loader import Base, Lock
from cdvideo.concept.concept import Concept
from cdvideo.errors import UserError
from cdvideo.motion.modules import MotionModules
from cdvideo.sampling.image import sample_images
from cdvideo.sampling.options import FilmSettings
from cdvideo.sampling.speed import EXACT, PRESETS, Speed
from cdvideo.sampling.video import Film, decode_stream, sample_latents, sample_video


def in_threads(*works: Callable[[], object]) -> None:
    failed: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=[work]) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not failed and not any(thread.is_alive() for thread in threads)


def test_two_films_on_one_base_are_those_made_one_by_one(
    tiny_base: Base, tiny_motion: MotionModules, tiny_concept: Concept
) -> None:
    """The second waits: each has its own prompts, concept and blocks on the one UNet."""

    def film(seed: int) -> np.ndarray:
        concept = tiny_concept if seed % 2 else None
        return sample_video(tiny_base, tiny_motion, "a sks dog", seed=seed, concept=concept, frames=3, steps=4)

    alone = {seed: film(seed) for seed in range(4)}
    together: dict[int, np.ndarray] = {}
    in_threads(*(lambda seed=seed: together.update({seed: film(seed)}) for seed in alone))  # type: ignore[misc]
    for seed, frames in alone.items():
        assert np.array_equal(together[seed], frames)


def test_a_picture_waits_for_a_film(tiny_base: Base, tiny_motion: MotionModules, tiny_concept: Concept) -> None:
    def picture() -> torch.Tensor:
        return sample_images(tiny_base, ["a sks dog"], seeds=[1], concept=tiny_concept, steps=4)

    alone, found = picture(), list[torch.Tensor]()
    in_threads(
        lambda: sample_video(tiny_base, tiny_motion, "a cat", seed=0, frames=3, steps=6),
        lambda: found.append(picture()),
    )
    assert torch.equal(found[0], alone)


def test_a_lock_may_be_taken_twice_by_its_thread_and_left_by_another(tiny_base: Base) -> None:
    stream = decode_stream(tiny_base, torch.randn(3, 4, 8, 8))
    next(stream)  # holds the base, here
    with tiny_base.in_use:
        pass
    in_threads(stream.close)
    in_threads(lambda: sample_images(tiny_base, ["a dog"], seeds=[0], steps=1))


def test_a_copied_base_has_a_lock_of_its_own(tiny_base: Base) -> None:
    assert isinstance(tiny_base.in_use, Lock) and copy.deepcopy(tiny_base).in_use is not tiny_base.in_use


@pytest.mark.parametrize("speed", [PRESETS["balanced"], PRESETS["fast"], Speed(deep_every=2), Speed(guided_until=0.5)])
def test_no_forecast_goes_through_fresh_noise(tiny_base: Base, tiny_motion: MotionModules, speed: Speed) -> None:
    film, settings = Film(prompt="a dog", seed=0), FilmSettings(frames=2, steps=6, scheduler="lcm", speed=speed)
    with pytest.raises(UserError, match="lcm, which adds new noise"):
        next(iter(sample_latents(tiny_base, tiny_motion, [film], settings)))
    exact = FilmSettings(frames=2, steps=2, scheduler="lcm", speed=EXACT)
    (latents,) = sample_latents(tiny_base, tiny_motion, [film], exact)
    assert latents.isfinite().all()
