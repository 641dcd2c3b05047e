"""Benchmarks: what is timed stands against its peer, both in one process, in turn. Ratios, never bare seconds."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cdvideo.base.loader import Base, load_base
from cdvideo.concept.concept import library_versions
from cdvideo.concept.config import ConceptConfig
from cdvideo.concept.drift import ATTENTION_EVERY, TEXT_EVERY
from cdvideo.concept.trainer import train_concept
from cdvideo.device import pick_device, pick_dtype
from cdvideo.evaluation.benchmark_config import TrainingStepConfig
from cdvideo.media.images import Picture
from cdvideo.runs import Run, atomic_path, create_run

WARM_UP = 8  # steps of a run that do not count


def training_step(config: TrainingStepConfig, pictures: Sequence[Picture]) -> dict[str, Any]:
    """Seconds of a training step and of its peer's, and their ratio, pair by pair; written into config.out.

    Steps that also measure drift are left out: both trainings measure alike.
    """
    device = pick_device(config.device)
    base = load_base(config.base, device=device, dtype=pick_dtype(config.dtype, device))
    sides = {"asked": config.concept_config(config.settings), "peer": config.concept_config(config.peer)}
    step_seconds(base, pictures, sides["peer"])  # kernels are chosen and memory is taken once
    found: dict[str, list[float]] = {name: [] for name in sides}
    for pair in range(config.pairs):
        for name in list(sides)[:: 1 if pair % 2 else -1]:
            found[name].append(float(np.median(step_seconds(base, pictures, sides[name]))))
    ratios = np.array(found["asked"]) / np.array(found["peer"])
    result = {
        "settings": list(config.settings),
        "peer": list(config.peer),
        "seconds": {name: round(float(np.median(seconds)), 5) for name, seconds in found.items()},
        "ratio": round(float(np.median(ratios)), 4),
        "ratios": [round(float(ratio), 4) for ratio in ratios],
        "pairs": config.pairs,
        "steps": config.steps,
        "batch": sides["asked"].optim.batch_size,
    } | surroundings(base)
    with atomic_path(config.out / "results-training-step.json") as part:
        part.write_text(json.dumps(result, indent=2) + "\n")
    return result


@dataclass(frozen=True)
class TimedRun(Run):
    """A run that notes when each of its lines was logged."""

    times: list[float] = field(default_factory=list)

    def log(self, metrics: Mapping[str, float | int | str]) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        Run.log(self, metrics)


def step_seconds(base: Base, pictures: Sequence[Picture], config: ConceptConfig) -> list[float]:
    """Seconds of each step of one training that counts."""
    with tempfile.TemporaryDirectory() as folder, create_run(Path(folder), "timed") as run:
        timed = TimedRun(run.folder, run.lock)
        train_concept(base, pictures, config, timed, quiet=True)
        seconds = np.diff(timed.times)  # the first line is step 0's, before any step
    measured = np.gcd(TEXT_EVERY, ATTENTION_EVERY)
    steps = range(WARM_UP + 1, len(seconds))  # the last one measures too
    return [float(seconds[step - 1]) for step in steps if step % measured]


def surroundings(base: Base) -> dict[str, Any]:
    """With what and where it was timed; no paths."""
    cuda = base.device.type == "cuda"
    return {
        "base": Path(base.name).name,
        "base_hash": base.hash,
        "device": torch.cuda.get_device_name(base.device) if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(base.dtype).removeprefix("torch."),
        "versions": library_versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
