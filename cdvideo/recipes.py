"""What the scripts do, from flags to results: where the parts that do not know each other are put together.

Imports torch only once flags, settings and pictures have been found in order, so that a mistake is told in a blink.
"""

from __future__ import annotations

import json
import logging
import re
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cdvideo.cli import add_common_flags, config_from_flags, print_usage_footer
from cdvideo.concept.config import CONCEPT_FILE, SAMPLE_PICTURES, ConceptConfig
from cdvideo.config import to_yaml
from cdvideo.errors import UserError
from cdvideo.media.images import read_pictures
from cdvideo.runs import Run, create_run, open_run

if TYPE_CHECKING:
    from torch import Tensor

    from cdvideo.base.loader import Base
    from cdvideo.concept.concept import Concept
    from cdvideo.concept.trainer import Sampler

logger = logging.getLogger(__name__)


def train_concept_main(argv: Sequence[str]) -> None:
    """scripts/train_concept.py: pictures of one thing in, a concept file out. Without arguments, the sample concept."""
    started = time.perf_counter()
    parser = ArgumentParser(description=train_concept_main.__doc__, allow_abbrev=False)
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="3 to 20 pictures of the one thing")
    parser.add_argument("--token", metavar="WORD", help="the made-up word that will stand for it (sks)")
    parser.add_argument("--class-word", metavar="WORDS", help='what kind of thing it is ("dog", "stuffed animal")')
    parser.add_argument(
        "--base", metavar="NAME", help="tiny, a diffusers folder, a .safetensors or .ckpt file, or a hub id (tiny)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="training steps")
    add_common_flags(parser)
    args = parser.parse_intermixed_args(argv)

    config = config_from_flags(ConceptConfig, args)
    run: Run | None = None
    if args.resume:
        if args.config:
            raise UserError(
                "--resume with --config", allowed="one of both", do="leave --config out: the run has its own"
            )
        run = open_run(config.out) if config.out else _create_run(config, resume=True)
        args.config = run.folder / "config.yaml"
        config = config_from_flags(ConceptConfig, args)
    folders = {config.token: config.images or SAMPLE_PICTURES, **{other.token: other.images for other in config.others}}
    pictures = {token: read_pictures(folder) for token, folder in folders.items()}

    from cdvideo.base.loader import load_base
    from cdvideo.base.memory import advise
    from cdvideo.concept.data import picture_side
    from cdvideo.concept.optimizer import check_optimizer
    from cdvideo.concept.trainer import train_concept
    from cdvideo.concept.words import check_token, warn_of_unknown_words
    from cdvideo.device import pick_dtype, use_device
    from cdvideo.sampling.memory import training_cures, training_needs
    from cdvideo.sampling.prior import prior_pictures

    device = use_device(config.device)
    check_optimizer(config.optim, device)
    report = logger.info if args.quiet else print
    dtype, on_gpu = pick_dtype(config.dtype, device), device.type == "cuda"
    advise(
        config.base,
        device,
        dtype,
        needs=lambda base: training_needs(base, config, on_gpu=on_gpu),
        cures=lambda base: training_cures(base, config, on_gpu=on_gpu),
        report=report,
    )
    base = load_base(config.base, device=device, dtype=dtype, resting=("vae",), report=report)
    picture_side(base, config.resolution)
    for token, class_word in config.class_words.items():
        check_token(base.tokenizer, token)
        warn_of_unknown_words(base.tokenizer, class_word)
    with run or _create_run(config) as run:
        run.write_text("config.yaml", to_yaml(config))
        if not args.quiet:
            told = ", ".join(f'"{config.phrases[token]}" from {len(of)} pictures' for token, of in pictures.items())
            print(f"{told}, base {config.base} on {device}: {run.folder}")
        try:
            train_concept(
                base,
                pictures,
                config,
                run,
                prior=prior_pictures(base, config, run.folder / "prior", quiet=args.quiet)
                if config.preserve.prior_weight
                else None,
                sample=_sampler(base, config),
                resume=args.resume,
                quiet=args.quiet,
            )
        except KeyboardInterrupt:
            print(f"stopped; go on with: python scripts/train_concept.py --resume --out {run.folder}")
            raise
    if not args.quiet:
        _print_summary(config, run)
        print_usage_footer(started)


def _create_run(config: ConceptConfig, *, resume: bool = False) -> Run:
    """The run's folder: --out, or runs/<token>-<class word>."""
    out = config.out or Path("runs") / re.sub(r"[^\w-]+", "-", config.phrase)
    return create_run(out.parent, out.name, resume=resume)


def _sampler(base: Base, config: ConceptConfig) -> Sampler:
    """Draws pictures of a concept in training, from the same noise each time."""
    from cdvideo.sampling.image import sample_images

    def sample(concept: Concept, prompts: Sequence[str]) -> Tensor:
        seeds = range(config.sample.seed, config.sample.seed + len(prompts))
        return sample_images(
            base,
            prompts,
            seeds=seeds,
            concept=concept,
            steps=config.sample.steps,
            guidance=config.sample.guidance,
            width=config.resolution,
            height=config.resolution,
        )

    return sample


def _print_summary(config: ConceptConfig, run: Run) -> None:
    """The last line of metrics.jsonl in words, and what to do next."""
    *_, last = (json.loads(line) for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    print(
        f"cosine to the class on phrases never trained on: {last['drift_cosine']:.3f} (the class itself "
        f"{last['class_cosine']:.3f}); the UNet's tuned weights changed by "
        f"{last['weight_change']:.1%}"
    )
    print(f'wrote {run.folder / CONCEPT_FILE}; film it: python scripts/animate.py --prompt "a {config.phrase} surfing"')
