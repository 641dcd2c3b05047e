"""Drift, in the study: where a concept's phrases go in text space, and whether the class's own pictures follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from cdvideo.concept.drift_file import DRIFT_FILE, load_drift
from cdvideo.evaluation.drawing import Pictures
from cdvideo.evaluation.study.config import TOKEN, MethodConfig, StudyConfig
from cdvideo.evaluation.study.drift_figures import (
    attention_over_steps,
    maps_over_steps,
    nearest_classes,
    text_space,
)
from cdvideo.evaluation.study.drift_output import before_and_after, draw_class
from cdvideo.evaluation.study.pieces import Piece, StudyBench, keep, learned, sampling_facts
from cdvideo.evaluation.study.results import Measured
from cdvideo.world.heldout import HELDOUT_INDIVIDUALS
from cdvideo.world.scenes import SUBJECTS

SEEDS = range(500_000, 500_008)  # of the class's pictures; no other picture of the study starts from them


def class_pull(bench: StudyBench, piece: Piece) -> float:
    """How much nearer to the concept's pictures the class's own came, drawn without the token from equal noise.

    Mean cosine of identity with the concept in place, less that without: 0 where the class was left alone.
    """
    encoder = bench.instruments.likeness["identity"]
    references_RD = encoder.images(bench.pictures[piece.concept])
    before, after = ((encoder.images(images) @ references_RD.T).mean() for images in class_samples(bench, piece))
    return float(after - before)


def class_samples(bench: StudyBench, piece: Piece) -> tuple[Pictures, Pictures]:
    """What is drawn of the class alone, before and after the piece's training; drawn where it is not there yet."""
    subject = HELDOUT_INDIVIDUALS[piece.concept].subject
    before = Piece(MethodConfig(name="base", source="base"), piece.concept, piece.seed)
    found = []
    for asked in (before, piece):
        facts = {"subject": subject, "seeds": list(SEEDS)} | sampling_facts(bench, asked)
        place = Path("classes") / (subject if asked is before else piece.concept)
        found.append(np.load(keep(bench, place, facts, partial(_draw, bench, asked, subject))))
    return found[0], found[1]


def _draw(bench: StudyBench, piece: Piece, subject: str) -> Pictures:
    concept, config = learned(bench, piece), bench.config
    return draw_class(bench.base, subject, SEEDS, concept=concept, steps=config.steps, guidance=config.guidance)


def drift_plots(bench: StudyBench, measured: Sequence[Measured]) -> dict[str, bytes]:
    """Of the first concept of each half: all methods' ways through text space, and the attention that two of them gave.

    The two are the method that all are compared with, and the last one.

    Returns:
        SVG by title.
    """
    config = bench.config
    plots = {}
    for concept in _first_concepts(config):
        trained = _trained_on(config, measured, concept)
        if not trained:
            continue
        records = {name: load_drift(m.folder / DRIFT_FILE) for name, m in trained.items() if m.folder is not None}
        neighbours = nearest_classes(bench.trainee, HELDOUT_INDIVIDUALS[concept].subject, SUBJECTS)
        plots[f"Text space, {concept}"] = text_space(records, TOKEN, neighbours)
        for name in _shown(config, trained):
            plots[f"Attention, {name}, {concept}"] = attention_over_steps(records[name], TOKEN)
            plots[f"Where each word is read, {name}, {concept}"] = maps_over_steps(records[name], TOKEN)
    return plots


def class_sheets(bench: StudyBench, measured: Sequence[Measured]) -> dict[str, Image.Image]:
    """The class's pictures before and after the trainings whose attention is shown, by title."""
    sheets = {}
    for concept in _first_concepts(bench.config):
        trained = _trained_on(bench.config, measured, concept)
        for name in _shown(bench.config, trained):
            title = f"a {HELDOUT_INDIVIDUALS[concept].subject}, before and after {name} learned the {concept}"
            sheets[title] = before_and_after(*class_samples(bench, trained[name].piece), SEEDS, title=title)
    return sheets


def _first_concepts(config: StudyConfig) -> tuple[str, ...]:
    return config.report_on[:1] + config.choose_on[:1]


def _shown(config: StudyConfig, trained: Mapping[str, Measured]) -> list[str]:
    """Of the methods that trained, the one that all are compared with, and the last."""
    return [name for name in dict.fromkeys((config.against, *list(trained)[-1:])) if name in trained]


def _trained_on(config: StudyConfig, measured: Sequence[Measured], concept: str) -> dict[str, Measured]:
    """The trainings on a concept with the first seed, as they ended, by method."""
    return {
        m.piece.method.name: m
        for m in measured
        if m.folder is not None and not m.piece.film and m.piece.step is None
        and m.piece.concept == concept and m.piece.seed == config.training_seeds[0]
    }  # fmt: skip
