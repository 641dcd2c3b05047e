"""Films from a prompt: the image UNet with motion modules, on a compiled prompt."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cdvideo.base.latents import decode_latents
from cdvideo.base.loader import Base
from cdvideo.base.schedule import SamplerName, make_scheduler
from cdvideo.concept.adapters import tuned
from cdvideo.concept.concept import Concept
from cdvideo.motion.modules import MotionModules
from cdvideo.motion.video_unet import VideoUNet
from cdvideo.sampling.denoise import denoise, draw_noise, guided_prompts, latent_size
from cdvideo.sampling.prompt_kv import compile_prompts, reading

DECODE_CHUNK = 4  # frames decoded at once: what bounds the memory of decoding, whatever the film's length


@torch.inference_mode()
def sample_video(
    base: Base,
    motion: MotionModules,
    prompt: str,
    *,
    seed: int,
    concept: Concept | None = None,
    negative_prompt: str = "",
    frames: int = 16,
    steps: int = 25,
    guidance: float = 5.0,
    scheduler: SamplerName = "ddim",
    width: int | None = None,
    height: int | None = None,
    progress: bool = False,
) -> npt.NDArray[np.uint8]:
    """One film. The same seed gives the same bytes on the same machine.

    Args:
        motion: on the base's device, in its dtype.
        width, height: in pixels; None is the base's own resolution.

    Returns:
        frames_FHWC: RGB.

    Raises:
        UserError: more frames than the motion modules reach, motion modules of another base, or an odd size.
    """
    video_unet = VideoUNet(base.unet, motion)
    noise_BFCHW = draw_noise([seed], (frames, base.unet.config.in_channels, *latent_size(base, width, height)))
    size, read = (
        (height or base.resolution, width or base.resolution),
        guided_prompts([prompt], negative_prompt, guidance),
    )
    compiled = compile_prompts(base, read, concept=concept, size=size)

    def predict(latents_BFCHW: Tensor, timestep: Tensor) -> Tensor:
        return video_unet(latents_BFCHW.to(base.dtype), timestep, None, compiled.added).float()

    with tuned(base.unet, concept), reading(base.unet, compiled):
        latents_BFCHW = denoise(
            predict,
            noise_BFCHW.to(base.device),
            make_scheduler({**base.scheduler_config, **motion.config.schedule}, scheduler),
            steps=steps,
            guidance=guidance,
            progress=progress,
        )
    return decode_frames(base, latents_BFCHW[0])


def decode_frames(base: Base, latents_FCHW: Tensor) -> npt.NDArray[np.uint8]:
    """Decodes a film a few frames at a time; only uint8 frames are kept.

    Returns:
        frames_FHWC
    """
    return np.concatenate([to_uint8(decode_latents(base.vae, part)) for part in latents_FCHW.split(DECODE_CHUNK)])


def to_uint8(pixels_BCHW: Tensor) -> npt.NDArray[np.uint8]:
    """Pixels in [-1, 1] to the nearest of 256 levels: frames_BHWC."""
    levels_BCHW = ((pixels_BCHW + 1) * 127.5).round().clamp(0, 255)
    return levels_BCHW.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
