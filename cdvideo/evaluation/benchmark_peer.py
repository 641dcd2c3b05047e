"""diffusers' side of the benchmarks: AnimateDiffPipeline on the weights of a base of ours, from the same noise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import init_empty_weights
from diffusers import AnimateDiffPipeline, AutoencoderKL, DDIMScheduler, MotionAdapter
from diffusers.utils import logging as diffusers_logging
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers.utils import logging as transformers_logging

from cdvideo.base.latents import Vae
from cdvideo.base.loader import TINY_BASE, Base
from cdvideo.device import pick_dtype, use_device
from cdvideo.evaluation.benchmark_films import RANDOM_SD15, Film
from cdvideo.evaluation.benchmark_random import random_sd15
from cdvideo.motion.files import load_motion
from cdvideo.motion.modules import MotionModules
from cdvideo.sampling.denoise import draw_noise

Run = Callable[[int], npt.NDArray[Any]]  # of a seed: frames_FHWC, or of several films latents_BFCHW


def documented(film: Film) -> Run:
    """As in the page of AnimateDiffPipeline; without its offloading to the CPU, which trades time for memory."""
    pipeline = load_pipeline(film)
    pipeline.vae.enable_slicing()
    return partial(_make, pipeline, film)


def best(film: Film) -> Run:
    """As in the pages on acceleration: channels_last, fused projections, the UNet compiled as one graph."""
    pipeline = load_pipeline(film)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    pipeline.fuse_qkv_projections(vae=isinstance(pipeline.vae, AutoencoderKL))
    mode = "max-autotune" if pipeline.device.type == "cuda" else None  # it tunes kernels for GPUs
    pipeline.unet = torch.compile(pipeline.unet, mode=mode, fullgraph=True)
    return partial(_make, pipeline, film)


def load_pipeline(film: Film) -> Any:
    """AnimateDiffPipeline with DDIM, on the device, in the dtype."""
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    device = use_device(film.device)
    dtype = pick_dtype(film.dtype, device)
    if film.base == RANDOM_SD15:
        pipeline = pipeline_on(*random_sd15(device, dtype))
    else:
        folder = TINY_BASE if film.base == "tiny" else Path(film.base).expanduser()
        schedule = load_motion(folder / "motion", device=torch.device("cpu")).config.schedule
        adapter = MotionAdapter.from_pretrained(folder / "motion", torch_dtype=dtype)
        pipeline = AnimateDiffPipeline.from_pretrained(folder, motion_adapter=adapter, torch_dtype=dtype)
        pipeline.scheduler = DDIMScheduler.from_config({**pipeline.scheduler.config, **schedule})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def pipeline_on(base: Base, motion: MotionModules) -> Any:
    """AnimateDiffPipeline on these weights. Its UNet is a copy, which is made on their device."""
    with init_empty_weights():
        adapter = MotionAdapter(  # all else is its default, and ours
            block_out_channels=motion.config.block_out_channels,
            motion_layers_per_block=motion.config.motion_layers_per_block,
            motion_max_seq_length=motion.max_frames,
        )
    adapter.load_state_dict(motion.state_dict(), assign=True)
    scheduler = DDIMScheduler.from_config(base.scheduler_config)  # whose tables diffusers keeps on the CPU
    with base.device:
        return AnimateDiffPipeline(
            vae=base.vae,
            text_encoder=base.text_encoder,
            tokenizer=base.tokenizer,
            unet=base.unet,
            motion_adapter=adapter,
            scheduler=scheduler,
            feature_extractor=None,
        )


def _make(pipeline: Any, film: Film, seed: int) -> npt.NDArray[np.uint8]:
    """A film from the noise that our sampler draws for the seed."""
    frames = call(pipeline, film, seed).frames[0]
    return np.stack([np.asarray(frame) for frame in frames])


def call(pipeline: Any, film: Film, seed: int, **options: Any) -> Any:
    """What the pipeline answers, asked for a film from the noise that our sampler draws for the seed."""
    pixels = pipeline.vae_scale_factor
    native = pipeline.unet.config.sample_size * pixels
    height, width = film.height or native, film.width or native
    shape = (film.frames, pipeline.unet.config.in_channels, height // pixels, width // pixels)
    return pipeline(
        film.prompt,
        negative_prompt="",
        num_frames=film.frames,
        height=height,
        width=width,
        num_inference_steps=film.steps,
        guidance_scale=film.guidance,
        latents=draw_noise([seed], shape).transpose(1, 2).to(pipeline.device, pipeline.dtype),
        **options,
    )


@torch.inference_mode()
def decode(vae: Vae, latents_FCHW: Tensor) -> npt.NDArray[np.uint8]:
    """The end of AnimateDiffPipeline.__call__: all frames as float32 on the device, then pictures."""
    pipeline: Any = SimpleNamespace(vae=vae)  # all that its decode_latents looks at
    video_BCFHW = AnimateDiffPipeline.decode_latents(pipeline, latents_FCHW.transpose(0, 1)[None])
    processor = VideoProcessor(vae_scale_factor=2 ** (len(vae.config.block_out_channels) - 1))
    frames = processor.postprocess_video(video=video_BCFHW, output_type="pil")[0]
    return np.stack([np.asarray(frame) for frame in frames])
