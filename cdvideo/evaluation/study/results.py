"""From scores of pictures to figures: tables by method, comparisons pair by pair, curves over steps."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from cdvideo.evaluation.drawing import Pictures
from cdvideo.evaluation.figures import Figure
from cdvideo.evaluation.statistics import wilson
from cdvideo.evaluation.study.config import MethodConfig, StudyConfig
from cdvideo.evaluation.study.pieces import Piece, asked
from cdvideo.evaluation.study.prompts import KINDS
from cdvideo.evaluation.study.scores import Scores
from cdvideo.evaluation.study.statistics import METHOD, Means, mean_interval, ratio_interval

HALVES = {"report on": "report_on", "choose on": "choose_on", "all concepts": "concepts"}
PERCENT = ("composition", "subject", "worn", "setting", "right frames")
COMPARED = ("composition", "identity", "flow", "consistency")

Table: TypeAlias = dict[str, dict[str, Figure]]  # method -> column -> figure
# method -> concept -> for each training seed the lines that it logged
Curves: TypeAlias = dict[str, dict[str, list[list[dict[str, float]]]]]


@dataclass(frozen=True)
class Measured:
    """A piece, the folder of its training (None: none), the file of its pictures, and their scores."""

    piece: Piece
    folder: Path | None
    file: Path
    scores: Scores


@dataclass
class StudyResults:
    """Everything measured, and what was made of it.

    tables and films: half -> method -> metric. kinds: half -> method -> kind of prompt: composition. against and
    films_against: half -> method -> "<metric> / <other method>": ratio of means. checkpoints: method -> step -> metric,
    the last step included. references: each concept's own pictures. drift: plots by title, as SVG. classes: pictures
    of the class before and after, by title.
    """

    config: StudyConfig
    measured: list[Measured]
    settings: dict[str, Any]
    references: Mapping[str, Pictures]
    tables: dict[str, Table] = field(default_factory=dict)
    kinds: dict[str, Table] = field(default_factory=dict)
    against: dict[str, Table] = field(default_factory=dict)
    films: dict[str, Table] = field(default_factory=dict)
    films_against: dict[str, Table] = field(default_factory=dict)
    drift: dict[str, bytes] = field(default_factory=dict)
    classes: dict[str, Image.Image] = field(default_factory=dict)
    checkpoints: dict[str, dict[int, dict[str, Figure]]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        named = ("tables", "kinds", "against", "films", "films_against", "checkpoints")
        return {"settings": self.settings} | {name: _plain(getattr(self, name)) for name in named}


def summarise(results: StudyResults) -> None:
    """Fills in all tables, each for those halves of the concepts that there are."""
    config, measured = results.config, results.measured
    for title, name in HALVES.items():
        concepts = getattr(config, name)
        if not concepts or (name == "concepts" and not (config.choose_on and config.report_on)):
            continue
        stills, films = Pick(config, measured, concepts), Pick(config, measured, concepts, film=True)
        results.tables[title] = {method.name: stills.figures(method) for method in config.methods}
        results.kinds[title] = {method.name: by_kind(stills, method) for method in config.methods}
        results.against[title] = {method.name: comparisons(stills, method) for method in config.methods}
        if filmed := [method for method in config.methods if method.name in config.films.methods]:
            results.films[title] = {method.name: films.figures(method) for method in filmed}
            results.films_against[title] = {method.name: comparisons(films, method) for method in filmed}
    every = Pick(config, measured, config.concepts)
    results.checkpoints = {
        method.name: {step: every.figures(method, step) for step in method.checkpoints}
        | {config.concept_config(method, config.concepts[0], 0).steps: every.figures(method)}
        for method in config.methods
        if method.checkpoints
    }


@dataclass(frozen=True)
class Pick:
    """The scores of some concepts, of stills or of films."""

    config: StudyConfig
    measured: Sequence[Measured]
    concepts: Sequence[str]
    film: bool = False

    @property
    def seeds(self) -> int:
        return self.config.films.seeds if self.film else self.config.seeds

    def of(self, method: MethodConfig, step: int | None = None) -> list[list[Measured]]:
        """For each concept the method's measurements, one for each training seed."""
        found = [
            m for m in self.measured if m.piece.method == method and m.piece.step == step and m.piece.film == self.film
        ]
        return [[m for m in found if m.piece.concept == concept] for concept in self.concepts]

    def means(self, method: MethodConfig, metric: str, step: int | None = None) -> Means:
        """Means over trainings and seeds: values_CP, of the prompts that ask for what the metric looks at."""
        values_CTN = np.array([[m.scores[metric] for m in trained] for trained in self.of(method, step)])
        values_CP = values_CTN.mean(axis=1).reshape(len(self.concepts), -1, self.seeds).mean(axis=2)
        return values_CP[:, ~np.isnan(values_CP).any(axis=0)]

    def figures(self, method: MethodConfig, step: int | None = None) -> dict[str, Figure]:
        """Every metric's mean."""
        found = {}
        for metric in self.of(method, step)[0][0].scores:
            values_CP = self.means(method, metric, step)
            if values_CP.size:  # diversity has none where there is one seed
                found[metric] = self.figure(method, metric, values_CP)
        return found

    def figure(self, method: MethodConfig, metric: str, values_CP: Means) -> Figure:
        scale, unit = (100, "%") if metric in PERCENT else (1, "")
        (low, high), how = mean_interval(values_CP), METHOD
        if unit and low == high and values_CP.mean() in (0, 1):  # resampling what is all alike tells nothing
            low, high = wilson(int(values_CP.sum()), values_CP.size)
            how = "Wilson over concepts and prompts, of which all are alike"
        return Figure(
            part=method.name, name=metric, value=scale * float(values_CP.mean()), unit=unit,
            interval=(scale * low, scale * high), method=how, **self.count(method, values_CP, metric),
        )  # fmt: skip

    def count(self, method: MethodConfig, values_CP: Means, metric: str = "") -> dict[str, Any]:
        """n and what it counts."""
        trainings = len(self.config.training_seeds) if method.source == "trained" else 1
        if metric == "class pull":  # one for each training
            return {"n": len(self.concepts) * trainings, "of": f"trainings, of {len(self.concepts)} concepts"}
        of = "films" if self.film else "pictures"
        of += f", {len(self.concepts)} concepts x {values_CP.shape[1]} prompts x {self.seeds} seeds"
        return {
            "n": values_CP.size * self.seeds * trainings,
            "of": of + (f" x {trainings} trainings" if trainings > 1 else ""),
        }


def by_kind(pick: Pick, method: MethodConfig) -> dict[str, Figure]:
    """Composition by kind of prompt, and of the triples that the base never saw."""
    values_CP = pick.means(method, "composition")
    prompts = [asked(pick.config, trained[0].piece)[0][:: pick.seeds] for trained in pick.of(method)]
    columns: dict[str, list[bool]] = {kind: [prompt.kind == kind for prompt in prompts[0]] for kind in KINDS}
    columns["held-out triples"] = [all(prompt.held_out for prompt in place) for place in zip(*prompts, strict=True)]
    return {
        name: pick.figure(method, "composition", values_CP[:, np.array(chosen)])
        for name, chosen in columns.items()
        if any(chosen)
    }


def comparisons(pick: Pick, method: MethodConfig) -> dict[str, Figure]:
    """Ratios to the base's own pictures of the class, and to the method that all are compared with: pair by pair."""
    others = [m for m in pick.config.methods if m.source == "base" or m.name == pick.config.against]
    if pick.film:
        others = [other for other in others if other.name in pick.config.films.methods]
    found = {}
    for other in others:
        for metric in COMPARED:
            if other == method or metric not in pick.of(method)[0][0].scores:
                continue
            above_CP, below_CP = pick.means(method, metric), pick.means(other, metric)
            if below_CP.mean() == 0:  # no ratio to nothing
                continue
            name = f"{metric} / {other.name}"
            found[name] = Figure(
                part=method.name, name=name, value=float(above_CP.mean() / below_CP.mean()), unit="x",
                interval=ratio_interval(above_CP, below_CP), method=f"{METHOD}, paired", **pick.count(method, above_CP),
            )  # fmt: skip
    return found


def training_curves(results: StudyResults) -> Curves:
    """What each run logged while training."""
    found: Curves = {}
    for measured in results.measured:
        piece = measured.piece
        if measured.folder is None or piece.film or piece.step is not None:
            continue
        text = (measured.folder / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        found.setdefault(piece.method.name, {}).setdefault(piece.concept, []).append(lines)
    return found


def picture_rows(results: StudyResults, *, film: bool = False) -> str:
    """Every picture (or film) with its scores, as CSV."""
    out = io.StringIO()
    chosen = [m for m in results.measured if m.piece.film == film]
    fields = ["method", "concept", "training seed", "step", "kind", "held out", "semantic phrase", "prompt", "seed"]
    metrics = dict.fromkeys(name for measured in chosen for name in measured.scores)
    writer = csv.DictWriter(out, [*fields, *metrics], lineterminator="\n")
    writer.writeheader()
    for measured in chosen:
        piece = measured.piece
        prompts, seeds = asked(results.config, piece)
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            step = "last" if piece.step is None else piece.step
            held_out, phrase = int(prompt.held_out), int(prompt.semantic_phrase)
            about = [piece.method.name, piece.concept, piece.seed, step, prompt.kind, held_out, phrase]
            about += [prompt.template, seed]
            scores = {name: f"{values[i]:.5g}" for name, values in measured.scores.items()}
            writer.writerow(dict(zip(fields, about, strict=True)) | scores)
    return out.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, Figure):
        return value.as_json()
    return {str(key): _plain(item) for key, item in value.items()} if isinstance(value, dict) else value
