"""Peak memory of a training and of a film, measured, beside what was reckoned (sampling/memory.py)."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cdvideo.base.folder import HASHED_PARTS
from cdvideo.base.loader import Base, load_base
from cdvideo.base.memory import Needs, base_from_configs, total, weight_bytes
from cdvideo.cli import peak_memory_bytes
from cdvideo.concept.config import ConceptConfig
from cdvideo.concept.trainer import train_concept
from cdvideo.device import pick_dtype, use_device
from cdvideo.errors import UserError
from cdvideo.evaluation.benchmark import TimedRun, surroundings
from cdvideo.evaluation.benchmark_config import MEMORY_RESULT, MemoryConfig
from cdvideo.evaluation.benchmark_films import RANDOM_SD15
from cdvideo.evaluation.benchmark_random import random_sd15
from cdvideo.evaluation.sd15 import write_configs
from cdvideo.media.images import Picture
from cdvideo.motion.modules import MotionModules
from cdvideo.runs import atomic_path, create_run
from cdvideo.sampling.config import AnimateConfig
from cdvideo.sampling.memory import GUIDED, film_needs, training_needs
from cdvideo.sampling.video import sample_video

CLEAR_REFS = Path("/proc/self/clear_refs")
SKIPPED = 2  # steps at the beginning, in which kernels are chosen and memory is taken


def measure_memory(config: MemoryConfig, concept: ConceptConfig, pictures: Sequence[Picture]) -> dict[str, Any]:
    """Measures, and writes config.out / MEMORY_RESULT."""
    device = use_device(config.device)
    if device.type == "cpu" and not CLEAR_REFS.exists():
        raise UserError(
            f"measuring on the CPU under {platform.system()}",
            allowed="CUDA, or the CPU under Linux, which tells a process's peak",
            do="choose a GPU with --device cuda",
        )
    dtype = pick_dtype(config.dtype, device)
    on_gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        name = config.base
        if name == RANDOM_SD15:
            name = str(Path(folder) / name)
            write_configs(Path(name))
        outline = base_from_configs(name, dtype=dtype)
        assert outline is not None, "a base that can not be reckoned with"
        if config.base == RANDOM_SD15:
            base, _ = random_sd15(device, dtype)
        else:
            base = load_base(name, device=device, dtype=dtype)
        rest(base, ("vae",))
        result: dict[str, Any] = {
            "training": measure_training(base, pictures, concept, training_needs(outline, concept, on_gpu=on_gpu))
        }
        if config.frames:
            film = AnimateConfig(
                prompt="a dog",
                frames=config.frames,
                steps=config.film_steps,
                width=config.resolution,
                height=config.resolution,
                offload=config.offload,
            )
            rest(base, HASHED_PARTS if config.offload else ())
            needs = film_needs(outline, film, offload=config.offload and on_gpu)
            result["film"] = _film(base, film, needs)
    result |= {"resolution": config.resolution or base.resolution, "batch": concept.optim.batch_size}
    result |= {"frames": config.frames, "offload": config.offload, "settings": list(config.settings)}
    result |= surroundings(base)
    with atomic_path(config.out / MEMORY_RESULT) as part:
        part.write_text(json.dumps(result, indent=2) + "\n")
    return result


def _peak(device: torch.device, standing: int, work: Callable[[], None], needs: Needs) -> dict[str, Any]:
    """The most bytes taken while working, and the estimate.

    On CUDA, what torch has reserved of the card. On the CPU, by how much the process has grown beyond what it was with
    the weights there, and these.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        work()
        peak, what = torch.cuda.max_memory_reserved(device), "reserved on the GPU"
        allocated = torch.cuda.max_memory_allocated(device)
    else:
        before = _resident_bytes()
        CLEAR_REFS.write_text("5")  # the peak starts anew
        work()
        peak = allocated = standing + peak_memory_bytes() - before
        what = "weights and growth of the process"
    phases = {"phases": {phase: int(size) for phase, size in needs.items()}}
    return {"peak": peak, "allocated": allocated, "what": what, "estimate": total(needs), **phases}


def _resident_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def rest(base: Base, parts: Sequence[str]) -> None:
    """Lets these parts of a base rest in the computer's memory, and no others."""
    for part in HASHED_PARTS:
        torch.nn.Module.to(getattr(base, part), torch.device("cpu") if part in parts else base.device)


def measure_training(base: Base, pictures: Sequence[Picture], config: ConceptConfig, needs: Needs) -> dict[str, Any]:
    """The peak of learning a concept beside what was reckoned, and the seconds of a step."""
    times: list[float] = []

    def train() -> None:
        with tempfile.TemporaryDirectory() as folder, create_run(Path(folder), "timed") as run:
            timed = TimedRun(run.folder, run.lock)
            train_concept(base, pictures, config, timed, quiet=True)
            times.extend(timed.ends)

    standing = weight_bytes(base.unet, base.vae, base.text_encoder)
    return {**_peak(base.device, standing, train, needs), "seconds_a_step": _median_gap(times)}


def _film(base: Base, config: AnimateConfig, needs: Needs) -> dict[str, Any]:
    motion = MotionModules.for_unet(base.unet, motion_num_attention_heads=1).to(base.dtype).eval().requires_grad_(False)
    motion.to(base.unet.device)
    times: list[float] = []

    def note(*_: object) -> None:
        if base.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    def film() -> None:
        options: dict[str, Any] = {"steps": config.steps, "guidance": GUIDED, "frames": config.frames}
        size: dict[str, Any] = {"width": config.width, "height": config.height}
        sample_video(base, motion, config.prompt, seed=0, decode_chunk=config.decode_chunk, **size, **options)

    standing = weight_bytes(base.unet, base.vae, base.text_encoder, motion)
    hook = base.unet.conv_in.register_forward_pre_hook(note)
    try:
        return {**_peak(base.device, standing, film, needs), "seconds_a_step": _median_gap(times)}
    finally:
        hook.remove()


def _median_gap(times: Sequence[float]) -> float:
    return float(np.median(np.diff(times)[SKIPPED:]))
