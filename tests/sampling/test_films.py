"""Films of any length, in loops, of several concepts at once, from other films; and the plain film, as ever."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cdvideo.base.latents import decode_latents
from cdvideo.base.loader import Base
from cdvideo.base.schedule import make_scheduler
from cdvideo.concept.concept import Concept
from cdvideo.errors import UserError
from cdvideo.motion.modules import MotionModules
from cdvideo.motion.video_unet import VideoUNet
from cdvideo.sampling.denoise import draw_noise
from cdvideo.sampling.image import sample_images
from cdvideo.sampling.options import Control, FilmSettings, Noise, Windows
from cdvideo.sampling.prompt_kv import compile_prompts, reading
from cdvideo.sampling.start import encode_frames, start_from_picture, start_from_video
from cdvideo.sampling.video import Film, decode_frames, sample_latents, sample_video, sample_videos
from cdvideo.sampling.windows import looped_windows, windowed

pytestmark = pytest.mark.usefixtures("two_threads")

QUICK = FilmSettings(frames=3, steps=2, guidance=3.0)


def film(base: Base, motion: MotionModules, prompt: Any = "a dog surfing", **options: Any) -> np.ndarray:
    return sample_video(base, motion, prompt, **{"seed": 1, "frames": 3, "steps": 2, "guidance": 3.0, **options})


def latents_of(base: Base, motion: MotionModules, prompt: Any = "a dog surfing", **options: Any) -> Tensor:
    """latents_FCHW of a film with seed 1: what decoding can not hide. Options of the film, or of its settings."""
    settings = {name: options.pop(name) for name in [*options] if name in FilmSettings.__slots__}
    films = [Film(prompt=prompt, **{"seed": 1, **options})]
    return next(iter(sample_latents(base, motion, films, dataclasses.replace(QUICK, **settings))))


def distance(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


@torch.inference_mode()
def plain_film(base: Base, motion: MotionModules, prompt: str, concept: Concept | None, scheduler: Any) -> np.ndarray:
    """The whole of sampling in its shortest form: no window, no batch, no option."""
    steps = make_scheduler(base.scheduler_config, scheduler)
    steps.set_timesteps(3)
    latents_BFCHW = draw_noise([1], (5, 4, 8, 8)) * steps.init_noise_sigma
    with reading(base.unet, compile_prompts(base, ["snow", prompt], concept=concept)):
        for timestep in steps.timesteps:
            doubled = torch.cat([steps.scale_model_input(latents_BFCHW, timestep)] * 2)
            negative, positive = VideoUNet(base.unet, motion)(doubled, timestep, None).chunk(2)
            latents_BFCHW = steps.step(negative + 3.0 * (positive - negative), timestep, latents_BFCHW).prev_sample
    return decode_frames(base, latents_BFCHW[0])


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++"])
def test_without_options_a_film_is_the_plain_loop_to_the_byte(
    tiny_base: Base, tiny_motion: MotionModules, tiny_concept: Concept, scheduler: Any
) -> None:
    options: dict[str, Any] = {"negative_prompt": "snow", "frames": 5, "steps": 3, "scheduler": scheduler}
    ours = film(tiny_base, tiny_motion, "a sks dog", concept=tiny_concept, **options)
    assert np.array_equal(ours, plain_film(tiny_base, tiny_motion, "a sks dog", tiny_concept, scheduler))


# --- length


def test_a_film_longer_than_the_motion_modules_reach(tiny_base: Base, tiny_motion: MotionModules) -> None:
    frames_FHWC = film(tiny_base, tiny_motion, frames=21)  # they reach 8
    assert frames_FHWC.shape == (21, 64, 64, 3)
    assert all(not np.array_equal(one, other) for one, other in zip(frames_FHWC, frames_FHWC[1:], strict=False))


def test_no_more_than_a_window_reaches_the_unet(
    tiny_base: Base, tiny_motion: MotionModules, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    walk = VideoUNet.__call__

    def watched(self: VideoUNet, latents_BFCHW: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append(tuple(latents_BFCHW.shape))
        return walk(self, latents_BFCHW, *rest, **options)

    monkeypatch.setattr(VideoUNet, "__call__", watched)
    film(tiny_base, tiny_motion, frames=21, windows=Windows(size=6, overlap=2))
    assert {*seen} == {(1, 6, 4, 8, 8)}  # both halves of guidance begin as one
    assert len(seen) == 5 + 6  # by hand: starts 0 4 8 12 15; moved back by 2: 0 2 6 10 14 15


def test_windows_without_an_overlap_are_films_of_their_own(tiny_base: Base, tiny_motion: MotionModules) -> None:
    windows = Windows(size=4, overlap=0, schedule="static")
    (long_FCHW,) = sample_latents(
        tiny_base, tiny_motion, [Film(prompt="a dog", seed=1)], dataclasses.replace(QUICK, frames=8, windows=windows)
    )
    short = dataclasses.replace(QUICK, frames=4)
    (first_FCHW,) = sample_latents(tiny_base, tiny_motion, [Film(prompt="a dog", seed=1)], short)
    torch.testing.assert_close(long_FCHW[:4], first_FCHW, rtol=1e-5, atol=1e-5)
    assert (long_FCHW[4:] - first_FCHW).abs().max() > 0.1


def test_every_option_of_length_matters(tiny_base: Base, tiny_motion: MotionModules) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"windows": Windows(schedule="static")},
        {"windows": Windows(schedule="looped")},
        {"windows": Windows(blend="flat")},
        {"windows": Windows(overlap=2)},
        {"windows": Windows(size=6)},
        {"noise": Noise(kind="freenoise")},
    ]
    films = [film(tiny_base, tiny_motion, frames=14, **each) for each in options]
    for index, one in enumerate(films):
        assert not any(np.array_equal(one, other) for other in films[:index]), options[index]


@pytest.mark.parametrize("frames", [6, 12])
@torch.inference_mode()
def test_a_loop_has_no_first_frame(tiny_base: Base, tiny_motion: MotionModules, frames: int) -> None:
    """A film that is turned round, under windows that are turned as far, is told the same as it was."""
    unet, turned = VideoUNet(tiny_base.unet, tiny_motion), frames // 2
    latents_BFCHW, weights_F = draw_noise([1], (frames, 4, 8, 8)), torch.tensor([1.0, 2, 3, 3, 2, 1])

    def predicted(latents_BFCHW: Tensor, turn: float) -> Tensor:
        windows = looped_windows(frames, 6, 4, turn=turn)
        predict = windowed(
            lambda _window: lambda latents, t, _step: unet(latents, t, None), lambda _: windows, weights_F
        )
        return predict(latents_BFCHW, torch.tensor(500), 0)

    with reading(tiny_base.unet, compile_prompts(tiny_base, ["a dog"])):
        straight, round_about = predicted(latents_BFCHW, 0), predicted(latents_BFCHW.roll(turned, dims=1), 0.5)
        unturned = predicted(latents_BFCHW.roll(turned, dims=1), 0)
    torch.testing.assert_close(round_about, straight.roll(turned, dims=1), rtol=1e-4, atol=1e-5)
    if frames == 6:
        assert (unturned - straight.roll(turned, dims=1)).abs().max() > 1e-3, "places within a window matter"


def test_a_looped_film_turns_from_step_to_step(tiny_base: Base, tiny_motion: MotionModules) -> None:
    """The first step has not turned yet; the second has."""
    for steps in (1, 2):
        looped, plain = (
            latents_of(tiny_base, tiny_motion, frames=6, steps=steps, windows=Windows(schedule=schedule))
            for schedule in ("looped", "uniform")
        )
        assert distance(looped, plain) <= 1e-5 if steps == 1 else distance(looped, plain) > 1e-3


def test_windows_too_long_are_told(tiny_base: Base, tiny_motion: MotionModules) -> None:
    with pytest.raises(UserError, match=r"windows of 12 frames[\s\S]*2 to 8"):
        film(tiny_base, tiny_motion, frames=20, windows=Windows(size=12))
    assert {type(p).__name__ for p in tiny_base.unet.attn_processors.values()} == {"AttnProcessor2_0"}


def test_freeinit(tiny_base: Base, tiny_motion: MotionModules) -> None:
    with pytest.raises(UserError, match="ends in pure noise"):
        film(tiny_base, tiny_motion, noise=Noise(freeinit=1))
    base = dataclasses.replace(
        tiny_base, scheduler_config={**tiny_base.scheduler_config, "rescale_betas_zero_snr": False}
    )
    plain, once, twice = (film(base, tiny_motion, noise=Noise(freeinit=turns)) for turns in (0, 1, 2))
    assert not np.array_equal(plain, once) and not np.array_equal(once, twice)


# --- several films at once


def several(concept: Concept) -> list[Film]:
    other = Concept(
        tokens={"sks": concept.tokens["sks"].flip(0)},
        weights={name: -0.5 * delta for name, delta in concept.weights.items()},
        metadata=concept.metadata,
    )
    return [
        Film(prompt="a sks dog surfing", seed=1, concept=concept, negative_prompt="snow"),
        Film(prompt="a sks dog surfing", seed=2, concept=other),
        Film(prompt="a cat", seed=3, control=Control(motion_strength="0: 0.5 | 2: 1.5")),
        Film(prompt={0: "a dog", 2: "a cat"}, seed=4),
        Film(prompt="a sks dog", seed=5, concept=concept, control=Control(concept_strength="0%: 0 | 100%: 1")),
    ]


@pytest.mark.parametrize(
    "settings",
    [QUICK, dataclasses.replace(QUICK, frames=11), dataclasses.replace(QUICK, scheduler="lcm")],
    ids=["at once", "in windows", "lcm"],
)
def test_each_film_of_a_batch_equals_the_one_made_alone(
    tiny_base: Base, tiny_motion: MotionModules, tiny_concept: Concept, settings: FilmSettings
) -> None:
    films = several(tiny_concept)
    alone = [next(iter(sample_latents(tiny_base, tiny_motion, [each], settings))) for each in films]
    for batch in (2, 5):
        together = list(sample_latents(tiny_base, tiny_motion, films, settings, batch=batch))
        worst = max((one - other).abs().max().item() for one, other in zip(together, alone, strict=True))
        print(f"batch {batch}: max abs difference of latents {worst:.2e}")
        assert worst <= 1e-4
    apart = min((one - other).abs().max().item() for i, one in enumerate(alone) for other in alone[:i])
    assert apart > 1e-2, "the films differ, so there is something to compare"


def test_the_number_of_films_changes_no_byte(
    tiny_base: Base, tiny_motion: MotionModules, tiny_concept: Concept
) -> None:
    films = several(tiny_concept)
    together = sample_videos(tiny_base, tiny_motion, films, QUICK)
    for index, each in enumerate(films):
        (alone,) = sample_videos(tiny_base, tiny_motion, [each], QUICK)
        assert np.array_equal(together[index], alone)
    assert np.array_equal(together[0], film(
        tiny_base, tiny_motion, "a sks dog surfing", concept=tiny_concept, negative_prompt="snow"
    ))  # fmt: skip


def test_concepts_of_other_kinds_ride_alone(tiny_base: Base, tiny_motion: MotionModules, tiny_concept: Concept) -> None:
    deltas = {"unet.conv_in.delta": torch.ones_like(tiny_base.unet.conv_in.weight)}
    whole = Concept(tiny_concept.tokens, deltas, dataclasses.replace(tiny_concept.metadata, adapter="unet"))
    films = [Film(prompt="a sks dog", seed=1, concept=whole), Film(prompt="a dog", seed=2)]
    with pytest.raises(UserError, match=r"one of them of kind unet[\s\S]*batch of 1"):
        sample_videos(tiny_base, tiny_motion, films, QUICK, batch=2)
    changed, plain = sample_videos(tiny_base, tiny_motion, films, QUICK)
    assert np.array_equal(plain, film(tiny_base, tiny_motion, "a dog", seed=2))
    assert not np.array_equal(changed, film(tiny_base, tiny_motion, "a sks dog", seed=1))


# --- control


def test_motion_strength(tiny_base: Base, tiny_motion: MotionModules) -> None:
    plain = film(tiny_base, tiny_motion)
    assert np.array_equal(plain, film(tiny_base, tiny_motion, control=Control(motion_strength="0: 1 | 2: 1")))
    more = film(tiny_base, tiny_motion, control=Control(motion_strength="1.5"))
    assert not np.array_equal(plain, more)
    assert all(not module._forward_hooks for module in tiny_motion.modules())


def test_without_motion_a_film_is_the_image_models_pictures(tiny_base: Base, tiny_motion: MotionModules) -> None:
    still = latents_of(tiny_base, tiny_motion, "a dog", control=Control(motion_strength="0"))
    pixels_BCHW = sample_images(tiny_base, ["a dog"], seeds=[1], steps=2, guidance=3.0)
    with torch.inference_mode():
        assert distance(decode_latents(tiny_base.vae, still[:1]), pixels_BCHW) <= 1e-4
    assert distance(still, latents_of(tiny_base, tiny_motion, "a dog")) > 1e-2


def test_motion_strength_over_frames(tiny_base: Base, tiny_motion: MotionModules) -> None:
    """Where it is 0 a frame is the image model's; it is still seen by the others."""
    half = Control(motion_strength="0: 0 | 1: 1")
    mixed, off = (
        next(iter(sample_latents(tiny_base, tiny_motion, [Film(prompt="a dog", seed=1, control=control)], QUICK)))
        for control in (half, Control(motion_strength="0"))
    )
    assert torch.equal(mixed[0], off[0])
    assert (mixed[1:] - off[1:]).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_prompts_that_travel_reach_the_frames(tiny_base: Base, tiny_motion: MotionModules) -> None:
    still = Control(motion_strength="0")  # so that each frame shows what it read, and no more
    travelling = latents_of(tiny_base, tiny_motion, {0: "a dog", 2: "a cat"}, control=still)
    dog, cat = (latents_of(tiny_base, tiny_motion, prompt, control=still) for prompt in ("a dog", "a cat"))
    assert distance(travelling[0], dog[0]) <= 1e-4 and distance(travelling[2], cat[2]) <= 1e-4
    assert min(distance(travelling[1], dog[1]), distance(travelling[1], cat[1])) > 1e-3


def test_prompts_travel_through_windows(tiny_base: Base, tiny_motion: MotionModules) -> None:
    still = Control(motion_strength="0")
    prompts = {0: "a dog", 8: "a cat"}
    travelling, dog, cat = (
        latents_of(tiny_base, tiny_motion, prompt, control=still, frames=13) for prompt in (prompts, "a dog", "a cat")
    )
    assert distance(travelling[0], dog[0]) <= 1e-4
    assert distance(travelling[8:], cat[8:]) <= 1e-4
    away_F = (travelling - dog).abs().amax(dim=(1, 2, 3))[:9]
    assert away_F[1] > 1e-3 and away_F[1] < away_F[4] < away_F[8]


def test_concept_strength(tiny_base: Base, tiny_motion: MotionModules, tiny_concept: Concept) -> None:
    prompt = "a sks dog surfing"
    whole, half, none = (
        latents_of(tiny_base, tiny_motion, prompt, concept=tiny_concept, control=Control(concept_strength=strength))
        for strength in ("1", "0%: 0 | 100%: 1", "0")
    )
    assert torch.equal(whole, latents_of(tiny_base, tiny_motion, prompt, concept=tiny_concept))
    same = latents_of(tiny_base, tiny_motion, "a dog dog dog surfing")  # the token has two rows
    assert distance(none, same) <= 1e-4
    assert min(distance(half, whole), distance(half, none), distance(whole, none)) > 1e-3


# --- films that begin from others


def clip(frames: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (70, 90, 3), dtype=np.uint8) for _ in range(frames)]


def test_frames_are_encoded_in_chunks_and_cut_to_size(tiny_base: Base) -> None:
    latents_FCHW = encode_frames(tiny_base, iter(clip(5)), height=32, width=64)
    assert latents_FCHW.shape == (5, 4, 4, 8)
    alone = encode_frames(tiny_base, clip(5)[3:4], height=32, width=64)
    torch.testing.assert_close(alone, latents_FCHW[3:4], rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="clip of 0 frames"):
        encode_frames(tiny_base, [], height=32, width=64)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++"])
@pytest.mark.parametrize("frames", [3, 11])
def test_video_to_video_keeps_more_at_less_strength(
    tiny_base: Base, tiny_motion: MotionModules, scheduler: Any, frames: int
) -> None:
    def remade(strength: float) -> Tensor:
        start = start_from_video(tiny_base, clip(12), frames=frames, height=64, width=64, strength=strength)
        settings = dataclasses.replace(QUICK, frames=frames, steps=10, scheduler=scheduler)
        (latents_FCHW,) = sample_latents(tiny_base, tiny_motion, [Film(prompt="a dog", seed=1)], settings, start=start)
        return (latents_FCHW - start.latents[0]).square().mean()

    little, some, all_of_it = (remade(strength) for strength in (0.1, 0.5, 1.0))
    assert little < some < all_of_it


def test_full_strength_keeps_nothing_of_a_video(tiny_base: Base, tiny_motion: MotionModules) -> None:
    start = start_from_video(tiny_base, clip(3), frames=3, height=64, width=64, strength=1.0)
    assert np.array_equal(film(tiny_base, tiny_motion, start=start), film(tiny_base, tiny_motion))


def test_a_clip_shorter_than_the_film_is_told(tiny_base: Base) -> None:
    with pytest.raises(UserError, match=r"clip of 5 frames for a film of 6[\s\S]*--frames 5"):
        start_from_video(tiny_base, clip(5), frames=6, height=64, width=64, strength=0.5)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "euler", "lcm"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_picture_becomes_the_first_frame(
    tiny_base: Base, tiny_motion: MotionModules, scheduler: Any, strength: float
) -> None:
    start = start_from_picture(tiny_base, clip(1)[0], frames=4, height=64, width=64, strength=strength, fade=0.5)
    settings = dataclasses.replace(QUICK, frames=4, steps=6, scheduler=scheduler)
    (latents_FCHW,) = sample_latents(tiny_base, tiny_motion, [Film(prompt="a dog", seed=1)], settings, start=start)
    away_F = (latents_FCHW - start.latents[0]).square().mean(dim=(1, 2, 3))
    assert away_F[0] < 1e-10
    assert away_F[0] < away_F[1] < away_F[3], "held less and less"
