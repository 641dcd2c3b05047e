"""cdvideo: teach a text-to-image model one thing from a few photos, keep the meaning of its class, and film it.

Names of tensors carry their shape:

    B  batch           C  channels           L  text tokens           K  rows of a concept token
    F  frames          H, W  height, width   D  width of the text     R  rank of a low-rank adapter

so `latents_BFCHW` is a batch of films in latent space. Pixels are float32 in [-1, 1], latents are scaled by the VAE's
`scaling_factor`, frames for export are uint8 in [0, 255].

Importing the package loads no torch; each public name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdvideo.base.loader import Base, load_base
    from cdvideo.concept.concept import Concept
    from cdvideo.concept.file import load_concept
    from cdvideo.concept.trainer import train_concept
    from cdvideo.config import load_config
    from cdvideo.errors import UserError
    from cdvideo.media.export import write_video
    from cdvideo.motion.video_unet import VideoUNet
    from cdvideo.sampling.image import sample_images
    from cdvideo.sampling.options import FilmSettings
    from cdvideo.sampling.prompt_kv import compile_prompts
    from cdvideo.sampling.video import Film, sample_video, sample_videos

__version__ = "0.1.0"

_HOMES = {
    "Base": "base.loader",
    "Concept": "concept.concept",
    "Film": "sampling.video",
    "FilmSettings": "sampling.options",
    "UserError": "errors",
    "VideoUNet": "motion.video_unet",
    "compile_prompts": "sampling.prompt_kv",
    "load_base": "base.loader",
    "load_concept": "concept.file",
    "load_config": "config",
    "sample_images": "sampling.image",
    "sample_video": "sampling.video",
    "sample_videos": "sampling.video",
    "train_concept": "concept.trainer",
    "write_video": "media.export",
}

__all__ = [
    "Base",
    "Concept",
    "Film",
    "FilmSettings",
    "UserError",
    "VideoUNet",
    "compile_prompts",
    "load_base",
    "load_concept",
    "load_config",
    "sample_images",
    "sample_video",
    "sample_videos",
    "train_concept",
    "write_video",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
