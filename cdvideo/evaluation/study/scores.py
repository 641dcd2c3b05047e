"""What is measured of the pictures of one method and one concept: one number for each picture and metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from cdvideo.evaluation.bench import to_pixels
from cdvideo.evaluation.drawing import Pictures
from cdvideo.evaluation.encoders import Features, ImageEncoder, JudgeEncoder, TextScorer
from cdvideo.evaluation.film_report import RIGHT_FRAMES
from cdvideo.evaluation.judge.model import CLASSES, HEADS, Judge, Verdicts
from cdvideo.evaluation.metrics import copying, dis_flow, flow_magnitude, subject_consistency
from cdvideo.evaluation.study.prompts import StudyPrompt

Scores: TypeAlias = dict[str, list[float]]  # metric -> one number for each picture; NaN where it was not asked for


@dataclass(frozen=True)
class Instruments:
    """What measures. likeness: encoders that compare with the concept's pictures; agreement: those that compare with
    the prompt, in which the class word stands alone; both by the name of the metric."""

    judge: Judge
    likeness: Mapping[str, ImageEncoder]
    agreement: Mapping[str, TextScorer]

    @property
    def names(self) -> dict[str, str]:
        """What measures each metric, with a hash of its weights."""
        judge = JudgeEncoder(self.judge).name
        by_judge = dict.fromkeys(("composition", "diversity", "copying", "consistency"), judge)
        likeness = {metric: encoder.name for metric, encoder in self.likeness.items()}
        return by_judge | likeness | {metric: scorer.name for metric, scorer in self.agreement.items()}


def score_pictures(
    images_BHWC: Pictures, prompts: Sequence[StudyPrompt], references_RHWC: Pictures, instruments: Instruments
) -> Scores:
    """Everything that is measured of stills.

    Args:
        images_BHWC: pictures of the prompts beside them.
        references_RHWC: the concept's pictures.

    Returns:
        `composition`: whether subject and all that was asked for are there; `subject`, `worn`, `setting`: each of them.
        By metric of likeness the mean cosine to the references, by metric of agreement that with the prompt.
        `diversity`: 1 - mean cosine of the judge's features to those of the prompt's other pictures. `copying`:
        metrics.copying, of the judge's features, which see the backdrop too.
    """
    right_BH = right_as_asked(instruments.judge.judge(to_pixels(images_BHWC)), prompts)
    scores = {"composition": np.nanmin(right_BH, axis=1)}
    scores |= dict(zip(("subject", "worn", "setting"), right_BH.T, strict=True))
    for name, encoder in instruments.likeness.items():
        scores[name] = (encoder.images(images_BHWC) @ encoder.images(references_RHWC).T).mean(axis=1)
    for name, scorer in instruments.agreement.items():
        scores[name] = scorer.agree(images_BHWC, [prompt.text(prompt.subject) for prompt in prompts])
    whole = JudgeEncoder(instruments.judge)
    unit_BD = whole.images(images_BHWC)
    scores |= {"diversity": diversity(unit_BD, prompts), "copying": copying(unit_BD, whole.images(references_RHWC))}
    return {name: [float(value) for value in values] for name, values in scores.items()}


def score_films(
    films_BFHWC: Pictures, prompts: Sequence[StudyPrompt], references_RHWC: Pictures, instruments: Instruments
) -> Scores:
    """Everything that is measured of films: means over the frames; steadiness and motion, worth nothing one by one.

    Returns:
        `composition`: whether all that was asked for is there in 12 of 16 frames; `right frames`: the share of such
        frames; likeness and agreement as for stills; `flow`: pixels a frame; `consistency`: VBench's subject
        consistency on the judge's features.
    """
    flow = dis_flow()
    scores: Scores = {}
    for film_FHWC, prompt in zip(films_BFHWC, prompts, strict=True):
        asked = [prompt] * len(film_FHWC)
        verdicts = instruments.judge.judge(to_pixels(film_FHWC))
        right = float(np.nanmin(right_as_asked(verdicts, asked), axis=1).mean())
        found = {"composition": float(right >= RIGHT_FRAMES), "right frames": right}
        for name, encoder in instruments.likeness.items():
            found[name] = float((encoder.images(film_FHWC) @ encoder.images(references_RHWC).T).mean())
        for name, scorer in instruments.agreement.items():
            found[name] = float(scorer.agree(film_FHWC, [prompt.text(prompt.subject)] * len(film_FHWC)).mean())
        found["flow"] = flow_magnitude(film_FHWC, flow)
        found["consistency"] = subject_consistency(verdicts.features_BD.numpy())
        for name, value in found.items():
            scores.setdefault(name, []).append(value)
    return scores


def right_as_asked(verdicts: Verdicts, prompts: Sequence[StudyPrompt]) -> Features:
    """For each picture and head 1 where it names what the prompt asks for, 0 where not, NaN where nothing was asked."""
    asked = [(prompt.subject, prompt.thing, prompt.setting) for prompt in prompts]
    wanted_BH = np.array([
        [-1 if name is None else CLASSES[head].index(name) for head, name in zip(HEADS, triple, strict=True)]
        for triple in asked
    ])  # fmt: skip
    return np.where(wanted_BH < 0, np.nan, (verdicts.labels_BH.numpy() == wanted_BH).astype(float))


def diversity(unit_BD: Features, prompts: Sequence[StudyPrompt]) -> Features:
    """1 - mean cosine of each picture to the others of its prompt; NaN where it is the only one."""
    cosine_BB = unit_BD @ unit_BD.T
    texts = np.array([prompt.template for prompt in prompts])
    same_BB = (texts[:, None] == texts[None]) & ~np.eye(len(texts), dtype=bool)
    others_B = np.where(same_BB.any(axis=1), same_BB.sum(axis=1), np.nan)
    return 1 - np.where(same_BB, cosine_BB, 0).sum(axis=1) / others_B
