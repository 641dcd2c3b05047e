"""Settings of the benchmarks (imports no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cdvideo.concept.config import ConceptConfig
from cdvideo.config import check, load_config

MEMORY_RESULT = "results-memory.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingStepConfig:
    """Two trainings of the same concept, which take their steps in turn and are timed step by step."""

    peer: tuple[str, ...] = ("semantic.weight=0",)
    """key=value settings (concept/config.py) of the training that is compared with."""
    settings: tuple[str, ...] = ()
    """key=value settings of the training whose cost is asked for; none are its defaults."""
    base: str = "tiny"
    """ "tiny" is the embedded base; or a folder in diffusers' layout."""
    pairs: int = 6
    """Each pair is one training of both kinds; which begins changes."""
    steps: int = 40
    """Optimizer steps of a run."""
    out: Path = Path("runs/benchmark")
    """results-training-step.json is written there."""
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    quiet: bool = False

    def __post_init__(self) -> None:
        check(
            (self.pairs >= 2, f"pairs={self.pairs}: must be at least 2, for a spread"),
            (self.steps >= 20, f"steps={self.steps}: must be at least 20, since the first ones do not count"),
            (self.seed >= 0, f"seed={self.seed}: must be at least 0"),
        )

    def concept_config(self, settings: tuple[str, ...]) -> ConceptConfig:
        """The settings of one run. Raises UserError where some are wrong."""
        fixed = (f"steps={self.steps}", f"seed={self.seed}", "sample.every=0", f"checkpoint_every={self.steps + 1}")
        return load_config(ConceptConfig, overrides=[*settings, *fixed])


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
