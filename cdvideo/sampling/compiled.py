"""The video UNet as one graph that torch.compile has made: the same sums, fused, and on GPUs replayed at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cdvideo.errors import UserError
from cdvideo.motion.video_unet import VideoUNet
from cdvideo.sampling.keyframes import Curve

MOST_SHAPES = 64  # graphs kept at a time: one for each size, number of frames, of films and of copies


def compiled(
    video_unet: VideoUNet, moves: Sequence[Curve], *, device: torch.device, steady: bool
) -> Callable[..., Tensor]:
    """The UNet's call, compiled whole; a part that can not be traced is an error. Each new shape takes minutes.

    Args:
        moves: motion strength of each film.
        device: where it will be at work; now it may still rest in RAM.
        steady: whether nothing is carried from call to call; on GPUs the call is then a CUDA graph.

    Raises:
        UserError: motion strength, or motion modules of AnimateDiff v1: both are hooks that come and go within a film.
    """
    v1 = video_unet.motion.config.joint_image_norms
    if v1 or not all(move.is_always(1) for move in moves):
        raise UserError(
            f"{'motion modules of AnimateDiff v1' if v1 else 'motion strength'} with --compile",
            allowed="motion modules of v2 and later, at strength 1",
            do="leave --compile out",
        )
    mode = "reduce-overhead" if device.type == "cuda" and steady else None
    call = torch.compile(video_unet.__call__, fullgraph=True, dynamic=False, mode=mode)

    def call_and_keep(*inputs: Any, **options: Any) -> Tensor:
        # Hooks are looked at before a graph is taken again, which torch leaves out by itself.
        with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES, skip_nnmodule_hook_guards=False):
            return call(*inputs, **options).clone()  # a CUDA graph writes its next answer to the same place

    return call_and_keep
