"""Settings of the judge's training and of the base's report (imports no torch)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cdvideo.config import check
from cdvideo.world.config import LoopConfig
from cdvideo.world.heldout import HELDOUT_TRIPLES


def _judge_loop() -> LoopConfig:
    return LoopConfig(steps=7000, batch=512, lr=2e-3, warmup=200, decay=0.6, ema=0.998, log_every=50)


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeConfig:
    """How the judge is trained."""

    seed: int = 20_011
    """Of its own renders; another one than that of the base's training."""
    scenes: int = 80_000
    """Stills to train on, of all triples, those held out from the base included."""
    check_scenes: int = 8_192
    """Stills never trained on: the first half sets the temperatures, the second half is measured on."""
    out: Path = Path(".cache/judge")
    """Training state, metrics, and the judge."""
    cache: Path = Path(".cache/judge-world")
    """Its rendered stills."""
    vae: Path | None = None
    """The base's VAE, for round trips as augmentation and for measuring; null does without."""
    widths: tuple[int, int, int, int] = (32, 64, 128, 160)
    """Channels at a half, a quarter, an eighth and a sixteenth of the picture's side."""
    blocks: tuple[int, int, int, int] = (1, 2, 2, 1)
    """Residual blocks at each of these."""
    side: int = 128
    """Pixels to which pictures are brought."""
    label_smoothing: float = 0.05
    vae_share: float = 0.3
    """Part of the training pictures that goes through the VAE."""
    workers: int = 0
    """Processes that render; 0 takes all cores."""
    device: str = "auto"
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Precision of autocast; weights stay fp32 in training."""
    loop: LoopConfig = field(default_factory=_judge_loop)

    def __post_init__(self) -> None:
        check(
            (self.seed >= 1, f"seed={self.seed}: must be at least 1"),
            (self.scenes >= 1, f"scenes={self.scenes}: must be at least 1"),
            (self.check_scenes >= 2, f"check_scenes={self.check_scenes}: must be at least 2"),
            (all(width >= 1 for width in self.widths), f"widths={self.widths}: must be at least 1"),
            (all(count >= 0 for count in self.blocks), f"blocks={self.blocks}: must be at least 0"),
            (self.side >= 16 and self.side % 16 == 0, f"side={self.side}: must be a multiple of 16"),
            (0 <= self.label_smoothing < 1, f"label_smoothing={self.label_smoothing}: must be 0 to below 1"),
            (0 <= self.vae_share <= 1, f"vae_share={self.vae_share}: must be 0 to 1"),
            (self.workers >= 0, f"workers={self.workers}: must be at least 0"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """What is measured of a base, and on how much."""

    seed: int = 1
    """Of the choice of prompts, scenes and clips."""
    base: str = "tiny"
    """ "tiny" is the embedded base; or a folder in diffusers' layout with a folder `motion`."""
    judge: Path | None = None
    """The judge's folder; null is the one that ships."""
    sprites: Path = Path(".sprites")
    """The world's drawings, for real pictures and clips."""
    out: Path = Path("runs/evaluation")
    """Pictures made so far, the results and the page."""
    json: Path | None = None
    """Another place for the results as JSON, beside out/results.json."""
    prompts: int = 300
    """Triples that the base was trained on, and as many that were held out from it."""
    seeds: int = 2
    """Pictures for each prompt."""
    films: int = 100
    """Held-out triples that are filmed; 0 leaves films out."""
    frames: int = 16
    clips: int = 2
    """Real clips of each filmed triple, to compare with."""
    scenes: int = 1000
    """Real stills of held-out triples, for the autoencoder."""
    judge_scenes: int = 4096
    """Real stills of all triples, to check the judge on."""
    speed_runs: int = 3
    """Timed calls of animate.py on two cores; 0 leaves them out."""
    steps: int = 25
    guidance: float = 6.0
    batch: int = 0
    """Pictures drawn at once; 0 takes 16 on a CPU and 150 on a GPU."""
    device: str = "auto"
    dtype: str = "auto"
    resume: bool = False
    """Go on with the pictures that an interrupted call left in `out`."""
    quiet: bool = False

    def __post_init__(self) -> None:
        heldout = len(HELDOUT_TRIPLES)
        check(
            (self.seed >= 0, f"seed={self.seed}: must be at least 0"),
            (1 <= self.prompts <= heldout, f"prompts={self.prompts}: must be from 1 to {heldout}, all held-out ones"),
            (self.seeds >= 1, f"seeds={self.seeds}: must be at least 1"),
            (0 <= self.films <= heldout, f"films={self.films}: must be from 0 to {heldout}, all held-out ones"),
            (self.frames >= 2, f"frames={self.frames}: must be at least 2, since films are measured by their motion"),
            (self.clips >= 1, f"clips={self.clips}: must be at least 1"),
            (self.scenes >= 1, f"scenes={self.scenes}: must be at least 1"),
            (self.judge_scenes >= 1, f"judge_scenes={self.judge_scenes}: must be at least 1"),
            (self.speed_runs >= 0, f"speed_runs={self.speed_runs}: must be at least 0"),
            (1 <= self.steps <= 1000, f"steps={self.steps}: must be from 1 to 1000"),
            (1 <= self.guidance <= 30, f"guidance={self.guidance:g}: must be from 1 (off) to 30"),
            (self.batch >= 0, f"batch={self.batch}: must be at least 0"),
        )
