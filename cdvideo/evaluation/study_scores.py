"""What is measured of the pictures of one method and one concept: one number for each picture and metric."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cdvideo.evaluation.bench import to_pixels
from cdvideo.evaluation.drawing import Pictures
from cdvideo.evaluation.identity_model import IdentityNet
from cdvideo.evaluation.judge_model import CLASSES, HEADS, Judge, Verdicts
from cdvideo.evaluation.metrics import dis_flow, flow_magnitude, subject_consistency
from cdvideo.evaluation.study_prompts import StudyPrompt

Features: TypeAlias = NDArray[np.floating]
EncodeImages: TypeAlias = Callable[[Pictures], Features]  # images_BHWC -> features_BD
Scores: TypeAlias = dict[str, list[float]]  # metric -> one number for each picture; NaN where it was not asked for

RIGHT_FRAMES = 0.75  # of a film's frames must show all that was asked for: 12 of 16


def score_pictures(
    images_BHWC: Pictures,
    prompts: Sequence[StudyPrompt],
    references_RHWC: Pictures,
    *,
    judge: Judge,
    encoders: Mapping[str, EncodeImages],
) -> Scores:
    """Composition by the judge, and likeness to the concept's own pictures by each encoder.

    Args:
        images_BHWC: pictures of the prompts beside them; those of one prompt stand together.
        references_RHWC: the concept's pictures.
        encoders: by the name of the metric that they give.

    Returns:
        `composition`: whether subject and all that was asked for are there; `subject`, `worn`, `setting`: each of
        them. By encoder `<name>`: mean cosine to the references; `<name>, nearest`: the largest one; `<name>,
        diversity`: 1 - mean cosine to the other pictures of the same prompt.
    """
    right_BH = right_as_asked(judge.judge(to_pixels(images_BHWC)), prompts)
    scores = {"composition": np.nanmin(right_BH, axis=1)}
    scores |= dict(zip(("subject", "worn", "setting"), right_BH.T, strict=True))
    for name, encode in encoders.items():
        unit_BD = unit(encode(images_BHWC))
        cosine_BR = unit_BD @ unit(encode(references_RHWC)).T
        scores |= {name: cosine_BR.mean(axis=1), f"{name}, nearest": cosine_BR.max(axis=1)}
        scores[f"{name}, diversity"] = diversity(unit_BD, prompts)
    return {name: [float(value) for value in values] for name, values in scores.items()}


def score_films(
    films_BFHWC: Pictures,
    prompts: Sequence[StudyPrompt],
    references_RHWC: Pictures,
    *,
    judge: Judge,
    encoders: Mapping[str, EncodeImages],
) -> Scores:
    """The same of films: means over the frames, beside steadiness and motion, which say nothing without each other.

    Returns:
        `composition`: whether all that was asked for is there in 12 of 16 frames; `right frames`: the share of such
        frames; by encoder `<name>`: mean cosine of the frames to the references; `flow`: pixels a frame;
        `consistency`: VBench's subject consistency on the judge's features.
    """
    flow = dis_flow()
    scores: Scores = {name: [] for name in ("composition", "right frames", "flow", "consistency", *encoders)}
    for film_FHWC, prompt in zip(films_BFHWC, prompts, strict=True):
        verdicts = judge.judge(to_pixels(film_FHWC))
        right = float(np.nanmin(right_as_asked(verdicts, [prompt] * len(film_FHWC)), axis=1).mean())
        scores["right frames"].append(right)
        scores["composition"].append(float(right >= RIGHT_FRAMES))
        scores["flow"].append(flow_magnitude(film_FHWC, flow))
        scores["consistency"].append(subject_consistency(verdicts.features_BD.numpy()))
        for name, encode in encoders.items():
            scores[name].append(float((unit(encode(film_FHWC)) @ unit(encode(references_RHWC)).T).mean()))
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


def encode_with(net: IdentityNet) -> EncodeImages:
    """The identity encoder, as scores take it."""

    @torch.inference_mode()
    def encode(images_BHWC: Pictures) -> Features:
        device = next(net.parameters()).device
        return np.concatenate([net(part.to(device)).cpu().numpy() for part in to_pixels(images_BHWC).split(64)])

    return encode


def unit(features_BD: Features) -> Features:
    return features_BD / np.linalg.norm(features_BD, axis=1, keepdims=True)


def weights_digest(model: nn.Module) -> str:
    """What tells one instrument from another of its kind: a short digest of its weights."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:10]
