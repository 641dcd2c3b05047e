"""Settings of the identity encoder's training (imports no torch)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cdvideo.config import check
from cdvideo.world.config import LoopConfig


def _identity_loop() -> LoopConfig:
    return LoopConfig(steps=480, batch=128, lr=1e-3, warmup=30, decay=0.7, ema=0.99, log_every=20)


@dataclass(frozen=True, kw_only=True, slots=True)
class IdentityConfig:
    """How the identity encoder is trained."""

    seed: int = 30_011
    """Of its own renders; another one than those of the base's and the judge's training."""
    pairs: int = 2_400
    """Pairs of look-alikes to train on."""
    check_pairs: int = 160
    """Pairs never trained on, to measure on."""
    views: int = 5
    """Stills of each individual: each wears something else somewhere else."""
    heldout_views: int = 12
    """Stills of each individual held out for concepts and of its look-alike, to measure on."""
    out: Path = Path(".cache/identity")
    """Training state, metrics, and the encoder."""
    cache: Path = Path(".cache/identity-world")
    """Its rendered stills."""
    start: Path | None = field(default_factory=lambda: Path(__file__).parents[1] / "judge")
    """The judge whose first stages it starts from; null starts from random weights."""
    vae: Path | None = None
    """The base's VAE, for round trips as augmentation and for measuring; null does without."""
    widths: tuple[int, int, int, int] = (32, 64, 128, 96)
    """Channels at a half, a quarter, an eighth and a sixteenth of the picture's side."""
    blocks: tuple[int, int, int, int] = (1, 2, 2, 0)
    """Residual blocks at each of these."""
    width: int = 128
    """Of the feature."""
    side: int = 128
    """Pixels to which pictures are brought."""
    classes: int = 4
    """Subjects in one batch: fewer make more look-alikes meet."""
    temperature: float = 0.1
    """Of the contrastive loss."""
    colour: float = 0.2
    """Strength of the colour shift, of the judge's: colour tells individuals apart."""
    vae_share: float = 0.1
    """Part of the training pictures that goes through the VAE."""
    workers: int = 0
    """Processes that render; 0 takes all cores."""
    device: str = "auto"
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Precision of autocast; weights stay fp32 in training."""
    loop: LoopConfig = field(default_factory=_identity_loop)
    """Its batch is a number of pictures: two views of both individuals of each pair."""

    def __post_init__(self) -> None:
        batch = self.loop.batch
        check(
            (self.seed >= 1, f"seed={self.seed}: must be at least 1"),
            (self.pairs >= 1, f"pairs={self.pairs}: must be at least 1"),
            (self.check_pairs >= 2, f"check_pairs={self.check_pairs}: must be at least 2"),
            (self.views >= 2, f"views={self.views}: must be at least 2"),
            (self.heldout_views >= 2, f"heldout_views={self.heldout_views}: must be at least 2"),
            (all(width >= 1 for width in self.widths), f"widths={self.widths}: must be at least 1"),
            (all(count >= 0 for count in self.blocks), f"blocks={self.blocks}: must be at least 0"),
            (self.width >= 2, f"width={self.width}: must be at least 2"),
            (self.side >= 16 and self.side % 16 == 0, f"side={self.side}: must be a multiple of 16"),
            (self.classes >= 1, f"classes={self.classes}: must be at least 1"),
            (self.temperature > 0, f"temperature={self.temperature:g}: must be above 0"),
            (0 <= self.colour <= 1, f"colour={self.colour:g}: must be 0 to 1"),
            (0 <= self.vae_share <= 1, f"vae_share={self.vae_share:g}: must be 0 to 1"),
            (self.workers >= 0, f"workers={self.workers}: must be at least 0"),
            (batch >= 8 and batch % 4 == 0, f"loop.batch={batch}: must be a multiple of 4, at least 8"),
        )
