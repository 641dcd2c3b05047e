from __future__ import annotations

from pathlib import Path

import pytest

from cdvideo.evaluation.study.config import MethodConfig, StudyConfig
from cdvideo.evaluation.study.pieces import pieces
from cdvideo.evaluation.study.results import Measured, Pick


def test_class_pull_is_counted_by_trainings() -> None:
    method = MethodConfig(name="ours")
    config = StudyConfig(methods=(method,), against="", training_seeds=(0, 1, 2), prompts=1, seeds=5)
    measured = [
        Measured(piece, None, Path(), {"composition": [1.0] * 20, "class pull": [0.1 * (1 + piece.seed)] * 20})
        for piece in pieces(config)
    ]
    figures = Pick(config, measured, config.concepts).figures(method)
    pull, composition = figures["class pull"], figures["composition"]
    assert (pull.n, pull.of) == (2 * 3, "trainings, of 2 concepts") and pull.value == pytest.approx(0.2)
    assert composition.n == 2 * 3 * 20 and composition.of.startswith("pictures, 2 concepts x 4 prompts x 5 seeds")
