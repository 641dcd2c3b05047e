"""Films from prompts: the image UNet with motion modules, on compiled prompts, of any length and several at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cdvideo.base.latents import DECODE_CHUNK, decode_latents
from cdvideo.base.loader import Base
from cdvideo.base.offload import at_work
from cdvideo.base.schedule import SamplerName, make_scheduler
from cdvideo.concept.concept import Concept
from cdvideo.motion.modules import MotionModules
from cdvideo.motion.video_unet import DeepFeature, VideoUNet
from cdvideo.sampling.compiled import compiled
from cdvideo.sampling.denoise import Predict, Start, denoise, guided, latent_size
from cdvideo.sampling.folded import folded_concept
from cdvideo.sampling.forecast import forecasting
from cdvideo.sampling.halves import two_halves
from cdvideo.sampling.motion_strength import moving
from cdvideo.sampling.noise import film_noise, reinitialised
from cdvideo.sampling.options import AS_TRAINED, DEFAULTS, Control, FilmSettings, Noise, Windows
from cdvideo.sampling.prepared import TimeTable, prepared
from cdvideo.sampling.prompt_kv import reading
from cdvideo.sampling.prompt_track import compile_film, read_films
from cdvideo.sampling.speed import EXACT, Speed, check_speed
from cdvideo.sampling.windows import Window, blend_weights, window_size, windowed, windows_at
from cdvideo.sampling.winograd import by_tiles

if TYPE_CHECKING:
    from cdvideo.media.spool import Frame


@dataclass(frozen=True, kw_only=True)
class Film:
    """What one film of a batch is of. `prompt`: a text, or texts by the frame from which they are meant."""

    prompt: str | Mapping[int, str]
    seed: int
    concept: Concept | None = None
    negative_prompt: str = ""
    control: Control = AS_TRAINED

    @property
    def prompts(self) -> dict[int, str]:
        return {0: self.prompt} if isinstance(self.prompt, str) else dict(sorted(self.prompt.items()))


def sample_video(
    base: Base,
    motion: MotionModules,
    prompt: str | Mapping[int, str],
    *,
    seed: int,
    concept: Concept | None = None,
    negative_prompt: str = "",
    frames: int = 16,
    steps: int = 25,
    guidance: float = 5.0,
    scheduler: SamplerName = "ddim",
    width: int | None = None,
    height: int | None = None,
    control: Control = AS_TRAINED,
    windows: Windows = DEFAULTS.windows,
    noise: Noise = DEFAULTS.noise,
    start: Start | None = None,
    speed: Speed = EXACT,
    decode_chunk: int = DECODE_CHUNK,
    progress: bool = False,
) -> npt.NDArray[np.uint8]:
    """One film. The same seed gives the same bytes on the same machine.

    Args:
        motion: on the base's device or resting in RAM (base/offload.py), in the base's dtype.
        prompt: a text, or texts by the frame from which they are meant: {0: "a dog surfing", 24: "a dog in snow"}.
        width, height: in pixels; None is the base's own resolution.
        control: how strongly motion and concept act, along the film.
        windows: how a film is cut that is longer than the motion modules reach, and whether it loops.
        start: another film or a picture to begin from (`start_from_video`, `start_from_picture`).
        speed: what may be done to be fast; by default all that leaves the film as it is.
        decode_chunk: frames that the VAE decodes at once.

    Returns:
        frames_FHWC: RGB.

    Raises:
        UserError: motion modules of another base, an odd size, or options that do not go with these models.
    """
    settings = FilmSettings(
        frames=frames,
        steps=steps,
        guidance=guidance,
        scheduler=scheduler,
        width=width,
        height=height,
        windows=windows,
        noise=noise,
        speed=speed,
    )
    film = Film(prompt=prompt, seed=seed, concept=concept, negative_prompt=negative_prompt, control=control)
    (latents_FCHW,) = sample_latents(base, motion, [film], settings, start=start, progress=progress)
    return decode_frames(base, latents_FCHW, chunk=decode_chunk, winograd=speed.winograd)


def sample_videos(
    base: Base,
    motion: MotionModules,
    films: Sequence[Film],
    settings: FilmSettings = DEFAULTS,
    *,
    start: Start | None = None,
    batch: int = 1,
    decode_chunk: int = DECODE_CHUNK,
    progress: bool = False,
) -> list[npt.NDArray[np.uint8]]:
    """Several films of different prompts, seeds and concepts: frames_FHWC of each, as `sample_latents` makes them."""
    latents = sample_latents(base, motion, films, settings, start=start, batch=batch, progress=progress)
    options: dict[str, Any] = {"chunk": decode_chunk, "winograd": settings.speed.winograd}
    return [decode_frames(base, latents_FCHW, **options) for latents_FCHW in latents]


@torch.inference_mode()
def sample_latents(
    base: Base,
    motion: MotionModules,
    films: Sequence[Film],
    settings: FilmSettings = DEFAULTS,
    *,
    start: Start | None = None,
    batch: int = 1,
    progress: bool = False,
) -> Iterator[Tensor]:
    """latents_FCHW of each film, one after the other, ready to be decoded while the next are not begun.

    Args:
        start: for all films alike.
        batch: films that go through the UNet at once. With 1, a film's bytes depend on no other film. More are faster
            where one film leaves the device idle; kernels for other batch sizes then round in other places (latents
            within 1e-4 in float32 of those made alone).

    Raises:
        UserError: as `sample_video`; several concepts in one batch that change more than text, K and V; or a speed that
            is not exact with a sampler that adds noise at every step.
    """
    check_speed(settings.speed, settings.scheduler)
    video_unet = VideoUNet(base.unet, motion)
    window = window_size(settings.frames, motion.max_frames, settings.windows)
    for index in range(0, len(films), batch):
        with base.in_use:
            latents_BFCHW = _sample_batch(
                base, video_unet, films[index : index + batch], settings, window, start, progress
            )
        yield from latents_BFCHW


def _sample_batch(
    base: Base,
    video_unet: VideoUNet,
    films: Sequence[Film],
    settings: FilmSettings,
    window: int,
    start: Start | None,
    progress: bool,
) -> Tensor:
    """latents_BFCHW. Of a film longer than a window they stay on the CPU, and one window at a time is on the device."""
    frames, windows, seeds = settings.frames, settings.windows, [film.seed for film in films]
    shape = (frames, base.unet.config.in_channels, *latent_size(base, settings.width, settings.height))
    noise_BFCHW = film_noise(seeds, shape, settings.noise, window=window, stride=window - windows.overlap)
    noised = {**base.scheduler_config, **video_unet.motion.config.schedule}
    scheduler = make_scheduler(noised, settings.scheduler, seeds=seeds, steps=settings.steps)
    scheduler.set_timesteps(settings.steps)

    with _window_model(base, video_unet, films, settings, scheduler.timesteps) as predict_at:
        if window == frames and windows.schedule != "looped":
            noise_BFCHW, predict = noise_BFCHW.to(base.device), predict_at(tuple(range(frames)))
        else:
            list_windows = partial(windows_at, frames=frames, size=window, windows=windows)
            predict = windowed(predict_at, list_windows, blend_weights(window, windows))
        predict = forecasting(predict, settings.speed, steps=settings.steps)
        if start is not None:
            start = start.to(noise_BFCHW.device)
        sample = partial(
            denoise, predict, scheduler=scheduler, steps=settings.steps, guidance=1, start=start, progress=progress
        )
        first_BFCHW = noise_BFCHW
        latents_BFCHW = sample(noise_BFCHW)
        for turn in range(1, settings.noise.freeinit + 1):
            noise_BFCHW = reinitialised(latents_BFCHW, first_BFCHW, seeds, scheduler, settings.noise, turn=turn)
            latents_BFCHW = sample(noise_BFCHW)
    return latents_BFCHW


@contextmanager
def _window_model(
    base: Base, video_unet: VideoUNet, films: Sequence[Film], settings: FilmSettings, timesteps_T: Tensor
) -> Iterator[Callable[[Window], Predict]]:
    """Within the block: the model that predicts these frames of all films, with guidance, on the base's device."""
    with_guidance, speed = settings.guidance != 1, settings.speed.on(base.device.type)
    loop = settings.frames if settings.windows.schedule == "looped" else None
    size = (settings.height or base.resolution, settings.width or base.resolution)
    shared_prefix = speed.shared_prefix and not base.is_sdxl  # whose time embedding depends on the prompt
    prompts = [
        compile_film(
            base,
            film.prompts,
            film.negative_prompt if with_guidance else None,
            concept=film.concept,
            control=film.control,
            size=size,
            loop=loop,
        )
        for film in films
    ]
    folded = folded_concept([(film.concept, film.control) for film in films], compiled=speed.compiled)
    if folded is not None and folded.varies:  # these two make something of the weights once
        speed = replace(speed, time_table=False, upsampling=False)
    moves = [film.control.motion_curve for film in films]
    if loop is not None:
        moves = [curve.closed(loop) for curve in moves]
    varies = any(each.varies for each in prompts)
    steady = read_films(prompts, guided=with_guidance, done=0.0, frames=range(1))
    deep: dict[tuple[Window, bool], DeepFeature] = {}
    walk = (
        compiled(video_unet, moves, device=base.device, steady=speed.deep_every == 1) if speed.compiled else video_unet
    )

    def predict_at(shown: Window) -> Predict:
        def predict(latents_BFCHW: Tensor, timestep: Tensor, step: int) -> Tensor:
            """With guidance it is called with all films twice; after the steps that are guided both answers are one."""
            both = with_guidance and step < speed.guided_until * settings.steps
            alone = with_guidance and not both
            films_BFCHW = latents_BFCHW[: len(films)] if alone or (both and shared_prefix) else latents_BFCHW
            films_BFCHW, timestep = films_BFCHW.to(base.device, base.dtype), timestep.to(base.device)
            with ExitStack() as held:
                now, done = steady, step / max(settings.steps - 1, 1)
                if folded is not None and folded.varies:
                    held.enter_context(folded.acting(base.unet, done=done))
                if varies:
                    now = read_films(prompts, guided=with_guidance, done=done, frames=shown)
                if alone:
                    now = now.half(1)
                if varies or alone:
                    held.enter_context(reading(base.unet, now))
                held.enter_context(moving(video_unet.motion, moves, shown, copies=1 + both))
                if table is not None:
                    table.step = step
                copies = (1 + both) * len(films) // len(films_BFCHW)
                kept = _deep_feature(deep, speed, (shown, alone), step)
                apart = halves if copies == 2 else None
                answer = walk(films_BFCHW, timestep, None, now.added, copies=copies, apart=apart, deep=kept).float()
            return torch.cat([answer, answer]) if alone else answer

        return guided(predict, settings.guidance)

    at_once = with_guidance and speed.halves and speed.deep_every == 1 and not speed.compiled
    with (
        at_work(base.device, base.unet, video_unet.motion),
        nullcontext() if folded is None or folded.varies else folded.acting(base.unet, done=0),
        reading(base.unet, steady),
        two_halves(base.device) if at_once else nullcontext() as halves,
    ):
        table = None
        if speed.compiled:  # a graph fuses by itself, and of blocks prepared for one film it would be made for each
            yield predict_at
            return
        table = TimeTable(base.unet, timesteps_T) if speed.time_table and not base.is_sdxl else None
        with prepared(base.unet, video_unet.motion, speed, table=table):
            yield predict_at


def _deep_feature(
    kept: dict[tuple[Window, bool], DeepFeature], speed: Speed, key: tuple[Window, bool], step: int
) -> DeepFeature | None:
    """What the inner layers gave for these frames; empty at the steps that compute them anew."""
    if speed.deep_every == 1:
        return None
    if step % speed.deep_every == 0 or key not in kept:
        kept[key] = DeepFeature(speed.deep_layers)
    return kept[key]


def decode_frames(
    base: Base, latents_FCHW: Tensor, *, chunk: int = DECODE_CHUNK, winograd: bool = True
) -> npt.NDArray[np.uint8]:
    """Decodes a film a few frames at a time; only uint8 frames are kept.

    Args:
        winograd: as in `Speed`.

    Returns:
        frames_FHWC
    """
    stream = decode_stream(base, latents_FCHW, chunk=chunk, winograd=winograd)
    first_HWC = next(stream)
    frames_FHWC = np.empty((len(latents_FCHW), *first_HWC.shape), dtype=first_HWC.dtype)  # stacking holds all twice
    for index, frame_HWC in enumerate(chain([first_HWC], stream)):
        frames_FHWC[index] = frame_HWC
    return frames_FHWC


@torch.inference_mode()
def decode_stream(
    base: Base, latents_FCHW: Tensor, *, chunk: int = DECODE_CHUNK, winograd: bool = True
) -> Iterator[Frame]:
    """frame_HWC after frame_HWC; no more than `chunk` of them are in memory at once.

    From the first frame to the last the base is in use.
    """
    if winograd and latents_FCHW.device.type == "cpu":  # where channels lie last, convolutions copy less
        latents_FCHW = latents_FCHW.to(memory_format=torch.channels_last)
    with base.in_use, at_work(base.device, base.vae), by_tiles(base.vae) if winograd else nullcontext():
        for part_FCHW in latents_FCHW.split(chunk):
            yield from to_uint8(decode_latents(base.vae, part_FCHW, chunk=chunk))


def to_uint8(pixels_BCHW: Tensor) -> npt.NDArray[np.uint8]:
    """Pixels in [-1, 1] to the nearest of 256 levels: frames_BHWC."""
    levels_BCHW = ((pixels_BCHW + 1) * 127.5).round().clamp(0, 255)
    return levels_BCHW.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
