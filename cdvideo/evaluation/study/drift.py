"""Drift, in the study: where a concept's phrases go in text space, and whether the class's own pictures follow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from cdvideo.concept.drift_file import DRIFT_FILE, load_drift
from cdvideo.evaluation.drawing import Pictures
from cdvideo.evaluation.study.config import TOKEN, MethodConfig
from cdvideo.evaluation.study.drift_figures import attention_over_steps, nearest_classes, text_space
from cdvideo.evaluation.study.drift_output import draw_class
from cdvideo.evaluation.study.pieces import Piece, StudyBench, keep, learned, sampling_facts
from cdvideo.evaluation.study.results import Measured
from cdvideo.world.heldout import HELDOUT_INDIVIDUALS
from cdvideo.world.scenes import SUBJECTS

SEEDS = range(500_000, 500_008)  # of the class's pictures; no other picture of the study starts from them


def class_pull(bench: StudyBench, piece: Piece) -> float:
    """How much nearer to the concept's pictures the class's own came, drawn without the token from equal noise.

    Mean cosine of identity with the concept in place, less that without: 0 where the class was left alone.
    """
    subject = HELDOUT_INDIVIDUALS[piece.concept].subject
    before = Piece(MethodConfig(name="base", source="base"), piece.concept, piece.seed)
    encoder, likeness = bench.instruments.likeness["identity"], []
    references_RD = encoder.images(bench.pictures[piece.concept])
    for asked in (before, piece):
        facts = {"subject": subject, "seeds": list(SEEDS)} | sampling_facts(bench, asked)
        place = Path("classes") / (subject if asked is before else piece.concept)
        file = keep(bench, place, facts, partial(_draw, bench, asked, subject))
        likeness.append((encoder.images(np.load(file)) @ references_RD.T).mean())
    return float(likeness[1] - likeness[0])


def _draw(bench: StudyBench, piece: Piece, subject: str) -> Pictures:
    concept, config = learned(bench, piece), bench.config
    return draw_class(bench.base, subject, SEEDS, concept=concept, steps=config.steps, guidance=config.guidance)


def drift_plots(bench: StudyBench, measured: Sequence[Measured]) -> dict[str, bytes]:
    """Of the first concept of each half: all methods' ways through text space, and the attention that one of them gave.

    Returns:
        SVG by title.
    """
    config = bench.config
    plots = {}
    for concept in (*config.report_on[:1], *config.choose_on[:1]):
        records = {
            m.piece.method.name: load_drift(m.folder / DRIFT_FILE)
            for m in measured
            if m.folder is not None and m.piece.concept == concept and m.piece.seed == config.training_seeds[0]
        }
        if not records:
            continue
        neighbours = nearest_classes(bench.trainee, HELDOUT_INDIVIDUALS[concept].subject, SUBJECTS)
        plots[f"Text space, {concept}"] = text_space(records, TOKEN, neighbours)
        if config.against in records:
            plots[f"Attention, {config.against}, {concept}"] = attention_over_steps(records[config.against], TOKEN)
    return plots
