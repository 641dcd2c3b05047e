"""Films from the command line: what scripts/animate.py runs. No torch is imported before the settings are checked."""

from __future__ import annotations

import dataclasses
import logging
import re
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdvideo.cli import add_common_flags, config_from_flags, print_usage_footer
from cdvideo.errors import UserError
from cdvideo.media.ffmpeg import find_encoder
from cdvideo.runs import require_writable
from cdvideo.sampling.config import FORMATS, AnimateConfig
from cdvideo.sampling.sampler import described, settled

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from cdvideo.base.loader import Base
    from cdvideo.concept.concept import Concept
    from cdvideo.media.export import Metadata
    from cdvideo.motion.modules import MotionModules

logger = logging.getLogger(__name__)

RUNS = Path("runs")  # where train_concept.py leaves its concepts


def main(argv: Sequence[str]) -> None:
    """Films a prompt: writes <slug>-<seed>.mp4, .gif, a poster, a filmstrip and the settings for each film.

    Raises:
        UserError: wrong settings, a folder that can not be written, a concept or motion modules that do not fit.
    """
    start = time.perf_counter()
    args = _parser().parse_intermixed_args(argv)
    config = config_from_flags(AnimateConfig, args)
    require_writable(config.out)
    for codec in config.codecs:
        find_encoder(codec)  # before an hour of sampling

    from cdvideo.base.loader import HASHED_PARTS, load_base
    from cdvideo.base.memory import advise
    from cdvideo.device import pick_device, pick_dtype
    from cdvideo.sampling.attention import attending
    from cdvideo.sampling.memory import film_cures, film_needs

    device = pick_device(config.device)
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
    config = settled(config, made_for)
    _report(config)(described(config, made_for))

    with attending(base, config.attention):
        for seed in range(config.seed, config.seed + config.num_videos):
            settings = {**_settings(config, base, concept_name), "seed": seed}
            frames_FHWC = _sample(config, base, concept, motion, seed)
            written = _write(frames_FHWC, config, settings, stem=f"{slug(config.prompt)}-{seed}")
            if not config.quiet:
                print("wrote", *written)
    if not config.quiet:
        print_usage_footer(start)


def slug(prompt: str) -> str:
    """A prompt as part of a file name: lower-case words joined by hyphens, at most 60 letters."""
    words = re.findall(r"[^\W_]+", prompt.lower())
    return "-".join(words)[:60].rstrip("-") or "film"


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Films a prompt, with the concept whose token stands in it.", allow_abbrev=False
    )
    parser.add_argument("--prompt", metavar="TEXT", help="what is to be seen; a concept's token brings the concept in")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what is to be avoided")
    parser.add_argument("--frames", type=int, metavar="N", help="length of the film (16)")
    parser.add_argument("--fps", type=float, metavar="N", help="frames in a second (8)")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (25, or as the motion modules ask)")
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="X",
        help="how closely to follow the prompt; 1 is off (5, or as the motion modules ask)",
    )
    parser.add_argument("--scheduler", choices=["auto", "ddim", "dpm++", "euler", "lcm"], help="the sampler (auto)")
    parser.add_argument("--num-videos", type=int, metavar="N", help="films with seed, seed + 1, ... (1)")
    parser.add_argument("--still", action="store_true", help="a picture instead of a film")
    parser.add_argument("--offload", action="store_true", help="keep in RAM what is not at work: less GPU memory")
    parser.add_argument("--format", metavar="LIST", help=f"some of {','.join(FORMATS)} (mp4,gif)")
    parser.add_argument("--codec", choices=["h264", "hevc", "av1"], help="of the mp4 (h264)")
    parser.add_argument("--dither", choices=["none", "ordered", "diffusion"], help="of the gif (none)")
    backends = ["sdpa", "flash", "cudnn", "efficient", "xformers"]
    parser.add_argument("--attention", choices=backends, help="what computes attention (sdpa)")
    parser.add_argument(
        "--concept",
        metavar="FILE[:WEIGHT][,FILE...]",
        help="a concept, a LoRA, a textual inversion, several of them, or none (the newest one that fits the prompt)",
    )
    parser.add_argument(
        "--base", metavar="NAME", help="tiny, a diffusers folder, a .safetensors or .ckpt file, or a hub id (tiny)"
    )
    parser.add_argument(
        "--motion", metavar="PATH", help="motion modules: a folder, or AnimateDiff's .ckpt or .safetensors (the base's)"
    )
    parser.add_argument("--motion-lora", metavar="FILE[:X][,...]", help="motion LoRAs, each with its strength (none)")
    add_common_flags(parser, resume=False)
    return parser


def _choose_concept(config: AnimateConfig, base: Base) -> tuple[Concept | None, str | None]:
    """The concept and the name to show for it, as the settings and the prompt ask."""
    from cdvideo.base.offload import at_work
    from cdvideo.base.text import find_tokens
    from cdvideo.concept.file import SAMPLE_CONCEPT, find_concept
    from cdvideo.interchange.load import load_adapters

    files = config.concept_files
    if config.concept == "auto" and (found := find_concept(config.prompt, RUNS)):
        files = ((found, 1.0),)
    if not files:
        return None, None
    if files == ((SAMPLE_CONCEPT, 1.0),):
        print("no trained concept's token stands in the prompt: using the sample concept that ships with cdvideo")
    with at_work(base.device, base.unet, base.text_encoder):  # several concepts are merged by what these make of them
        concept = load_adapters(base, files, report=_report(config))
    if concept.tokens and not find_tokens(config.prompt, list(concept.tokens)):
        tokens = ", ".join(concept.tokens)
        logger.warning("the prompt lacks the concept's token (%s): the concept will hardly be seen", tokens)
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

    path = base.path / "motion" if config.motion == "auto" else Path(config.motion).expanduser()
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
        loras.append((Path(file).expanduser(), float(strength)))
    return loras


def _sample(
    config: AnimateConfig, base: Base, concept: Concept | None, motion: MotionModules | None, seed: int
) -> npt.NDArray[np.uint8]:
    """One film, or a still as a film of one frame: frames_FHWC."""
    from cdvideo.sampling.image import sample_images
    from cdvideo.sampling.video import sample_video, to_uint8

    options: dict[str, Any] = {
        "concept": concept,
        "negative_prompt": config.negative_prompt,
        "steps": config.steps,
        "guidance": config.guidance,
        "scheduler": config.scheduler,
        "width": config.width,
        "height": config.height,
        "decode_chunk": config.decode_chunk,
        "progress": not config.quiet,
    }
    if motion is None:
        return to_uint8(sample_images(base, [config.prompt], seeds=[seed], **options))
    return sample_video(base, motion, config.prompt, seed=seed, frames=config.frames, **options)


def _write(frames_FHWC: npt.NDArray[np.uint8], config: AnimateConfig, settings: Metadata, *, stem: str) -> list[str]:
    """Writes a film in all its formats, or a still, with a poster, a filmstrip and the settings; returns the paths."""
    from cdvideo.media.export import enlarge, filmstrip, write_picture, write_settings, write_video

    paths = [config.out / f"{stem}.png"]
    write_picture(next(enlarge(frames_FHWC, config.watch_size)), paths[0], metadata=settings)
    if not config.still:
        for name in config.formats:
            paths.append(config.out / (f"{stem}-png" if name == "png" else f"{stem}.{name}"))
            large = enlarge(frames_FHWC, config.watch_size)
            options: dict[str, Any] = {"codec": config.codec, "dither": config.dither}
            write_video(large, paths[-1], fps=config.fps, metadata=settings, **options)
        paths.append(config.out / f"{stem}-frames.png")
        write_picture(filmstrip(frames_FHWC), paths[-1], metadata=settings)
    write_settings(config.out / f"{stem}.json", settings)
    return [str(path) for path in paths]


def _settings(
    config: AnimateConfig, base: Base, concept_name: str | None
) -> dict[str, str | int | float | bool | None]:
    """What made the film, for its metadata: no paths beyond names, since films travel."""
    left_out = (
        "out",
        "device",
        "quiet",
        "num_videos",
        "format",
        "codec",
        "dither",
        "attention",
        "base",
        "motion",
        "motion_lora",
        "concept",
        "offload",
    )
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in left_out}
    names = {"base": Path(config.base).name, "base_hash": base.hash, "concept": concept_name}
    loras = ", ".join(f"{path.name}:{strength:g}" for path, strength in motion_loras(config.motion_lora))
    return {**settings, **names, "motion": Path(config.motion).name, "motion_lora": loras or None}
