"""Films from the command line: what scripts/animate.py runs. No torch is imported before the settings are checked."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdvideo.cli import config_from_flags, print_usage_footer
from cdvideo.config import as_path
from cdvideo.errors import UserError
from cdvideo.media.ffmpeg import find_encoder
from cdvideo.runs import ensure_writable
from cdvideo.sampling.config import AnimateConfig
from cdvideo.sampling.flags import animate_parser
from cdvideo.sampling.foreign_syntax import foreign_syntax
from cdvideo.sampling.sampler import described, settled, untried

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from cdvideo.base.loader import Base
    from cdvideo.concept.concept import Concept
    from cdvideo.media.export import Metadata
    from cdvideo.media.spool import Spool
    from cdvideo.motion.modules import MotionModules
    from cdvideo.sampling.denoise import Start

logger = logging.getLogger(__name__)

RUNS = Path("runs")  # where train_concept.py leaves its concepts
GROUPS = ("windows", "noise", "control", "start")
_DEFAULTS = AnimateConfig(prompt="any")


def main(argv: Sequence[str]) -> None:
    """Films a prompt: writes <slug>-<seed>.mp4, .gif, a poster, a filmstrip and the settings for each film.

    Where a film that was made with other settings has that name, this one is <slug>-<seed>-2, and so on.

    Raises:
        UserError: wrong settings, a folder that can not be written, a concept or motion modules that do not fit.
    """
    start = time.perf_counter()
    args = animate_parser().parse_intermixed_args(argv)
    config = config_from_flags(AnimateConfig, args)
    if config.scheduler != "auto":
        settled(config, None)  # what is wrong whatever the motion modules are
    _check_paths(config)
    ensure_writable(config.out)
    for line in foreign_syntax([*config.prompts.values(), config.negative_prompt]):
        logger.warning("%s", line)
    if "png" in config.formats and not config.still:
        from cdvideo.media.export import require_frames_alone

        for seed in range(config.seed, config.seed + config.num_videos):
            require_frames_alone(config.out / f"{slug(config.prompt)}-{seed}-png")
    for codec in config.codecs:
        find_encoder(codec)  # before an hour of sampling

    from cdvideo.base.folder import HASHED_PARTS
    from cdvideo.base.loader import load_base
    from cdvideo.base.memory import advise
    from cdvideo.device import pick_dtype, use_device
    from cdvideo.sampling.attention import attending
    from cdvideo.sampling.memory import film_cures, film_needs

    device = use_device(config.device)
    dtype, resting = pick_dtype(config.dtype, device), HASHED_PARTS if config.offload else ()
    on_gpu = device.type == "cuda"
    advise(
        config.base,
        device,
        dtype,
        needs=lambda base: film_needs(base, config, offload=on_gpu and config.offload),
        cures=lambda base: film_cures(base, config, on_gpu=on_gpu),
        report=_report(config),
    )
    base = load_base(config.base, device=device, dtype=dtype, resting=resting, report=_report(config))
    if config.vae_tiling:
        base.vae.enable_tiling()
    concept, concept_name = _choose_concept(config, base)
    motion = None if config.still else _load_motion(config, base)
    made_for = None if motion is None else motion.config
    of_picture = _for_picture(config)
    config = settled(config, made_for)
    _report(config)(described(config, made_for))
    if told := untried(config):
        logger.warning(told)
    if config.guidance == 1 and config.negative_prompt:
        logger.warning("the negative prompt is not read: guidance 1 asks for the prompt alone")

    settings = _settings(config, base, concept_name)
    with attending(base, config.attention):
        for seed, frames in _sample(config, base, concept, motion):
            made_by = {**settings, "seed": seed}
            with frames, _own_stem(config, made_by) as stem:
                written = _write(frames, config, made_by, stem=stem)
                if config.also_still:
                    made_by = {**_settings(of_picture, base, concept_name), "seed": seed}
                    written.append(_write_still(of_picture, base, concept, made_by, stem=stem))
            if not config.quiet:
                print("wrote", *written)
    if not config.quiet:
        print_usage_footer(start)


def _check_paths(config: AnimateConfig) -> None:
    """Raises UserError for a path with a typo in it, before a base is fetched and loaded."""
    motion = as_path(config.motion)
    of_motion = [motion] if config.motion != "auto" and not config.still else []
    named = [
        *(("--concept", "concept file", path) for path, _ in config.concept_files),
        *(("--motion", f"motion {'file' if motion.suffix else 'folder'}", path) for path in of_motion),
        *(("--motion-lora", "motion LoRA", path) for path, _ in motion_loras(config.motion_lora)),
    ]
    for flag, what, path in named:
        if not path.exists():
            raise UserError(
                f"there is no {what} {path}",
                allowed="paths of what exists, from the folder in which you are",
                do=f"correct the path of {flag}",
            )


def slug(prompt: str) -> str:
    """A prompt as part of a file name: lower-case words joined by hyphens, at most 60 letters."""
    words = re.findall(r"[^\W_]+", prompt.lower())
    return "-".join(words)[:60].rstrip("-") or "film"


@contextmanager
def _own_stem(config: AnimateConfig, settings: Metadata) -> Iterator[str]:
    """<slug>-<seed>; with -2, -3, ... behind it where a film that was made in another way has that name.

    The name is taken by writing the settings first, so that of two processes at once each gets one of its own. It is
    given back where the film is not finished.
    """
    from cdvideo.media.export import settings_text

    stem = f"{slug(config.prompt)}-{settings['seed']}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    for name in names:
        path = config.out / f"{name}.json"
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(settings_text(settings))
        except FileExistsError:
            if _made_by(path) == settings:
                yield name
                return
            continue
        try:
            yield name
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return


def _made_by(path: Path) -> object:
    """The settings that a film's file tells; None where it is a file of somebody else's."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _choose_concept(config: AnimateConfig, base: Base) -> tuple[Concept | None, str | None]:
    """The concept and the name to show for it, as the settings and the prompt ask."""
    from cdvideo.base.offload import at_work
    from cdvideo.base.text import find_tokens
    from cdvideo.concept.concept import distinct_words
    from cdvideo.concept.file import SAMPLE_CONCEPT, find_concept
    from cdvideo.interchange.load import load_adapters

    files = config.concept_files
    if config.concept == "auto" and (found := find_concept(config.prompt, RUNS, base_hash=base.hash)):
        files = ((found, 1.0),)
    if not files:
        return None, None
    if files == ((SAMPLE_CONCEPT, 1.0),):
        _report(config)("no trained concept's token stands in the prompt: using the sample concept of cdvideo's own")
    with at_work(
        base.device, base.unet, *base.text_encoders.values()
    ):  # several concepts are merged by what these make of them
        concept = load_adapters(base, files, report=_report(config))
    prompts = [*config.prompts.values(), config.negative_prompt]
    for words in distinct_words(concept.tokens):
        if not any(find_tokens(prompt, words) for prompt in prompts):
            logger.warning(
                "the prompt lacks the concept's token (%s): the concept will hardly be seen", " or ".join(words)
            )
    return concept, " + ".join(_public_name(path, weight) for path, weight in files)


def _public_name(path: Path, weight: float) -> str:
    """A concept as it is called in a film's settings: a run by its folder, anything else by its file."""
    from cdvideo.concept.config import CONCEPT_FILE
    from cdvideo.concept.file import SAMPLE_CONCEPT

    name = path.resolve().parent.name if path.name == CONCEPT_FILE else path.stem
    name = "sample concept" if path == SAMPLE_CONCEPT else name
    return name if weight == 1 else f"{name} at {weight:g}"


def _report(config: AnimateConfig) -> Callable[[str], object]:
    """Where to say what was loaded."""
    return logger.info if config.quiet else print


def _load_motion(config: AnimateConfig, base: Base) -> MotionModules:
    import torch

    from cdvideo.motion.files import load_motion
    from cdvideo.motion.lora import fold_motion_lora

    path = base.path / "motion" if config.motion == "auto" else as_path(config.motion)
    if config.motion == "auto" and not path.is_dir():
        raise UserError(
            f"base {config.base!r} has no motion modules of its own",
            allowed="a base with a folder `motion`, or motion modules in a folder or file of their own",
            do="name motion modules that fit this base with --motion, or ask for a picture with --still",
        )
    home = torch.device("cpu") if config.offload else base.device
    motion = load_motion(path, device=home, dtype=base.dtype, report=_report(config))
    trained_for = motion.config.trained_for
    if trained_for is not None and trained_for != base.hash:
        logger.warning("the motion modules in %s were trained for a base with other weights", path.name)
    for file, strength in motion_loras(config.motion_lora):
        fold_motion_lora(motion, file, strength=strength, report=_report(config))
    return motion


def motion_loras(text: str) -> list[tuple[Path, float]]:
    """Files and strengths from "zoom.ckpt,pan.safetensors:0.7"."""
    loras = []
    for item in text.split(",") if text != "none" else []:
        file, _, strength = item.strip().rpartition(":")
        if not file or not re.fullmatch(r"-?\d*\.?\d+", strength):
            file, strength = item.strip(), "1"
        loras.append((as_path(file), float(strength)))
    return loras


def _sample(
    config: AnimateConfig, base: Base, concept: Concept | None, motion: MotionModules | None
) -> Iterator[tuple[int, Spool]]:
    """Seed and frames of each film, or of each still as a film of one frame; a film is decoded when its turn comes."""
    from cdvideo.media.spool import Spool
    from cdvideo.sampling.distance import distance
    from cdvideo.sampling.speed import EXACT
    from cdvideo.sampling.video import Film, decode_frames, decode_stream, sample_latents

    seeds = range(config.seed, config.seed + config.num_videos)
    if motion is None:
        yield from ((seed, Spool(_draw_still(config, base, concept, seed))) for seed in seeds)
        return
    films = [
        Film(
            prompt=config.prompts,
            seed=seed,
            concept=concept,
            negative_prompt=config.negative_prompt,
            control=config.control,
        )
        for seed in seeds
    ]
    _tell_windows(config, motion)
    start = _load_start(config, base)
    options: dict[str, Any] = {"start": start, "batch": config.batch, "progress": not config.quiet}
    decoding: dict[str, Any] = {"chunk": config.decode_chunk, "winograd": config.film_settings.speed.winograd}
    latents = sample_latents(base, motion, films, config.film_settings, **options)
    exact: Iterator[Tensor] = iter(())
    if config.compare:
        settings = dataclasses.replace(config.film_settings, speed=EXACT)
        exact = sample_latents(base, motion, films, settings, **options)
    for seed, latents_FCHW in zip(seeds, latents, strict=True):
        for exact_FCHW in itertools.islice(exact, 1):
            frames, exact_frames = (decode_frames(base, each, **decoding) for each in (latents_FCHW, exact_FCHW))
            print(f"seed {seed}, {config.speed} beside exact: {distance(frames, exact_frames)}")
        yield seed, Spool(decode_stream(base, latents_FCHW, **decoding))


def _draw_still(config: AnimateConfig, base: Base, concept: Concept | None, seed: int) -> npt.NDArray[np.uint8]:
    """A picture as a film of one frame: frames_FHWC."""
    from cdvideo.sampling.image import sample_images
    from cdvideo.sampling.video import to_uint8

    settings = config.film_settings
    pixels_BCHW = sample_images(
        base,
        [config.prompts[min(config.prompts)]],
        seeds=[seed],
        concept=concept,
        negative_prompt=config.negative_prompt,
        steps=settings.steps,
        guidance=settings.guidance,
        scheduler=settings.scheduler,
        width=settings.width,
        height=settings.height,
        decode_chunk=config.decode_chunk,
        progress=not config.quiet,
    )
    return to_uint8(pixels_BCHW)


def _tell_windows(config: AnimateConfig, motion: MotionModules) -> None:
    from cdvideo.sampling.windows import window_size, windows_at

    size = window_size(config.frames, motion.max_frames, config.windows)
    if size < config.frames:
        count = len(windows_at(0, frames=config.frames, size=size, windows=config.windows))
        reach = "" if config.frames <= motion.max_frames else f"the motion modules reach {motion.max_frames}, so "
        _report(config)(f"{config.frames} frames: {reach}in {count} windows of {size}, blended at every step")


def _load_start(config: AnimateConfig, base: Base) -> Start | None:
    """What the films begin from, encoded."""
    from cdvideo.media.clips import iter_clip
    from cdvideo.sampling.start import start_from_picture, start_from_video

    start, side = config.start, base.resolution
    options: dict[str, Any] = {"frames": config.frames, "height": config.height or side, "width": config.width or side}
    if start.video is not None:
        return start_from_video(base, iter_clip(start.video, fps=config.fps), strength=start.strength or 0.6, **options)
    if start.image is not None:
        picture = next(iter_clip(start.image))
        return start_from_picture(base, picture, strength=start.strength or 0.7, fade=start.fade, **options)
    return None


def _write(frames: Spool, config: AnimateConfig, settings: Metadata, *, stem: str) -> list[str]:
    """Writes a film in all its formats, or a still, with a poster and a filmstrip; returns the paths."""
    from cdvideo.media.export import enlarge, filmstrip, write_picture, write_video

    paths = [config.out / f"{stem}.png"]
    write_picture(next(enlarge(frames, config.watch_size)), paths[0], metadata=settings)
    if not config.still:
        for name in config.formats:
            paths.append(config.out / (f"{stem}-png" if name == "png" else f"{stem}.{name}"))
            large = enlarge(frames, config.watch_size)
            options: dict[str, Any] = {"codec": config.codec, "dither": config.dither}
            write_video(large, paths[-1], fps=config.fps, metadata=settings, **options)
        paths.append(config.out / f"{stem}-frames.png")
        write_picture(filmstrip(frames), paths[-1], metadata=settings)
    return [str(path) for path in paths]


def _for_picture(config: AnimateConfig) -> AnimateConfig:
    """The settings of the picture beside a film: what the image model was made for, and nothing that is of films."""
    own = {group: getattr(_DEFAULTS, group) for group in GROUPS}
    return settled(dataclasses.replace(config, **own, speed="exact", compare=False, also_still=False), None)


def _write_still(config: AnimateConfig, base: Base, concept: Concept | None, settings: Metadata, *, stem: str) -> str:
    """Writes what the image model alone draws from a film's prompt and seed; returns its path."""
    from cdvideo.media.export import enlarge, write_picture

    seed = settings["seed"]
    assert isinstance(seed, int)
    path = config.out / f"{stem}-still.png"
    (picture,) = enlarge(_draw_still(config, base, concept, seed), config.watch_size)
    write_picture(picture, path, metadata=settings)
    return str(path)


def _settings(
    config: AnimateConfig, base: Base, concept_name: str | None
) -> dict[str, str | int | float | bool | None]:
    """What made the film, for its metadata: no paths beyond names, since films travel."""
    left_out = (
        "out",
        "device",
        "quiet",
        "num_videos",
        "batch",
        "compare",
        "compile",
        "also_still",
        "format",
        "codec",
        "dither",
        "attention",
        "base",
        "motion",
        "motion_lora",
        "concept",
        "offload",
        *GROUPS,
    )
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in left_out}
    for group in GROUPS:
        given, defaults = (dataclasses.asdict(each) for each in (getattr(config, group), getattr(_DEFAULTS, group)))
        for name in (name for name in given if given[name] != defaults[name]):
            settings[f"{group}.{name}"] = given[name].name if isinstance(given[name], Path) else given[name]
    names = {"base": Path(config.base).name, "base_hash": base.hash, "concept": concept_name}
    loras = ", ".join(f"{path.name}:{strength:g}" for path, strength in motion_loras(config.motion_lora))
    return {**settings, **names, "motion": Path(config.motion).name, "motion_lora": loras or None}
