"""One side of a benchmark in a process of its own: python -m cdvideo.evaluation.benchmark_side SIDE FILM.

FILM is JSON with the fields of `Film`, or of `FilmBatch` for the sides that make several. The process loads the side,
answers with a line of JSON, and then answers each line that it reads: {"do": "run", "seed": N, "save": PATH} makes a
film, {"do": "count", "seed": N} makes one and counts its operations. What goes wrong is an answer too: {"error": ...}.

A process of its own gives each side its own peak of memory. Both sides stay loaded, so that runs can alternate. Only
our sides tell glibc to keep freed memory (cdvideo/cpu.py): that belongs to what is measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from cdvideo.base.loader import Base, load_base
from cdvideo.cli import peak_memory_bytes
from cdvideo.concept.concept import Concept, library_versions
from cdvideo.concept.file import SAMPLE_CONCEPT
from cdvideo.concept.kv import kv_projections
from cdvideo.cpu import keep_freed_memory
from cdvideo.device import pick_dtype, use_device
from cdvideo.errors import UserError
from cdvideo.evaluation import benchmark_peer
from cdvideo.evaluation.benchmark_films import RANDOM_SD15, SPEEDS, Film, FilmBatch
from cdvideo.evaluation.benchmark_peer import Run
from cdvideo.evaluation.benchmark_random import random_sd15
from cdvideo.interchange.load import load_adapters
from cdvideo.motion.files import load_motion
from cdvideo.motion.modules import MotionModules
from cdvideo.sampling.denoise import draw_noise, latent_size
from cdvideo.sampling.options import FilmSettings
from cdvideo.sampling.speed import EXACT, PRESETS
from cdvideo.sampling.video import Film as VideoFilm
from cdvideo.sampling.video import decode_frames, sample_latents, sample_video

Answer = dict[str, Any]


def ours(film: Film, speed: str) -> Run:
    """sample_video with a preset, its motion modules normalising as diffusers' do."""
    switches = dataclasses.replace(EXACT, compiled=True) if speed == "compiled" else PRESETS[speed]
    keep_freed_memory()
    base, motion = load_ours(film)

    def run(seed: int) -> Any:
        return sample_video(
            base,
            motion,
            film.prompt,
            seed=seed,
            frames=film.frames,
            steps=film.steps,
            guidance=film.guidance,
            width=film.width,
            height=film.height,
            speed=switches,
        )

    return run


def several(batch: FilmBatch, *, concepts: bool, at_once: bool) -> Run:
    """latents_BFCHW of films, each of its own concept or all of the first, in one batch or one film after the other."""
    keep_freed_memory()
    base, motion = load_ours(batch)
    loaded = load_concepts(base, batch, count=batch.films if concepts else 1)
    settings = FilmSettings(
        frames=batch.frames, steps=batch.steps, guidance=batch.guidance, width=batch.width, height=batch.height
    )

    def run(seed: int) -> Any:
        films = [
            VideoFilm(prompt=_fill_in(batch.prompt, concept), seed=seed + index, concept=concept)
            for index, concept in enumerate(loaded if concepts else loaded * batch.films)
        ]
        latents = sample_latents(base, motion, films, settings, batch=batch.films if at_once else 1)
        return np.stack([latents_FCHW.float().cpu().numpy() for latents_FCHW in latents])

    return run


def load_concepts(base: Base, batch: FilmBatch, *, count: int) -> list[Concept]:
    """The first concepts of a batch, no more of them in memory than asked for."""
    if batch.concepts:
        return [load_adapters(base, [(Path(name).expanduser(), 1.0)]) for name in batch.concepts[:count]]
    sample = load_adapters(base, [(SAMPLE_CONCEPT, 1.0)])
    return [another_concept(base, sample, seed=index) for index in range(count)]


def another_concept(base: Base, sample: Concept, *, seed: int) -> Concept:
    """A concept of K and V by chance: Gaussian noise on the sample's rows, and changes as large as learned ones."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return like.detach().float().std() * torch.randn(like.shape, generator=generator).to(like.device)

    return Concept(
        tokens={token: rows_KD + 0.5 * noise(rows_KD) for token, rows_KD in sample.tokens.items()},
        weights={name: 0.08 * noise(linear.weight) for name, linear in kv_projections(base.unet).items()},
        metadata=dataclasses.replace(sample.metadata, adapter="kv", adapter_settings={"keys": "tuned"}),
    )


def _fill_in(prompt: str, concept: Concept) -> str:
    words = [f"{token} {concept.metadata.class_words.get(token, '')}".strip() for token in concept.tokens]
    return prompt.replace("{concept}", " ".join(words))


def load_ours(film: Film) -> tuple[Base, MotionModules]:
    """The base and its motion modules, in diffusers' norm mode."""
    device = use_device(film.device)
    dtype = pick_dtype(film.dtype, device)
    if film.base == RANDOM_SD15:
        return random_sd15(device, dtype)
    base = load_base(film.base, device=device, dtype=dtype)
    return base, load_motion(base.path / "motion", device=device, dtype=dtype, norm_mode="diffusers")


def decode_ours(film: Film) -> Run:
    """Frames as sample_video decodes them."""
    keep_freed_memory()
    base, _ = load_ours(film)
    return lambda seed: decode_frames(base, latents_to_decode(base, film, seed))


def decode_peer(film: Film) -> Run:
    base, _ = load_ours(film)
    return lambda seed: benchmark_peer.decode(base.vae, latents_to_decode(base, film, seed))


def latents_to_decode(base: Base, film: Film, seed: int) -> Tensor:
    """latents_FCHW of unit variance."""
    channels = base.unet.config.in_channels
    noise_BFCHW = draw_noise([seed], (film.frames, channels, *latent_size(base, film.width, film.height)))
    return noise_BFCHW[0].to(base.device, base.dtype)


SIDES: dict[str, Callable[[Any], Run]] = {
    **{name: partial(ours, speed=name) for name in SPEEDS},
    "documented": benchmark_peer.documented,
    "best": benchmark_peer.best,
    "decode": decode_ours,
    "decode-diffusers": decode_peer,
}
BATCHES: dict[str, Callable[[Any], Run]] = {
    "one concept": partial(several, concepts=False, at_once=True),
    "many concepts": partial(several, concepts=True, at_once=True),
    "many concepts, one by one": partial(several, concepts=True, at_once=False),
}


def run_film(run: Run, save: str, seed: int) -> Answer:
    """Makes the film once: seconds, the most memory held while it was made, and the film in a file."""
    cuda = torch.cuda.is_initialized()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    before = _peak_begins()
    start = time.perf_counter()
    made = run(seed)
    seconds = time.perf_counter() - start  # it is on the host: nothing is left to wait for
    peak = peak_memory_bytes()
    np.save(save, made)
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "added_bytes": None if before is None else peak - before,
        # Reserved, not allocated: a CUDA graph holds its activations without asking for them again.
        "cuda_bytes": torch.cuda.max_memory_reserved() if cuda else None,
    }


def _peak_begins() -> int | None:
    """Lets the kernel forget the peak of memory so far (proc(5), clear_refs); returns the bytes held now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # another system than Linux, or not allowed: the peak of the whole process is told
        return None
    return peak_memory_bytes()


def count_operations(work: Callable[[], object]) -> Answer:
    """Floating-point operations as they are computed, two for each multiply-add; without compiling."""

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def linear(rows: Any, *_: Any, out_shape: Any, **__: Any) -> int:
        return 2 * math.prod(rows) * int(out_shape[-1])

    # torch's own table lacks the kernels of CPUs.
    formulas = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.mkldnn._linear_pointwise: linear,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter, torch.compiler.set_stance("force_eager"):
        work()
    return {"flops": counter.get_total_flops()}


def surroundings(film: Film) -> Answer:
    """With what and where the film is made."""
    device = use_device(film.device)
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "dtype": str(pick_dtype(film.dtype, device)).removeprefix("torch."),
        "versions": library_versions(),
    }


def _processor() -> str:
    """The processor's name, where Linux tells it, and what it computes bf16 with."""
    table = Path("/proc/cpuinfo")
    text = table.read_text(encoding="utf-8") if table.is_file() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    units = [unit for unit in ("amx_bf16", "avx512_bf16") if unit in text.split()]
    return " ".join([names[0] if names else platform.processor() or platform.machine(), *units])


def main(side: str, film: Film, answers: Any) -> None:
    """Answers every line of standard input."""

    def answer(work: Callable[[], Answer]) -> None:
        try:
            found = work()
        except UserError as error:
            found = {"error": error.given}
        except Exception as error:  # told to the process that asked, which decides what it means
            found = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
        print(json.dumps(found), file=answers, flush=True)

    start = time.perf_counter()
    runs: list[Run] = []

    def load() -> Answer:
        runs.append((SIDES | BATCHES)[side](film))
        return {"seconds": time.perf_counter() - start, "peak_bytes": peak_memory_bytes(), **surroundings(film)}

    answer(load)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "run":
            answer(partial(run_film, runs[0], asked["save"], asked["seed"]))
        else:
            answer(partial(count_operations, partial(runs[0], asked["seed"])))


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as private, contextlib.redirect_stdout(sys.stderr):
        os.dup2(2, 1)  # whatever a library prints must not stand among the answers
        asked_for = FilmBatch if sys.argv[1] in BATCHES else Film
        main(sys.argv[1], asked_for(**json.loads(sys.argv[2])), private)
