"""Films of any length: overlapping windows over the whole UNet, each a film that the motion modules reach.

At every step each window's frames are denoised as a film of their own, and where windows overlap the predictions are
averaged: MultiDiffusion (arXiv 2302.08113, equation 5) along time. Only one window is on the device at a time.

Windows move from step to step, as in AnimateDiff's command line and in ComfyUI-AnimateDiff-Evolved (context.py there:
`uniform` is its standard_uniform, `looped` its looped_uniform with a closed loop, `static` its standard_static, and
the pyramid its fuse method; its dilated windows, of every second and fourth frame, are not here). diffusers' FreeNoise
has static windows inside of the motion modules alone, at 4 times the work where windows of 16 lie 4 apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cdvideo.errors import UserError
from cdvideo.sampling.denoise import Predict
from cdvideo.sampling.options import Windows

DEFAULT_SIZE = 16  # frames; what AnimateDiff's motion modules were trained with, and the embedded ones too
Window = tuple[int, ...]  # the frames that it shows, in order


def window_size(frames: int, reach: int, windows: Windows) -> int:
    """Frames of a window; `frames` itself where the film is denoised at once.

    Args:
        reach: the longest film that the motion modules make at once.

    Raises:
        UserError: windows longer than that.
    """
    if windows.size is not None and windows.size > reach:
        raise UserError(
            f"windows of {windows.size} frames",
            allowed=f"2 to {reach} frames: the length of the motion modules' position table",
            do=f"choose windows.size={min(reach, DEFAULT_SIZE)}",
        )
    size = (frames if frames <= reach else min(DEFAULT_SIZE, reach)) if windows.size is None else windows.size
    if windows.overlap >= size < frames:
        raise UserError(
            f"windows of {size} frames that share {windows.overlap}",
            allowed=f"an overlap of 0 to {size - 1} frames",
            do=f"choose windows.overlap={size // 4}",
        )
    return min(size, frames)


def windows_at(step: int, *, frames: int, size: int, windows: Windows) -> list[Window]:
    """The windows of a step; together they show every frame."""
    stride = size - windows.overlap
    if windows.schedule == "looped":
        return looped_windows(frames, size, stride, turn=halving(step))
    return straight_windows(frames, size, stride, turn=halving(step) if windows.schedule == "uniform" else 0.0)


def straight_windows(frames: int, size: int, stride: int, *, turn: float) -> list[Window]:
    """Windows every `stride` frames, moved back by `turn` (0 to 1) of it; those that would stick out are moved in."""
    starts = range(-int(turn * stride), frames - size + stride, stride)
    inside = dict.fromkeys(min(max(start, 0), frames - size) for start in starts)
    return [tuple(range(start, start + size)) for start in inside]


def looped_windows(frames: int, size: int, stride: int, *, turn: float) -> list[Window]:
    """Windows at most `stride` apart, evenly around a film whose end is its beginning, turned by a share of it.

    A film of one window's length is one window, whose seam lies somewhere else at every step.
    """
    count = 1 if frames == size else -(-frames // stride)
    starts = [int(turn * frames) + round(index * frames / count) for index in range(count)]
    return [tuple((start + offset) % frames for offset in range(size)) for start in starts]


def halving(step: int) -> float:
    """0, 1/2, 1/4, 3/4, 1/8, ...: van der Corput's sequence in base 2, which spreads over [0, 1) at any length."""
    share, value = 0.5, 0.0
    while step:
        value += share * (step & 1)
        step, share = step >> 1, share / 2
    return value


def blend_weights(size: int, windows: Windows) -> Tensor:
    """weights_F of a window's frames: flat, or a pyramid 1, 2, ..., 2, 1 (FreeNoise, arXiv 2310.15169, section 4.2)."""
    if windows.blend == "flat":
        return torch.ones(size)
    rising = torch.arange(1, size + 1)
    return torch.minimum(rising, rising.flip(0)).float()


def windowed(
    predict_at: Callable[[Window], Predict], list_windows: Callable[[int], Sequence[Window]], weights_F: Tensor
) -> Predict:
    """Predicts for whole films what a model says of their windows, averaged where they overlap.

    Args:
        predict_at: the model for a window's frames; it sees latents_BFCHW of these alone, wherever it computes, and its
            answer is brought back.
        list_windows: the windows of a step, all of one size.
        weights_F: of a window's frames, in the average.
    """

    def predict_film(latents_BFCHW: Tensor, timestep: Tensor, step: int) -> Tensor:
        windows = list_windows(step)
        total_F = torch.zeros(latents_BFCHW.shape[1])
        for window in windows:
            total_F[list(window)] += weights_F
        assert (total_F > 0).all(), "every frame is in some window"
        mean_BFCHW = torch.zeros_like(latents_BFCHW)
        for window in windows:
            frames = list(window)
            predicted_BFCHW = predict_at(window)(latents_BFCHW[:, frames], timestep, step).to(mean_BFCHW.device)
            shares_F111 = (weights_F / total_F[frames]).view(-1, 1, 1, 1).to(mean_BFCHW.device)
            mean_BFCHW[:, frames] += predicted_BFCHW * shares_F111
        return mean_BFCHW

    return predict_film
