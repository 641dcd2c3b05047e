"""Benchmarks: what is timed stands against its peer, both in one process, in turn. Ratios, never bare seconds."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from threading import Semaphore
from typing import Any

import numpy as np
import torch

from cdvideo.base.loader import Base, load_base
from cdvideo.concept.concept import library_versions
from cdvideo.concept.config import ConceptConfig
from cdvideo.concept.drift import ATTENTION_EVERY, TEXT_EVERY
from cdvideo.concept.trainer import train_concept
from cdvideo.device import pick_dtype, use_device
from cdvideo.evaluation.benchmark_config import TrainingStepConfig
from cdvideo.media.images import Picture
from cdvideo.runs import Run, atomic_path, create_run

WARM_UP = 8  # steps of a run that do not count


def training_step(config: TrainingStepConfig, pictures: Sequence[Picture]) -> dict[str, Any]:
    """Seconds of a training step and of its peer's, and their ratio, pair by pair; written into config.out.

    The two trainings of a pair take their steps in turn, so that a slow minute of the machine falls on both, each in a
    process of its own. Steps that also measure drift are left out: both trainings measure alike.
    """
    device = use_device(config.device)
    base = load_base(config.base, device=device, dtype=pick_dtype(config.dtype, device))
    sides = {"asked": config.concept_config(config.settings), "peer": config.concept_config(config.peer)}
    found: dict[str, list[float]] = {name: [] for name in sides}
    ratios = []
    spawn = get_context("spawn")  # CUDA does not survive a fork
    with spawn.Manager() as manager, ProcessPoolExecutor(len(sides), mp_context=spawn) as pool:
        for pair in range(config.pairs):
            order = list(sides)[:: -1 if pair % 2 else 1]
            first, second = manager.Semaphore(1), manager.Semaphore(0)
            trainings = {
                name: pool.submit(step_seconds, config.base, device, base.dtype, pictures, sides[name], *turns)
                for name, turns in zip(order, [(first, second), (second, first)], strict=True)
            }
            seconds = {name: training.result() for name, training in trainings.items()}
            ratios.append(float(np.median(np.divide(seconds["asked"], seconds["peer"]))))
            for name in sides:
                found[name].append(float(np.median(seconds[name])))
    result = {
        "settings": list(config.settings),
        "peer": list(config.peer),
        "seconds": {name: round(float(np.median(seconds)), 5) for name, seconds in found.items()},
        "ratio": round(float(np.median(ratios)), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "pairs": config.pairs,
        "steps": config.steps,
        "batch": sides["asked"].optim.batch_size,
    } | surroundings(base)
    with atomic_path(config.out / "results-training-step.json") as part:
        part.write_text(json.dumps(result, indent=2) + "\n")
    return result


@dataclass(frozen=True)
class TimedRun(Run):
    """A run that times its training's steps; the pause between two of them is not timed."""

    pause: Callable[[], None] = lambda: None
    begins: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)

    def log(self, metrics: Mapping[str, float | int | str]) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        Run.log(self, metrics)
        self.pause()
        self.begins.append(time.perf_counter())


def step_seconds(
    base_name: str,
    device: torch.device,
    dtype: torch.dtype,
    pictures: Sequence[Picture],
    config: ConceptConfig,
    own_turn: Semaphore,
    other_turn: Semaphore,
) -> list[float]:
    """Seconds of each step of one training that counts; it waits for its turn before each."""

    def let_the_other_go() -> None:
        other_turn.release()
        own_turn.acquire()

    try:
        base = load_base(base_name, device=device, dtype=dtype)
        own_turn.acquire()
        with tempfile.TemporaryDirectory() as folder, create_run(Path(folder), "timed") as run:
            timed = TimedRun(run.folder, run.lock, let_the_other_go)
            train_concept(base, pictures, config, timed, quiet=True)
    finally:
        for _ in range(config.steps + 2):  # the other goes on alone, also where this one failed
            other_turn.release()
    measured = np.gcd(TEXT_EVERY, ATTENTION_EVERY)
    counted = [step for step in range(WARM_UP + 1, config.steps) if step % measured]  # the last one measures too
    return [timed.ends[step] - timed.begins[step - 1] for step in counted]  # the first lines are step 0's


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
