"""scripts/benchmark.py memory: what learning and filming really take, beside the estimate. Imports no torch."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace

from cdvideo.cli import config_from_flags, print_usage_footer
from cdvideo.concept.config import SAMPLE_PICTURES
from cdvideo.evaluation.benchmark_config import MEMORY_RESULT, MemoryConfig
from cdvideo.media.images import read_pictures
from cdvideo.runs import ensure_writable


def memory_flags(parser: ArgumentParser) -> None:
    """Flags of its own."""
    parser.add_argument("--steps", type=int, metavar="N", help="training steps (6)")
    parser.add_argument("--resolution", type=int, metavar="N", help="side in pixels (the base's own)")
    parser.add_argument("--frames", type=int, metavar="N", help="frames of the film; 0 leaves it out (16)")
    parser.add_argument("--offload", action="store_true", help="film with models on the GPU only while they work")


def run_memory(args: Namespace) -> None:
    """Measures peak memory and seconds a step of learning a concept, and of a film, and sets the estimate beside them.

    Raises:
        UserError: wrong settings.
    """
    start = time.perf_counter()
    config = config_from_flags(MemoryConfig, args)
    concept_config = config.concept_config
    ensure_writable(config.out)
    pictures = read_pictures(SAMPLE_PICTURES)

    from cdvideo.evaluation.memory_measurement import measure_memory

    result = measure_memory(config, concept_config, pictures)
    if not config.quiet:
        for name in ("training", "film"):
            if name in result:
                told = result[name]
                print(
                    f"{name}: {told['peak'] / 1e9:.2f} GB at the most ({told['what']}), estimated "
                    f"{told['estimate'] / 1e9:.2f} GB ({told['estimate'] / told['peak'] - 1:+.0%}), "
                    f"{told['seconds_a_step']:.2f} s a step"
                )
        print(f"wrote {config.out / MEMORY_RESULT}")
        print_usage_footer(start)
