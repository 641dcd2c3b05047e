"""Films that begin from another film, or from a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cdvideo.base.latents import encode_pixels
from cdvideo.base.loader import Base
from cdvideo.base.offload import at_work
from cdvideo.errors import UserError
from cdvideo.sampling.denoise import Start

if TYPE_CHECKING:
    from cdvideo.media.spool import Frame

ENCODE_CHUNK = 4  # frames encoded at once: what bounds the memory of encoding, whatever the film's length


def start_from_video(
    base: Base, clip: Iterable[Frame], *, frames: int, height: int, width: int, strength: float
) -> Start:
    """A film in place of another one: its frames, noised as of a step at `strength` (SDEdit, arXiv 2108.01073).

    Args:
        clip: frame_HWC, uint8 RGB, read one by one; what exceeds `frames` is left.
        height, width: the film's, in pixels; the clip's frames are cut to that shape around their middle.
        strength: share of the denoising that is done, above 0 to 1; 1 keeps nothing of the clip.

    Raises:
        UserError: a clip shorter than the film.
    """
    latents_FCHW = encode_frames(base, islice(clip, frames), height=height, width=width)
    if len(latents_FCHW) < frames:
        raise UserError(
            f"a clip of {len(latents_FCHW)} frames for a film of {frames}",
            allowed="a clip as long as the film, or longer",
            do=f"ask for --frames {len(latents_FCHW)}, or give a longer clip",
        )
    return Start(latents_FCHW.unsqueeze(0), strength)


def start_from_picture(
    base: Base, picture: Frame, *, frames: int, height: int, width: int, strength: float, fade: float
) -> Start:
    """A film whose first frame is a picture, as the base's autoencoder gives it back.

    All frames begin as the picture, noised as of a step at `strength`; and at each step the first is put back to the
    picture at that step's noise, the second held by `fade`, the third by its square, and so on.

    Args:
        fade: from 0, the first frame alone, to below 1.
    """
    latents_FCHW = encode_frames(base, [picture], height=height, width=width)
    held_F111 = (fade ** torch.arange(frames)).view(-1, 1, 1, 1).to(latents_FCHW.device)
    return Start(latents_FCHW.unsqueeze(0).expand(-1, frames, -1, -1, -1), strength, held_F111)


@torch.inference_mode()
def encode_frames(base: Base, frames: Iterable[Frame], *, height: int, width: int) -> Tensor:
    """latents_FCHW, float32, of frames that are read and encoded a few at a time."""

    def chunks() -> Iterator[Tensor]:
        iterator = iter(frames)
        while chunk := list(islice(iterator, ENCODE_CHUNK)):
            images = [ImageOps.fit(Image.fromarray(f), (width, height), Image.Resampling.LANCZOS) for f in chunk]
            pixels_BHWC = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
            yield encode_pixels(base.vae, pixels_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1).float()

    with base.in_use, at_work(base.device, base.vae):
        parts = list(chunks())
    if not parts:
        raise UserError("a clip of 0 frames", allowed="at least 1 frame", do="give another clip")
    return torch.cat(parts)
