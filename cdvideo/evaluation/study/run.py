"""The study: every method learns every concept and draws the same prompts from the same noise; then all is compared."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cdvideo.evaluation.figures import Figure
from cdvideo.evaluation.study.config import StudyConfig
from cdvideo.evaluation.study.drift import class_pull, class_sheets, drift_plots
from cdvideo.evaluation.study.pieces import StudyBench, open_study, pieces, score, train
from cdvideo.evaluation.study.results import HALVES, Measured, StudyResults, picture_rows, summarise
from cdvideo.runs import atomic_path


def run_study(config: StudyConfig) -> StudyResults:
    """Makes what is not made yet, measures it, and writes results.json and pictures.csv into `out`.

    What an interrupted call has made is used by the next one, and so is what other studies have made.

    Raises:
        UserError: no sprites, no judge, no motion modules, or a training that diverged: the study ends with it.
    """
    bench = open_study(config)
    measured = []
    with tqdm(pieces(config), desc="study", unit="piece", disable=config.quiet) as bar:
        for piece in bar:
            bar.set_postfix_str(piece.title)
            folder = train(bench, piece) if piece.method.source == "trained" else None
            file, scores = score(bench, piece)
            if folder is not None and not piece.film and "identity" in bench.instruments.likeness:
                scores["class pull"] = [class_pull(bench, piece)] * len(scores["composition"])
            measured.append(Measured(piece, folder, file, scores))
    results = StudyResults(config, measured, describe(bench, measured), bench.pictures)
    results.drift = drift_plots(bench, measured)
    if "identity" in bench.instruments.likeness:
        results.classes = class_sheets(bench, measured)
    summarise(results)
    write_results(results)
    return results


def describe(bench: StudyBench, measured: list[Measured]) -> dict[str, Any]:
    """With what the study was made; no paths, since reports travel."""
    config, device = bench.config, bench.base.device
    paths = ("judge", "identity", "clip", "dino", "blip", "sprites", "cache", "out", "json", "device", "quiet", "base")
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in paths}
    made = [json.loads(m.file.with_suffix(".json").read_text())["made"] for m in measured]
    made += [json.loads((m.folder / "made.json").read_text()) for m in measured if m.folder is not None]
    return settings | {
        "base": Path(config.base).name,
        "base_hash": bench.base.hash,
        "instruments": bench.instruments.names,
        "measured_on": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "made_on": sorted({f"{m['device']}, torch {m['torch']}" for m in made}),
        "date": time.strftime("%Y-%m-%d"),
    }


def write_results(results: StudyResults) -> None:
    """results.json and the scores of every picture."""
    config = results.config
    text = json.dumps(results.as_json(), indent=2) + "\n"
    texts = {config.out / "results.json": text, config.out / "pictures.csv": picture_rows(results)}
    if config.json is not None:
        texts[config.json] = text
    if config.films.methods:
        texts[config.out / "films.csv"] = picture_rows(results, film=True)
    for path, content in texts.items():
        with atomic_path(path) as part:
            part.write_text(content, encoding="utf-8")


def print_tables(results: StudyResults) -> None:
    """The tables of each half of the concepts, as text."""
    for title, tables in (("", results.tables), ("films, ", results.films)):
        for half, table in tables.items():
            columns = list(dict.fromkeys(name for row in table.values() for name in row))
            width = max(len(method) for method in table)
            print(f"\n{title}{half} ({', '.join(getattr(results.config, HALVES[half]))})")
            print(" " * width, *(f"{name:>20}" for name in columns))
            for method, row in table.items():
                print(f"{method:<{width}}", *(f"{_cell(row[name]) if name in row else '':>20}" for name in columns))


def _cell(figure: Figure) -> str:
    low, high = figure.interval or (figure.value, figure.value)
    digits = 1 if figure.unit == "%" else 3
    return f"{figure.value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
