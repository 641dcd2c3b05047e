"""What is measured of pictures: the judge's verdicts against what was asked, likeness, diversity."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cdvideo.evaluation.judge.model import Judge, Verdicts, label_indices
from cdvideo.evaluation.study.prompts import StudyPrompt
from cdvideo.evaluation.study.scores import Instruments, diversity, right_as_asked, score_pictures

WORN = StudyPrompt("worn", "dog", "headphones", None)
SCENE = StudyPrompt("scene", "dog", None, "space")
BOTH = StudyPrompt("worn and doing", "dog", "headphones", "surfing")


class MeanColour:
    """An encoder that sees nothing but the mean colour."""

    name = "mean colour"

    def images(self, images_BHWC: np.ndarray) -> np.ndarray:
        mean_BC = images_BHWC.reshape(len(images_BHWC), -1, 3).mean(axis=1)
        return mean_BC / np.linalg.norm(mean_BC, axis=1, keepdims=True)


def verdicts(*triples: tuple[str, str, str]) -> Verdicts:
    labels = [label_indices(dict(zip(("subject", "thing", "setting"), triple, strict=True))) for triple in triples]
    return Verdicts(torch.tensor(labels), torch.ones(len(labels), 3), torch.ones(len(labels), 4))


def test_what_was_not_asked_for_is_not_looked_at() -> None:
    seen = verdicts(("dog", "headphones", "snow"), ("dog", "crown", "space"), ("dog", "headphones", "space"))
    right_BH = right_as_asked(seen, [WORN, SCENE, BOTH])
    np.testing.assert_array_equal(right_BH, [[1, 1, np.nan], [1, np.nan, 1], [1, 1, 0]])


def test_composition_is_all_that_was_asked_for() -> None:
    torch.manual_seed(0)
    judge = Judge(widths=(4, 4, 4, 8), blocks=(0, 0, 0, 1), side=32).eval()
    images_BHWC = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    seen = judge.judge(torch.from_numpy(images_BHWC).permute(0, 3, 1, 2) / 127.5 - 1).names(0)
    as_seen = StudyPrompt("worn and doing", seen[0], seen[1], seen[2])
    other = StudyPrompt("worn", seen[0], "crown" if seen[1] != "crown" else "cap", None)
    red_RHWC = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    red_RHWC[..., 0] = 200
    images_BHWC[1] = [200, 0, 0]
    instruments = Instruments(judge, {"colour": MeanColour()}, {})
    scores = score_pictures(images_BHWC, [as_seen, as_seen, other, other], red_RHWC, instruments)
    assert scores["composition"][0] == scores["subject"][0] == scores["worn"][0] == scores["setting"][0] == 1
    assert scores["composition"][2] == scores["worn"][2] == 0 and np.isnan(scores["setting"][2])
    assert scores["colour"][1] == pytest.approx(1) and scores["colour"][0] < 0.9
    assert set(scores) == {"composition", "subject", "worn", "setting", "colour", "diversity", "copying"}
    assert instruments.names["colour"] == "mean colour"


def test_diversity_is_within_a_prompt() -> None:
    unit_BD = np.array([[1, 0], [1, 0], [0, 1], [1, 0]], dtype=float)
    np.testing.assert_allclose(diversity(unit_BD, [WORN, WORN, WORN, SCENE]), [0.5, 0.5, 1, np.nan])
