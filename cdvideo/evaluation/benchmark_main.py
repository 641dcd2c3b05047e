"""The command line of scripts/benchmark.py. No torch is imported before the settings are checked."""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence

from cdvideo.cli import add_common_flags, config_from_flags, print_usage_footer
from cdvideo.concept.config import SAMPLE_PICTURES
from cdvideo.evaluation.benchmark_config import TrainingStepConfig
from cdvideo.evaluation.benchmark_memory import memory_main
from cdvideo.media.images import read_pictures
from cdvideo.runs import require_writable


def main(argv: Sequence[str]) -> None:
    """Runs one of the benchmarks.

    Raises:
        UserError: wrong settings.
    """
    start = time.perf_counter()
    parser = ArgumentParser(description="Time things against their peers, in turn, in one process.")
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser(
        "training-step", help="a step of concept training against the same one without the semantic preservation loss"
    )
    step.add_argument("--base", metavar="NAME", help="tiny (the embedded one), or a folder in diffusers' layout")
    step.add_argument("--pairs", type=int, metavar="N", help="runs of both (6)")
    add_common_flags(step, resume=False)
    commands.add_parser("memory", help="what learning and filming really take of a GPU's memory, beside the estimate")
    if argv and argv[0] == "memory":
        memory_main(argv[1:])
        return
    if not argv or argv[0] != "training-step":
        parser.parse_args(argv)  # --help, or the list of commands with exit code 2
        sys.exit(2)
    args = step.parse_intermixed_args(argv[1:])
    config = config_from_flags(TrainingStepConfig, args)
    for settings in (config.settings, config.peer):
        config.concept_config(settings)
    require_writable(config.out)
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
