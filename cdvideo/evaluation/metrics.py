"""Metrics on arrays: no model is loaded here; who compares features brings them along."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]  # frames_FHWC or images_BHWC, RGB
Floats = NDArray[np.floating]
Flow = Callable[[NDArray[np.uint8], NDArray[np.uint8]], Floats]  # two grey pictures (H, W) to (H, W, 2) in pixels


def psnr(images_BHWC: Frames, again_BHWC: Frames) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio of every picture in dB: 10 log10(255^2 / mean squared error)."""
    assert images_BHWC.shape == again_BHWC.shape and images_BHWC.dtype == again_BHWC.dtype == np.uint8
    difference = images_BHWC.astype(np.float64) - again_BHWC.astype(np.float64)
    return 10 * np.log10(255**2 / np.maximum((difference**2).mean(axis=(1, 2, 3)), 1e-6))


def subject_consistency(features_FD: Floats) -> float:
    """How alike a film's frames are: mean over i >= 1 of (max(0, cos(i, i-1)) + max(0, cos(i, 0))) / 2.

    VBench (arXiv 2311.17982), subject consistency; there the features are DINO's. A still film scores 1, so the figure
    is worth nothing without one of motion beside it.
    """
    assert len(features_FD) >= 2, "a film has two frames at least"
    unit_FD = features_FD / np.linalg.norm(features_FD, axis=1, keepdims=True)
    previous = (unit_FD[1:] * unit_FD[:-1]).sum(axis=1)
    first = unit_FD[1:] @ unit_FD[0]
    return float((np.maximum(0, previous) + np.maximum(0, first)).mean() / 2)


def flow_magnitude(frames_FHWC: Frames, flow: Flow) -> float:
    """Mean length of the optical flow over all pixels and neighbouring frames, in pixels a frame."""
    grey_FHW = (frames_FHWC.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)).round()
    grey_FHW = grey_FHW.clip(0, 255).astype(np.uint8)
    lengths = [np.linalg.norm(flow(a, b), axis=-1).mean() for a, b in zip(grey_FHW, grey_FHW[1:], strict=False)]
    return float(np.mean(lengths))


def dis_flow() -> Flow:
    """Dense inverse search (Kroeger et al., arXiv 1603.03590) in OpenCV: optical flow without learned weights."""
    import cv2

    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return lambda before_HW, after_HW: search.calc(before_HW, after_HW, None)  # type: ignore[call-overload]


def copying(unit_BD: Floats, references_RD: Floats) -> Floats:
    """How much nearer each drawn picture is to one of the concept's own than these are to each other.

    The largest cosine to one of the concept's pictures, less the mean over these of their largest cosine to another of
    them. About 0 or below: as different as they are themselves. Above: drawn after one of them. The features must see
    the whole picture; for those of identity alone every good likeness is a copy.

    Args:
        unit_BD: unit features of drawn pictures.
        references_RD: unit features of the concept's pictures, two at least.
    """
    assert len(references_RD) >= 2, "copying is measured against what two pictures have in common"
    among_RR = references_RD @ references_RD.T - 3 * np.eye(len(references_RD))
    return (unit_BD @ references_RD.T).max(axis=1) - among_RR.max(axis=1).mean()


def class_margins(features: Sequence[Floats]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How well classes keep together in a feature space.

    Args:
        features: (N_c, D) for each class, two phrases or more.

    Returns:
        Per class the mean cosine between two different phrases of it, and the mean cosine of its phrases to those of
        the nearest other class.
    """
    units = [f / np.linalg.norm(f, axis=1, keepdims=True) for f in features]
    cosine = np.array([[float((a @ b.T).mean()) for b in units] for a in units])
    counts = np.array([len(f) for f in features])
    assert (counts >= 2).all(), "a class needs two phrases"
    within = (cosine.diagonal() * counts - 1) / (counts - 1)  # the mean without each phrase's cosine to itself, 1
    others = cosine - 2 * np.eye(len(features)) * np.abs(cosine).max()
    return within, others.max(axis=1)
