"""What the report measures with and writes into: the loaded models, the pictures shown, and looking at pictures."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cdvideo.base.loader import Base, load_base
from cdvideo.device import pick_dtype, use_device
from cdvideo.errors import UserError
from cdvideo.evaluation.config import ReportConfig
from cdvideo.evaluation.drawing import Pictures, open_store
from cdvideo.evaluation.figures import Figure
from cdvideo.evaluation.judge.model import HEADS, JUDGE, Judge, Verdicts, label_indices, load_judge
from cdvideo.evaluation.prompts import Ask
from cdvideo.motion.files import load_motion
from cdvideo.motion.modules import MotionModules
from cdvideo.world.sprites import Sprites, load_sprites


@dataclass(frozen=True)
class Shown:
    """A picture (one frame) or a film for the page, with what was asked for and what the judge saw in most frames."""

    ask: Ask
    frames_FHWC: Pictures
    seen: tuple[str, str, str]
    right: bool


@dataclass
class Report:
    """Figures, how often each class was right or how much it moves, pictures, and what it was all measured with."""

    figures: list[Figure] = field(default_factory=list)
    tables: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    sheet: list[Shown] = field(default_factory=list)
    films: list[Shown] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """What the parts of the report measure with."""

    config: ReportConfig
    base: Base
    motion: MotionModules | None
    judge: Judge
    sprites: Sprites
    store: Path

    def look(self, images_BHWC: Pictures) -> Verdicts:
        """The judge's verdicts on uint8 pictures."""
        return self.judge.judge(to_pixels(images_BHWC))


def open_bench(config: ReportConfig) -> Bench:
    """Loads all that is needed, so that what is missing is told before anything is drawn."""
    device = use_device(config.device)
    base = load_base(config.base, device=device, dtype=pick_dtype(config.dtype, device))
    judge = load_judge(config.judge or JUDGE, device=device)
    sprites = load_sprites(config.sprites)
    motion = None
    if config.films:
        if not (base.path / "motion").is_dir():
            raise UserError(
                f"base {config.base!r} has no motion modules of its own",
                allowed="a base with a folder `motion`",
                do="train them, or leave films out with films=0",
            )
        motion = load_motion(base.path / "motion", device=device, dtype=base.dtype)
    kept = ("seed", "prompts", "seeds", "frames", "steps", "guidance")
    drawn_with = {name: getattr(config, name) for name in kept} | {"base": base.hash, "dtype": str(base.dtype)}
    if motion is not None:
        drawn_with["motion_sum"] = sum(float(p.double().abs().sum()) for p in motion.parameters())
    store = open_store(config.out / "pictures", drawn_with, resume=config.resume)
    return Bench(config, base, motion, judge, sprites, store)


def describe(bench: Bench) -> dict[str, Any]:
    """With what the report was made; no paths, since reports travel."""
    config, device = bench.config, bench.base.device
    counts = ("seed", "prompts", "seeds", "films", "frames", "clips", "scenes", "judge_scenes", "steps", "guidance")
    return {name: getattr(config, name) for name in counts} | {
        "base": Path(config.base).name,
        "base_hash": bench.base.hash,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "dtype": str(bench.base.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def right_heads(verdicts: Verdicts, wanted: Sequence[tuple[str, str, str]]) -> NDArray[np.bool_]:
    """Which heads name what was wanted: right_BH."""
    wanted_BH = torch.tensor([label_indices(dict(zip(HEADS, triple, strict=True))) for triple in wanted])
    return (verdicts.labels_BH == wanted_BH).numpy()


def all_heads(right_BH: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which pictures are right in all three: right_B."""
    return np.logical_and.reduce(right_BH, axis=1)


def to_pixels(images_BHWC: Pictures) -> Tensor:
    """uint8 pictures to pixels_BCHW in [-1, 1]."""
    return torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1


def fit(image_HWC: Pictures, side: int) -> Pictures:
    """A square picture at another size; as it is where it has that size."""
    if image_HWC.shape[0] == side:
        return image_HWC
    return np.asarray(Image.fromarray(image_HWC).resize((side, side), Image.Resampling.BOX))
