"""What the rows of the GPU's benchmark measure on and with: a device, sizes, clocks and peaks."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from cdvideo.base.loader import Base
from cdvideo.cli import peak_memory_bytes
from cdvideo.device import pick_dtype, use_device
from cdvideo.evaluation.benchmark_random import random_sd15
from cdvideo.evaluation.sd15 import CONFIGS, SMALL, Configs
from cdvideo.motion.modules import MotionModules

Work = Callable[[], object]
T = TypeVar("T")


@dataclass
class Machine:
    """The device. `dry`: the CPU stands in for it, with small models. `found`: what later rows need of earlier ones."""

    device: torch.device
    dtype: torch.dtype
    dry: bool
    found: dict[str, float] = field(default_factory=dict)

    @property
    def where(self) -> str:
        name = platform.machine() if self.dry else torch.cuda.get_device_name(self.device)
        return f"{name}{', dry run at small sizes' if self.dry else ''}, torch {torch.__version__}"

    def pick(self, measured: T, *, dry: T) -> T:
        """One of two sizes: of what is measured, or of a dry run."""
        return dry if self.dry else measured

    @property
    def configs(self) -> Configs:
        return self.pick(CONFIGS, dry=SMALL)

    @property
    def frames(self) -> int:
        """Of a film."""
        return self.pick(16, dry=2)

    def models(self, dtype: torch.dtype | None = None) -> tuple[Base, MotionModules]:
        """New ones of random weights, made on the device."""
        return random_sd15(self.device, dtype or self.dtype, self.configs)

    def wait(self) -> None:
        """Until all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        """Gives back what torch keeps of the device's memory without need."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def timed(self, work: Callable[[], T]) -> tuple[T, float]:
        """What one call gives, and its seconds."""
        self.wait()
        start = time.perf_counter()
        given = work()
        self.wait()
        return given, time.perf_counter() - start

    def usual_seconds(self, work: Work, *, at_once: int = 1) -> float:
        """Median of five calls after two that do not count. `at_once`: calls between two looks at the clock."""

        def several() -> None:
            for _ in range(at_once):
                work()

        for _ in range(self.pick(2, dry=0)):
            several()
        return float(np.median([self.timed(several)[1] for _ in range(self.pick(5, dry=1))])) / at_once

    def begin_peak(self) -> None:
        """Lets the peak of memory begin anew."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Bytes of tensors held at the most since `begin_peak`; on the CPU of the whole process."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else peak_memory_bytes()

    def share(self, flops: float, seconds: float) -> float | None:
        """Of the matrix products' measured peak; None where that was not measured."""
        peak = self.found.get("flops a second")
        return None if peak is None else round(flops / seconds / peak, 4)


@dataclass(frozen=True)
class Row:
    """One row of the table. `seconds`: how long it is expected to take on an H100."""

    name: str
    seconds: float
    measure: Callable[[Machine], Mapping[str, Any]]


def open_machine(*, dry: bool) -> Machine:
    """Raises UserError: no GPU, and no dry run."""
    if dry:
        return Machine(torch.device("cpu"), torch.float32, dry=True)
    device = use_device("cuda")
    return Machine(device, pick_dtype("auto", device), dry=False)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": float(np.median(values)), "min": float(min(values)), "max": float(max(values))}


def gigabytes(count: float) -> float:
    return round(count / 1e9, 3)


def weights_of(*modules: Any) -> int:
    """Bytes of the modules' parameters."""
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
