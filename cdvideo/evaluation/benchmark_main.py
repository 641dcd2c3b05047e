"""The command line of scripts/benchmark.py. No torch is imported before the settings are checked."""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cdvideo.cli import add_common_flags, config_from_flags, print_usage_footer
from cdvideo.concept.config import SAMPLE_PICTURES
from cdvideo.evaluation.benchmark_config import TrainingStepConfig
from cdvideo.evaluation.benchmark_films import (
    ConceptsBenchmark,
    DecodeBenchmark,
    FilmBenchmark,
    LengthBenchmark,
    SamplerBenchmark,
)
from cdvideo.evaluation.benchmark_memory import memory_flags, run_memory
from cdvideo.media.images import read_pictures
from cdvideo.runs import ensure_writable


@dataclass(frozen=True)
class Command:
    """One benchmark: what it times, flags of its own, and what runs it."""

    help: str
    add_flags: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], None]


def main(argv: Sequence[str]) -> None:
    """Runs one of the benchmarks.

    Raises:
        UserError: wrong settings.
    """
    parser = ArgumentParser(description="Time things against their peers, in turn, on one machine.")
    parsers = parser.add_subparsers(dest="command", required=True)
    own = {name: parsers.add_parser(name, help=command.help) for name, command in COMMANDS.items()}
    for name, command in COMMANDS.items():
        bases = "tiny (the embedded one), a folder in diffusers' layout, or, of films, random-sd15"
        own[name].add_argument("--base", metavar="NAME", help=bases)
        command.add_flags(own[name])
        add_common_flags(own[name], resume=False)
    if not argv or argv[0] not in COMMANDS:
        parser.parse_args(argv)  # --help, or the list of commands with exit code 2
        sys.exit(2)
    COMMANDS[argv[0]].run(own[argv[0]].parse_intermixed_args(argv[1:]))


def _training_step_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, metavar="N", help="runs of both (6)")


def _training_step(args: Namespace) -> None:
    start = time.perf_counter()
    config = config_from_flags(TrainingStepConfig, args)
    for settings in (config.settings, config.peer):
        config.concept_config(settings)
    ensure_writable(config.out)
    pictures = read_pictures(SAMPLE_PICTURES)

    from cdvideo.evaluation.benchmark import training_step

    result = training_step(config, pictures)
    if not config.quiet:
        low, high = min(result["ratios"]), max(result["ratios"])
        seconds = result["seconds"]
        print(
            f"a training step takes {result['ratio']:.3f} x [{low:.3f}, {high:.3f}] of its peer's: "
            f"{1000 * seconds['asked']:.1f} against {1000 * seconds['peer']:.1f} ms, medians of {config.pairs} pairs "
            f"of {config.steps} steps, {result['device']}, {result['threads']} threads"
        )
        print(f"wrote {config.out / 'results-training-step.json'}")
        print_usage_footer(start)


def _film_flags(parser: ArgumentParser, *, steps: bool = True) -> None:
    parser.add_argument("--pairs", type=int, metavar="N", help="how often each side runs")
    parser.add_argument("--width", type=int, metavar="N", help="in pixels (the base's own)")
    parser.add_argument("--height", type=int, metavar="N", help="in pixels (the base's own)")
    if steps:
        parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (25)")


def _sampler_flags(parser: ArgumentParser) -> None:
    _film_flags(parser)
    parser.add_argument("--frames", type=int, metavar="N", help="length of the film (16)")
    parser.add_argument("--peers", metavar="LIST", help="how diffusers is used (documented,best)")
    parser.add_argument("--speed", metavar="LIST", help="presets of our sampler (exact)")
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="peak of the device, where it is not known")


def _decode_flags(parser: ArgumentParser) -> None:
    _film_flags(parser, steps=False)
    parser.add_argument("--frames", type=int, metavar="N", help="length of the film (64)")


def _concepts_flags(parser: ArgumentParser) -> None:
    _film_flags(parser)
    parser.add_argument("--frames", type=int, metavar="N", help="length of each film (16)")
    parser.add_argument("--films", type=int, metavar="N", help="films of a batch (8)")
    parser.add_argument("--concepts", metavar="LIST", help="a file for each film (made from the sample concept)")


def _film_benchmark(args: Namespace, name: str, cls: type[FilmBenchmark]) -> None:
    start = time.perf_counter()
    config = config_from_flags(cls, args)
    ensure_writable(config.out)

    from cdvideo.evaluation import benchmark_concepts, benchmark_sampler

    progress = (lambda line: None) if config.quiet else print
    module = benchmark_concepts if name == "concepts" else benchmark_sampler
    result = getattr(module, name)(config, progress)
    if not config.quiet:
        print(benchmark_sampler.as_markdown(result))
        print(f"wrote {config.out / f'results-{name}.json'} and .md")
        print_usage_footer(start)
    if any("failed" in each for group in result["groups"] for each in (group, *group["rows"])):
        sys.exit(1)


COMMANDS = {
    "training-step": Command(
        "a step of concept training against the same one without the semantic preservation loss",
        _training_step_flags,
        _training_step,
    ),
    "sampler": Command(
        "films against diffusers' AnimateDiffPipeline on the same weights, from the same noise",
        _sampler_flags,
        lambda args: _film_benchmark(args, "sampler", SamplerBenchmark),
    ),
    "decode": Command(
        "latents to frames, a few at a time, against diffusers' way",
        _decode_flags,
        lambda args: _film_benchmark(args, "decode", DecodeBenchmark),
    ),
    "length": Command(
        "time and memory of films of several lengths",
        _film_flags,
        lambda args: _film_benchmark(args, "length", LengthBenchmark),
    ),
    "concepts": Command(
        "a batch of films of as many concepts against one of films of a single concept",
        _concepts_flags,
        lambda args: _film_benchmark(args, "concepts", ConceptsBenchmark),
    ),
    "memory": Command(
        "what learning and filming really take of a GPU's memory, beside the estimate", memory_flags, run_memory
    ),
}
