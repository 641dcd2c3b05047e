"""Everything that is measured of a base, one function for each part of the report."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from cdvideo.base.latents import decode_latents, encode_pixels
from cdvideo.base.loader import Base
from cdvideo.base.text import encode_text, tokenize
from cdvideo.evaluation.bench import Bench, Report, Shown, all_heads, describe, fit, open_bench, right_heads, to_pixels
from cdvideo.evaluation.config import ReportConfig
from cdvideo.evaluation.drawing import Pictures, draw_stills
from cdvideo.evaluation.figures import Figure, mean, share
from cdvideo.evaluation.film_report import measure_films
from cdvideo.evaluation.judge.model import HEADS
from cdvideo.evaluation.metrics import Floats, class_margins, psnr
from cdvideo.evaluation.prompts import Ask, choose_asks, class_phrases, with_unknown_words
from cdvideo.sampling.video import to_uint8
from cdvideo.world.scenes import Scene, render_scene, sample_scene

ROOT = Path(__file__).parents[2]
# What the project asks of its embedded base, in %: subject, thing, setting, all three.
ASKED_STILLS = {"trained": (95, 90, 95, 85), "heldout": (92, 85, 93, 75)}
ASKED_JUDGE = (98, 95)  # in each head, as rendered and after the round trip, in %
TITLES = {"trained": "Stills of triples that the base was trained on", "heldout": "Stills of held-out triples"}
ALL = "all three"
CLEAR_MARGIN = 0.1  # of the cosine within a class over that to the nearest other one
SHOWN_STILLS = 40


def measure_base(config: ReportConfig) -> Report:
    """Draws, looks and counts.

    Raises:
        UserError: no sprites, no judge, no motion modules, or pictures to resume that were drawn with other settings.
    """
    bench = open_bench(config)
    report = Report(settings=describe(bench))
    report.figures += [measure_size(bench.base)]
    measure_autoencoder(bench, report)
    measure_judge(bench, report)
    measure_text(bench, report)
    measure_stills(bench, report)
    if bench.motion is not None:
        measure_films(bench, bench.motion, report)
    if config.speed_runs and (bench.base.path / "motion").is_dir():
        report.figures += [measure_speed(config)]
    return report


def measure_size(base: Base) -> Figure:
    """All files of the base's folder."""
    files = [file for file in base.path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files) / 2**20
    return Figure(
        part="Size and speed",
        name="size of its folder",
        value=size,
        unit="MiB",
        n=len(files),
        of="files",
        at_most=32,
    )


def measure_autoencoder(bench: Bench, report: Report) -> None:
    """Round trip of real stills of held-out triples, and the judge on them, before and after it, for comparison."""
    part, of = "The autoencoder", "real stills of held-out triples"
    scenes = real_scenes(bench, "heldout", bench.config.scenes)
    right, ratios_B = judge_real_stills(bench, scenes)
    report.figures += [mean(ratios_B, part=part, name="PSNR", unit="dB", of=of, at_least=29)]
    for title, right_BH in right.items():
        report.figures += [
            share(right_BH[:, h], part=f"The judge on held-out triples, {title}", name=head, of=of)
            for h, head in enumerate(HEADS)
        ]


def measure_judge(bench: Bench, report: Report) -> None:
    """The judge on the world as it is, all triples: stills that it was not trained on."""
    right, _ = judge_real_stills(bench, real_scenes(bench, "any", bench.config.judge_scenes))
    for (title, right_BH), least in zip(right.items(), ASKED_JUDGE, strict=True):
        report.figures += [
            share(right_BH[:, h], part=f"The judge, {title}", name=head, of="new real stills", at_least=least)
            for h, head in enumerate(HEADS)
        ]


def real_scenes(bench: Bench, split: Literal["heldout", "any"], count: int) -> list[Scene]:
    """New scenes of the world, another seed than any training's."""
    rng = np.random.default_rng([bench.config.seed, 10 if split == "heldout" else 13])
    return [sample_scene(rng, split=split) for _ in range(count)]


def judge_real_stills(bench: Bench, scenes: Sequence[Scene]) -> tuple[dict[str, NDArray[np.bool_]], Floats]:
    """Which heads are right, right_BH, as rendered and after the autoencoder's round trip; and its PSNR in dB."""
    rights: dict[str, list[NDArray[np.bool_]]] = {"as rendered": [], "after the round trip": []}
    ratios = []
    for start in range(0, len(scenes), 64):
        part = scenes[start : start + 64]
        wanted = [(scene.subject, scene.thing, scene.setting) for scene in part]
        images_BHWC = np.stack([fit(render_scene(scene, bench.sprites)[0], bench.base.resolution) for scene in part])
        again_BHWC = through_vae(bench.base, images_BHWC)
        for found, pictures in zip(rights.values(), (images_BHWC, again_BHWC), strict=True):
            found.append(right_heads(bench.look(pictures), wanted))
        ratios.append(psnr(images_BHWC, again_BHWC))
    return {title: np.concatenate(found) for title, found in rights.items()}, np.concatenate(ratios)


@torch.inference_mode()
def measure_text(bench: Bench, report: Report) -> None:
    """How the phrases of a class keep together at the end of text."""
    phrases = class_phrases()
    features = []
    for texts in phrases.values():
        encoded = encode_text(bench.base.text_encoder, tokenize(bench.base.tokenizer, texts))
        features.append(encoded.eos_BD.double().cpu().numpy())
    within, nearest = class_margins(features)
    part, of = "The text space", "classes of subjects"
    report.figures += [
        mean(within, part=part, name="cosine within a class", unit="", of=of),
        mean(nearest, part=part, name="cosine to the nearest other class", unit="", of=of),
        mean(within - nearest, part=part, name="margin", unit="", of=of, at_least=CLEAR_MARGIN),
        share(within > nearest, part=part, name="classes that are nearer to themselves", of=of),
    ]
    report.tables["Cosine of phrases, by subject"] = {
        subject: {"within": float(w), "nearest other": float(n)}
        for subject, w, n in zip(phrases, within, nearest, strict=True)
    }


def measure_stills(bench: Bench, report: Report) -> None:
    """How often the judge sees what the prompt says; with made-up words among it, too."""
    config = bench.config
    plain: dict[str, NDArray[np.bool_]] = {}
    for split in ("trained", "heldout"):
        asks = choose_asks(split, config.prompts, seed=config.seed)
        repeated = [ask for _ in range(config.seeds) for ask in asks]
        seeds = [1000 * s + i for s in range(config.seeds) for i in range(len(asks))]
        images_BHWC = draw_stills(bench.base, repeated, seeds, bench.store, split, config)
        verdicts = bench.look(images_BHWC)
        right_BH = right_heads(verdicts, [ask.triple for ask in repeated])
        of = f"pictures, {len(asks)} prompts x {config.seeds} seeds"
        columns = [*right_BH.T, all_heads(right_BH)]
        for name, right, least in zip((*HEADS, ALL), columns, ASKED_STILLS[split], strict=True):
            report.figures += [share(right, part=TITLES[split], name=name, of=of, at_least=least)]
        report.tables |= by_class(repeated, right_BH, TITLES[split])
        plain[split] = all_heads(right_BH[: len(asks)])
        if split == "heldout":
            report.sheet = [
                Shown(ask, images_BHWC[i : i + 1], verdicts.names(i), bool(plain[split][i]))
                for i, ask in enumerate(asks[:SHOWN_STILLS])
            ]
    measure_unknown_words(bench, report, plain["trained"])


def measure_unknown_words(bench: Bench, report: Report, plain_B: NDArray[np.bool_]) -> None:
    """The same pictures as the first of the trained-on triples, but with three made-up words in each prompt."""
    config = bench.config
    rng = np.random.default_rng([config.seed, 11])
    asks = [with_unknown_words(ask, rng) for ask in choose_asks("trained", config.prompts, seed=config.seed)]
    images_BHWC = draw_stills(bench.base, asks, range(len(asks)), bench.store, "unknown", config)
    right_B = all_heads(right_heads(bench.look(images_BHWC), [ask.triple for ask in asks]))
    lost_B = 100 * (plain_B.astype(float) - right_B)
    part, of = "Three unknown words in the prompt", "prompts, one seed"
    report.figures += [
        share(right_B, part=part, name=ALL, of=of),
        mean(lost_B, part=part, name="points lost", unit="points", of=of, at_most=5),
    ]


def measure_speed(config: ReportConfig) -> Figure:
    """Seconds of whole calls of animate.py on two cores of the CPU, from start to exit; the median."""
    seconds = []
    for seed in range(config.speed_runs):
        with tempfile.TemporaryDirectory() as out:
            command = [
                sys.executable,
                str(ROOT / "scripts" / "animate.py"),
                "--prompt",
                "a dog wearing headphones surfing",
            ]
            command += ["--base", config.base, "--concept", "none", "--frames", str(config.frames)]
            command += ["--steps", str(config.steps), "--seed", str(seed), "--device", "cpu", "--out", out, "--quiet"]
            start = time.perf_counter()
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "2"}, preexec_fn=two_cores())
            seconds.append(time.perf_counter() - start)
    name = f"animate.py, {config.frames} frames, {config.steps} steps"
    return Figure(
        part="Size and speed", name=name, value=float(np.median(seconds)), unit="s", n=len(seconds),
        of=f"calls on two cores ({platform.processor() or platform.machine()}), median",
        interval=(min(seconds), max(seconds)), method="range", at_most=30,
    )  # fmt: skip


def two_cores() -> Callable[[], None] | None:
    """For the new process: keep to the first two cores that there are, where the system can do that."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))[:2]
    return lambda: os.sched_setaffinity(0, cores)


def by_class(asks: Sequence[Ask], right_BH: NDArray[np.bool_], title: str) -> dict[str, dict[str, dict[str, float]]]:
    """Share of right pictures for each class of each head, the worst first, in %."""
    tables = {}
    for h, head in enumerate(HEADS):
        classes: dict[str, list[bool]] = {}
        for ask, right in zip(asks, right_BH[:, h], strict=True):
            classes.setdefault(ask.triple[h] or "nothing", []).append(bool(right))
        worst_first = sorted(classes.items(), key=lambda item: float(np.mean(item[1])))
        tables[f"{title}: {head}"] = {
            name: {"right, %": 100 * float(np.mean(found)), "pictures": len(found)} for name, found in worst_first
        }
    return tables


@torch.inference_mode()
def through_vae(base: Base, images_BHWC: Pictures) -> Pictures:
    """The autoencoder's round trip."""
    return to_uint8(decode_latents(base.vae, encode_pixels(base.vae, to_pixels(images_BHWC))))
