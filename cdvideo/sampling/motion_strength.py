"""How strongly motion modules act, for each frame of each film."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cdvideo.motion.modules import MotionBlock, MotionModules
from cdvideo.sampling.keyframes import Curve


@contextmanager
def moving(motion: MotionModules, curves: Sequence[Curve], frames: Sequence[int], *, copies: int) -> Iterator[None]:
    """Within the block, what each motion module adds to a frame is multiplied by its film's curve there.

    At 1 everywhere nothing is touched, so that films are what they were to the bit; at 0 frames know nothing of each
    other.

    Args:
        curves: one for each film of the batch.
        frames: those that are computed now.
        copies: times that the films stand in the UNet's batch, one after the other: 2 with guidance.
    """
    if all(curve.is_always(1) for curve in curves):
        yield
        return
    strength_N = torch.tensor([curve.at(frame) for curve in curves for frame in frames] * copies)

    def scale(_module: nn.Module, inputs: tuple[Tensor, ...], moved_NCHW: Tensor) -> Tensor:
        still_NCHW = inputs[0]
        # As many as there are: until the first attention to text, guidance's copies are one.
        factor_N = strength_N[: len(still_NCHW)].to(still_NCHW).view(-1, *[1] * (still_NCHW.ndim - 1))
        return still_NCHW + factor_N * (moved_NCHW - still_NCHW)

    blocks = [module for module in motion.modules() if isinstance(module, MotionBlock)]
    hooks = [each.register_forward_hook(scale) for block in blocks for each in block.motion_modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
