"""The rows of the GPU's benchmark that make films, and those of the kernels that films are made with."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cdvideo.attention import BACKENDS, by_sdpa, check_attention, check_backend
from cdvideo.base.loader import Base
from cdvideo.doctor import examine
from cdvideo.evaluation import benchmark_peer
from cdvideo.evaluation.benchmark_films import RANDOM_SD15
from cdvideo.evaluation.benchmark_films import Film as Asked
from cdvideo.evaluation.benchmark_side import count_operations
from cdvideo.evaluation.gpu_machine import Machine, Row, gigabytes, spread, weights_of
from cdvideo.evaluation.gpu_training import TRAINING_ROWS, WAN_ROWS, fp16_with_scaler
from cdvideo.motion.modules import MotionModules
from cdvideo.sampling.distance import film_psnr
from cdvideo.sampling.kernels import group_norm_by_sums
from cdvideo.sampling.options import FilmSettings
from cdvideo.sampling.speed import EXACT, PLAIN, Speed, switched_off
from cdvideo.sampling.video import Film, decode_frames, sample_latents

PROMPT = "a dog wearing headphones surfing"
PAIRS = 3


def doctor(machine: Machine) -> dict[str, Any]:
    """What the doctor finds. That is no failure: of what it misses, films and trainings need nothing."""
    findings = list(examine())
    for finding in findings:
        print(f"{finding.state:<8}  {finding.group:<10}  {finding.name:<24}  {finding.detail}")
    wrong = [f"{finding.name}: {finding.detail}" for finding in findings if finding.state in ("missing", "broken")]
    in_order = sum(finding.state == "ok" for finding in findings)
    xformers = next(finding for finding in findings if finding.name.startswith("xformers"))
    return {"in order": in_order, "wrong or missing": wrong or "nothing", "xformers": xformers.detail}


def rates(machine: Machine) -> dict[str, Any]:
    """How fast the device copies, and multiplies matrices."""
    numbers, side = machine.pick((2**30, 8192), dry=(2**20, 256))
    source = torch.empty(numbers, dtype=torch.bfloat16, device=machine.device).normal_()
    target = torch.empty_like(source)
    copying = machine.usual_seconds(partial(target.copy_, source))
    left, right = (torch.randn(side, side, device=machine.device).to(torch.bfloat16) for _ in range(2))
    multiplying = machine.usual_seconds(partial(torch.mm, left, right), at_once=10)
    machine.found["flops a second"] = 2 * side**3 / multiplying
    return {
        "copied, read and written, TB/s": 2 * 2 * numbers / copying / 1e12,
        f"{side}^3 bf16 products, TFLOP/s": machine.found["flops a second"] / 1e12,
    }


@dataclasses.dataclass(frozen=True)
class Ours:
    """Our sampler on a base."""

    machine: Machine
    base: Base
    motion: MotionModules

    @torch.inference_mode()
    def latents(self, seed: int, *, steps: int, frames: int | None = None, speed: Speed = EXACT) -> Tensor:
        settings = FilmSettings(frames=frames or self.machine.frames, steps=steps, speed=speed)
        (latents_FCHW,) = sample_latents(self.base, self.motion, [Film(prompt=PROMPT, seed=seed)], settings)
        return latents_FCHW


@dataclasses.dataclass(frozen=True)
class Peer:
    """diffusers' AnimateDiffPipeline on the same base, as it is documented."""

    machine: Machine
    pipeline: Any

    def latents(self, seed: int, *, steps: int) -> Tensor:
        asked = Asked(base=RANDOM_SD15, prompt=PROMPT, steps=steps, frames=self.machine.frames)
        latents_BCFHW: Tensor = benchmark_peer.call(self.pipeline, asked, seed, output_type="latent").frames
        return latents_BCFHW[0].transpose(0, 1)

    def frames(self, latents_FCHW: Tensor) -> Any:
        self.pipeline.vae.enable_slicing()
        try:
            return benchmark_peer.decode(self.pipeline.vae, latents_FCHW)
        finally:
            self.pipeline.vae.disable_slicing()  # the VAE is ours too


def film_exact(machine: Machine) -> dict[str, Any]:
    """Films of 16 frames of ours and of diffusers', in turn: seconds, memory, work, and how alike they are.

    Both sets of weights are on the device; those of the other side are taken off a side's peak.
    """
    steps, pairs = machine.pick((10, PAIRS), dry=(2, 1))
    base, motion = machine.models()
    ours, peer = Ours(machine, base, motion), Peer(machine, benchmark_peer.pipeline_on(base, motion))
    peer.pipeline.set_progress_bar_config(disable=True)
    sides: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Any], int]] = {
        "ours": (ours.latents, partial(decode_frames, base), weights_of(peer.pipeline.unet)),
        "diffusers": (peer.latents, peer.frames, weights_of(base.unet, motion)),
    }
    found: dict[str, dict[str, Any]] = {
        name: {"sampling": [], "decoding": [], "whole film": [], "peak": 0} for name in sides
    }
    films: dict[str, Any] = {}
    for turn in range(pairs + 1):  # the first does not count
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            sample, decode, others = sides[name]
            machine.begin_peak()
            made_FCHW, sampling = machine.timed(partial(sample, turn, steps=steps))
            peak = machine.peak() - others
            machine.begin_peak()
            films[name], decoding = machine.timed(partial(decode, made_FCHW))
            if turn:
                found[name]["sampling"].append(sampling)
                found[name]["decoding"].append(decoding)
                found[name]["whole film"].append(sampling + decoding)
                found[name]["peak"] = max(found[name]["peak"], peak)
                found[name]["peak decoding"] = machine.peak() - others
    result: dict[str, Any] = {"steps": steps, "dtype": str(machine.dtype).removeprefix("torch.")}
    ratios = {
        part: spread(np.divide(found["diffusers"][part], found["ours"][part]).tolist())
        for part in ("sampling", "decoding", "whole film")
    }
    for name, (sample, _, _) in sides.items():
        flops = steps * count_operations(partial(sample, 0, steps=1))["flops"]
        seconds = float(np.median(found[name]["sampling"]))
        result[name] = {f"{part} s": spread(found[name][part]) for part in ratios} | {
            "peak sampling GB": gigabytes(found[name]["peak"]),
            "peak decoding GB": gigabytes(found[name]["peak decoding"]),
            "TFLOP a step": flops / steps / 1e12,
            "share of matrix peak": machine.share(flops, seconds),
        }
    result["diffusers' seconds over ours"] = ratios
    result["PSNR dB of the two films"] = film_psnr(films["ours"], films["diffusers"])
    return result


def film_parts(machine: Machine) -> dict[str, Any]:
    """Seconds of sampling as each switch of `exact` is left out, over those with all; and with channels last."""
    steps = machine.pick(4, dry=1)
    ours = Ours(machine, *machine.models())
    switches = [field.name for field in dataclasses.fields(Speed) if field.default is True]
    used = [name for name in switches if getattr(EXACT.on(machine.device.type), name)]
    speeds = {"exact": EXACT, "plain blocks": PLAIN, "plain blocks but shared prefix and time table": SHARED}
    speeds |= {f"without {name}": switched_off(EXACT, name) for name in used}
    if machine.dry:
        speeds = dict(list(speeds.items())[:2])

    def least(speed: Speed) -> float:
        ours.latents(0, steps=1, speed=speed)
        films = range(machine.pick(2, dry=1))
        return min(machine.timed(partial(ours.latents, 0, steps=steps, speed=speed))[1] for _ in films)

    found = {name: least(speed) for name, speed in speeds.items()}
    ours.base.unet.to(memory_format=torch.channels_last)
    for name in ("exact", "plain blocks"):
        found[f"{name}, weights with channels last"] = least(speeds[name])
    whole = found["exact"]
    return {"exact, s a step": whole / steps, **{name: round(each / whole, 4) for name, each in found.items()}}


SHARED = dataclasses.replace(PLAIN, shared_prefix=True, time_table=True)


def waits(machine: Machine) -> dict[str, Any]:
    """How often a step of sampling waits for the GPU: what some steps more add to torch's own warnings of it."""
    ours = Ours(machine, *machine.models())
    told = {}
    for steps in (2, 6):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if machine.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                ours.latents(0, steps=steps)
            finally:
                if machine.device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        of_torch = [each for each in caught if "synchroniz" in str(each.message)]
        told[steps] = Counter(f"{Path(each.filename).name}:{each.lineno}" for each in of_torch)
    counts = [each.total() for each in told.values()]
    return {"in films of 2 and 6 steps": counts, "of 4 steps": dict(told[6] - told[2]) or "none"}


def windows(machine: Machine) -> dict[str, Any]:
    """A long film beside one of a single window."""
    short, long = machine.pick((16, 128), dry=(2, 20))
    steps = machine.pick(3, dry=1)
    ours = Ours(machine, *machine.models())
    ours.latents(0, steps=1)
    seconds, peaks = {}, {}
    for frames in (short, long):
        machine.begin_peak()
        _, seconds[frames] = machine.timed(partial(ours.latents, 0, steps=steps, frames=frames))
        peaks[frames] = machine.peak()
    return {
        "frames": [short, long],
        "s a step": [each / steps for each in seconds.values()],
        "seconds a frame, long over short": seconds[long] / long / (seconds[short] / short),
        "peak GB": [gigabytes(each) for each in peaks.values()],
        "peak, long over short": peaks[long] / peaks[short],
    }


def attention_kernels(machine: Machine) -> dict[str, Any]:
    """Each kernel against the formula; where it runs, its time at the size of the UNet's largest attention."""
    frames, rows = machine.pick((32, 4096), dry=(2, 64))
    q, k, v = (torch.randn(frames, 8, rows, 40, device=machine.device).to(machine.dtype) for _ in range(3))
    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    found: dict[str, Any] = {}
    wrong = []
    for name in BACKENDS:
        try:
            told = check_backend(name, machine.device, machine.dtype)
        except Exception as error:  # each refuses in its own way; a kernel that is not there is a finding
            found[name] = f"does not run: {str(error).strip().splitlines()[0] if str(error).strip() else type(error)}"
            wrong += [name] if str(error).startswith("wrong by") else []
            continue
        found[name] = told
        if name != "xformers":
            with sdpa_kernel(kernels[name]) if name in kernels else nullcontext():
                found[f"{name} ms"] = 1000 * machine.usual_seconds(lambda: F.scaled_dot_product_attention(q, k, v))
    with sdpa_kernel(SDPBackend.MATH):
        found["math"] = check_attention(by_sdpa, machine.device, machine.dtype)
    if wrong:
        raise ValueError(f"{', '.join(wrong)} compute something else than attention: {found}")
    return found


def group_norms(machine: Machine) -> dict[str, Any]:
    """Milliseconds of a group norm with SiLU on a film's activations in four ways, at sizes of the UNet."""
    sizes = machine.pick([(32, 64, 320), (32, 64, 960), (32, 32, 640), (32, 16, 1280)], dry=[(4, 8, 64)])
    found: dict[str, Any] = {}
    for count, side, channels in sizes:
        norm = nn.GroupNorm(32, channels).to(machine.device, machine.dtype).requires_grad_(False)
        first_NCHW = torch.randn(count, channels, side, side, device=machine.device).to(machine.dtype)
        last_NCHW = first_NCHW.contiguous(memory_format=torch.channels_last)
        rows_NLC = last_NCHW.permute(0, 2, 3, 1).flatten(1, 2)
        of_torch: Mapping[str, Callable[[], Tensor]] = {
            "F.group_norm, channels first": partial(_torch_norm, first_NCHW, norm),
            "F.group_norm, channels last": partial(_torch_norm, last_NCHW, norm),
        }
        by_sums: Mapping[str, Callable[[], Tensor]] = {
            "by sums, channels last": partial(group_norm_by_sums, rows_NLC, norm, silu=True),
            "by sums that write nothing, channels last": partial(_read_only_norm, rows_NLC, norm),
        }
        with torch.inference_mode():
            ways = {**of_torch, **by_sums}
            times = {f"{name}, ms": 1000 * machine.usual_seconds(way, at_once=5) for name, way in ways.items()}
            expected_NLC = _torch_norm(first_NCHW, norm).flatten(2).transpose(1, 2)
            off = {f"{name}, off by": (way() - expected_NLC).abs().max().item() for name, way in by_sums.items()}
        found[f"{count} x {channels} x {side} x {side}"] = times | off
    return found


def _torch_norm(hidden_NCHW: Tensor, norm: nn.GroupNorm) -> Tensor:
    return F.silu(F.group_norm(hidden_NCHW, norm.num_groups, norm.weight, norm.bias, norm.eps), inplace=True)


def _read_only_norm(rows_NLC: Tensor, norm: nn.GroupNorm) -> Tensor:
    """By sums that write nothing: float32 within the kernels, never in memory."""
    groups, count = norm.num_groups, rows_NLC.shape[1] * rows_NLC.shape[2] // norm.num_groups
    sum_NC = rows_NLC.sum(1, dtype=torch.float32)
    square_NC = torch.linalg.vector_norm(rows_NLC, dim=1, dtype=torch.float32).square()
    mean_NG, square_NG = (each.unflatten(1, (groups, -1)).sum(-1) / count for each in (sum_NC, square_NC))
    scale_NG = (square_NG - mean_NG.square()).clamp(min=0).add(norm.eps).rsqrt()
    scale_NC = scale_NG.unsqueeze(-1) * norm.weight.float().unflatten(0, (groups, -1))
    shift_NC = norm.bias.float().unflatten(0, (groups, -1)) - mean_NG.unsqueeze(-1) * scale_NC
    made_NLC = torch.empty_like(rows_NLC)
    torch.addcmul(shift_NC.flatten(1).unsqueeze(1), rows_NLC, scale_NC.flatten(1).unsqueeze(1), out=made_NLC)
    return F.silu(made_NLC, inplace=True)


def compiled_film(machine: Machine) -> dict[str, Any]:
    """`--compile` beside exact: how long compiling takes, and what it gains."""
    steps, pairs = machine.pick((10, PAIRS), dry=(1, 1))
    ours = Ours(machine, *machine.models())
    speed = dataclasses.replace(EXACT, compiled=True)
    # A dry run has no minutes to compile in.
    with torch.compiler.set_stance("force_eager") if machine.dry else nullcontext():
        exact, compiled = (partial(ours.latents, 0, steps=steps, speed=each) for each in (EXACT, speed))
        exact()
        _, compiling = machine.timed(partial(ours.latents, 0, steps=1, speed=speed))
        compiled()
        times = [(machine.timed(exact)[1], machine.timed(compiled)[1]) for _ in range(pairs)]
        difference = (exact() - compiled()).abs().max().item()
    return {
        "compiling, s": compiling,
        "exact, s": spread([pair[0] for pair in times]),
        "compiled, s": spread([pair[1] for pair in times]),
        "exact's seconds over compiled's": spread([pair[0] / pair[1] for pair in times]),
        "largest difference of latents": difference,
    }


# Compiling comes last: it takes longest, and a graph that goes wrong would take what follows with it.
ROWS: tuple[Row, ...] = (
    Row("doctor", 8, doctor),
    Row("rates", 3, rates),
    Row("film-exact", 50, film_exact),
    *TRAINING_ROWS,
    Row("film-parts", 35, film_parts),
    Row("waits", 4, waits),
    Row("windows", 20, windows),
    *WAN_ROWS,
    Row("attention", 5, attention_kernels),
    Row("fp16-training", 15, fp16_with_scaler),
    Row("group-norm", 3, group_norms),
    Row("film-compiled", 110, compiled_film),
)
