"""scripts/benchmark.py memory: what learning and filming really take, beside the estimate. Imports no torch."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

from cdvideo.cli import config_from_flags, print_usage_footer
from cdvideo.concept.config import SAMPLE_PICTURES, ConceptConfig
from cdvideo.config import check, load_config
from cdvideo.media.images import read_pictures
from cdvideo.runs import require_writable

RESULT = "results-memory.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """A few steps of learning a concept, then a film."""

    base: str = "random-sd15"
    """ "random-sd15" has the architecture of Stable Diffusion 1.5 and random weights, which take as much memory and
    time as others; else a base as everywhere, such as "tiny"."""
    settings: tuple[str, ...] = ()
    """key=value settings (concept/config.py) of the training, over batch 2 and no contact sheets."""
    steps: int = 6
    """Training steps; the first two do not count for the time."""
    resolution: int | None = None
    """Side in pixels, of training and film; null is the base's own."""
    frames: int = 16
    """Frames of the film; 0 leaves it out."""
    film_steps: int = 4
    """Denoising steps of the film; the first two do not count for the time."""
    offload: bool = False
    """Whether the film's models are on the GPU only while they work."""
    out: Path = Path("runs/benchmark")
    """results-memory.json is written there."""
    device: str = "auto"
    dtype: str = "bf16"
    seed: int = 0
    quiet: bool = False

    def __post_init__(self) -> None:
        check(
            (self.steps >= 4, f"steps={self.steps}: must be at least 4, since the first two do not count"),
            (self.film_steps >= 4, f"film_steps={self.film_steps}: must be at least 4"),
            (self.frames >= 0, f"frames={self.frames}: must be at least 0"),
            (self.resolution is None or self.resolution >= 64, f"resolution={self.resolution}: must be at least 64"),
            (self.seed >= 0, f"seed={self.seed}: must be at least 0"),
        )

    @property
    def concept_config(self) -> ConceptConfig:
        """The training's settings. Raises UserError where some are wrong."""
        fixed = [f"steps={self.steps}", f"seed={self.seed}", f"checkpoint_every={self.steps + 1}"]
        side = "null" if self.resolution is None else str(self.resolution)
        ours = ["optim.batch_size=2", "data.variants=1", "sample.every=0", f"resolution={side}"]
        return load_config(ConceptConfig, overrides=[*ours, *self.settings, *fixed])


def memory_flags(parser: ArgumentParser) -> None:
    """Flags of its own."""
    parser.add_argument("--steps", type=int, metavar="N", help="training steps (6)")
    parser.add_argument("--resolution", type=int, metavar="N", help="side in pixels (the base's own)")
    parser.add_argument("--frames", type=int, metavar="N", help="frames of the film; 0 leaves it out (16)")
    parser.add_argument("--offload", action="store_true", help="film with models on the GPU only while they work")


def run_memory(args: Namespace) -> None:
    """Measures peak memory and seconds a step of learning K and V, and of a film, and sets the estimate beside them.

    Raises:
        UserError: wrong settings.
    """
    start = time.perf_counter()
    config = config_from_flags(MemoryConfig, args)
    concept_config = config.concept_config
    require_writable(config.out)
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
        print(f"wrote {config.out / RESULT}")
        print_usage_footer(start)
