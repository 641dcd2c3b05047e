"""Settings of the benchmarks (imports no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cdvideo.concept.config import ConceptConfig
from cdvideo.config import check, load_config


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingStepConfig:
    """Two trainings of the same concept, timed step by step, in turn."""

    peer: tuple[str, ...] = ("semantic.weight=0",)
    """key=value settings (concept/config.py) of the training that is compared with."""
    settings: tuple[str, ...] = ()
    """key=value settings of the training whose cost is asked for; none are its defaults."""
    base: str = "tiny"
    """ "tiny" is the embedded base; or a folder in diffusers' layout."""
    pairs: int = 6
    """Each pair is one run of both, in changing order."""
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
