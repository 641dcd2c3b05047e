"""What the base's training loops share: the walk over steps with its clock and checkpoints, averages, data loading."""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import imageio.v3 as iio
import numpy as np
import torch
from torch import Tensor, nn

from cdvideo.runs import atomic_path
from cdvideo.world.config import LoopConfig
from cdvideo.world.dataset import progress

M = TypeVar("M", bound=nn.Module)

CHECKPOINT_SECONDS = 60.0
MEASURE_FROM, MEASURE_UNTIL = 20, 80  # steps over which --fit measures the speed, compilation left out


@dataclass(frozen=True)
class Limits:
    """How long one call may train.

    seconds: wall-clock budget of this stage in this call, None for no limit.
    fit: choose the number of steps so that the budget's end is the schedule's end.
    quiet: no progress bar.
    """

    seconds: float | None = None
    fit: bool = False
    quiet: bool = False


def lr_factor(step: int, *, steps: int, warmup: int, decay: float) -> float:
    """Warm-up, plateau and a linear fall to zero over the last ``decay`` of the steps (arXiv 2405.18392).

    On the plateau the factor does not depend on ``steps``, so the end may be moved while training.
    """
    rise = (step + 1) / warmup
    fall = (steps - step) / (decay * steps) if decay > 0 else 1.0
    return min(1.0, rise, fall)


class Stage:
    """The walk of one training loop: ``for step in stage.steps(): ...``, resumable exactly.

    Everything that changes while training is in ``parts`` (modules and optimizers), the generator, and the step; it is
    written to folder/state.pt every minute and at the end, and read back by the constructor.
    """

    def __init__(
        self,
        folder: Path,
        *,
        loop: LoopConfig,
        models: Mapping[str, nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        generator: torch.Generator,
        limits: Limits,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.loop, self.limits = folder, loop, limits
        self.optimizers, self.generator = list(optimizers), generator
        self.parts: dict[str, Any] = {**models, **{f"optimizer{i}": o for i, o in enumerate(optimizers)}}
        self.step, self.total, self.seconds = 0, loop.steps, 0.0
        self._started = time.monotonic()
        self._shown: dict[str, float] = {}
        if self.state_file.exists():
            self._load()

    @property
    def state_file(self) -> Path:
        return self.folder / "state.pt"

    @property
    def done(self) -> bool:
        return self.step >= self.total

    def steps(self) -> Iterator[int]:
        """Yields the step numbers that are left, sets the learning rates, keeps the clock, writes checkpoints."""
        before, last_save, measured = self.seconds, time.monotonic(), 0.0
        first = self.step
        with progress(self.folder.name, self.total, done=self.step, quiet=self.limits.quiet) as bar:
            while not self.done and not self._out_of_time():
                if self.limits.fit and self.step == first + MEASURE_FROM:
                    measured = self._now()
                if self.limits.fit and self.step == first + MEASURE_UNTIL:
                    self._fit((self._now() - measured) / (MEASURE_UNTIL - MEASURE_FROM))
                    bar.total = self.total
                self._set_learning_rates()
                yield self.step
                self.step += 1
                self.seconds = before + time.monotonic() - self._started
                bar.update()
                if self.step % self.loop.log_every == 0:
                    bar.set_postfix(self._shown, refresh=False)
                if time.monotonic() - last_save > CHECKPOINT_SECONDS:
                    self.save()
                    last_save = time.monotonic()
        self.save()

    def log(self, **metrics: float | Tensor) -> None:
        """Appends step, seconds and metrics to folder/metrics.jsonl every ``log_every`` steps, the first and the last.

        Raises:
            FloatingPointError: a metric is not finite.
        """
        if self.step % self.loop.log_every and self.step != self.total - 1:
            return
        values = {name: float(value) for name, value in metrics.items()}
        if not all(np.isfinite(value) for value in values.values()):
            raise FloatingPointError(f"{self.folder.name}, step {self.step}: {values}")
        self._shown = values
        line = {"step": self.step, "seconds": round(self.seconds, 1), **values}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def facts(self) -> dict[str, str | int | float]:
        """How long and on what it was trained, for the record that goes with the weights."""
        device = self.generator.device
        return {
            "steps": self.step,
            "of": self.total,
            "batch": self.loop.batch,
            "seconds": round(self.seconds, 1),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }

    @property
    def wants_samples(self) -> bool:
        return (self.step + 1) % self.loop.sample_every == 0 or self.step + 1 == self.total

    def save(self) -> None:
        """Writes the whole state, atomically."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"generator": self.generator.get_state()}
        state |= {"step": self.step, "total": self.total, "configured": self.loop.steps, "seconds": self.seconds}
        with atomic_path(self.state_file) as part:
            torch.save(state, part)

    def _load(self) -> None:
        state = torch.load(self.state_file, weights_only=True, map_location=self.generator.device)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.generator.set_state(state["generator"].cpu())
        self.step, self.seconds = state["step"], state["seconds"]
        # An end that --fit chose holds until the config asks for another one.
        self.total = state["total"] if state["configured"] == self.loop.steps else self.loop.steps
        print(f"{self.folder.name}: resumed at step {self.step} of {self.total}")

    def _out_of_time(self) -> bool:
        allowance = 1.1 if self.limits.fit else 1.0  # a fitted schedule should reach its end, if need be a little late
        return self.limits.seconds is not None and time.monotonic() - self._started > allowance * self.limits.seconds

    def _now(self) -> float:
        if self.generator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    def _fit(self, step_seconds: float) -> None:
        assert self.limits.seconds is not None, "--fit needs --minutes"
        left = self.limits.seconds - (time.monotonic() - self._started)
        self.total = self.step + max(1, int(0.94 * left / step_seconds))
        print(f"{self.folder.name}: {1000 * step_seconds:.1f} ms a step, so {self.total} steps in all")

    def _set_learning_rates(self) -> None:
        factor = lr_factor(self.step, steps=self.total, warmup=self.loop.warmup, decay=self.loop.decay)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.loop.lr * factor


class Average(Generic[M]):
    """Exponential moving average of a model's weights, held in a frozen copy, ``model``."""

    def __init__(self, trained: M, *, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(trained).eval().requires_grad_(False)
        self._own: list[Tensor] = list(self.model.parameters())
        self._trained: list[Tensor] = list(trained.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the trained weights in; early steps weigh more, as min(decay, (1 + step) / (10 + step))."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._own, self._trained, 1 - decay)


def load_array(file: Path, device: torch.device) -> Tensor:
    """A .npy file as a tensor: wholly on a CUDA device, memory-mapped (never written back) on the CPU."""
    array = np.load(file, mmap_mode="c")
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    out = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    for start in range(0, len(tensor), 4096):
        out[start : start + 4096] = tensor[start : start + 4096].to(device)
    return out


def to_pixels(images_BHWC: Tensor) -> Tensor:
    """uint8 pictures to float32 pixels_BCHW in [-1, 1], channels last in memory."""
    return images_BHWC.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """bf16 autocast, or none where the config asks for fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bf16")


def save_grid(pixels_BCHW: Tensor, file: Path, *, columns: int) -> None:
    """Writes pixels in [-1, 1] as one PNG, ``columns`` pictures a row."""
    images = ((pixels_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    grid = np.zeros((rows * height, columns * width, channels), dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * height, i % columns * width
        grid[top : top + height, left : left + width] = image
    file.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(file, grid)
