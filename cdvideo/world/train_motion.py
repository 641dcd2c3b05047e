"""Train the base's motion modules on the world's clips, over the frozen image UNet (AnimateDiff, arXiv 2307.04725)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import nn
from transformers import CLIPTokenizer

from cdvideo.base.folder import load_text_encoder
from cdvideo.base.latents import decode_latents
from cdvideo.base.loader import weights_hash
from cdvideo.base.schedule import add_noise, make_scheduler, training_target
from cdvideo.motion.files import load_motion, save_motion
from cdvideo.motion.modules import MotionModules
from cdvideo.motion.video_unet import VideoUNet
from cdvideo.world.config import MakeBaseConfig
from cdvideo.world.denoising import (
    PROMPTS,
    SCHEDULER_CONFIG,
    pick_captions,
    prompt_ids,
    quick_samples,
    weighted_loss,
)
from cdvideo.world.muon import make_optimizers
from cdvideo.world.training import Average, Limits, Stage, autocast, load_array, save_grid


def build_motion(config: MakeBaseConfig, unet: UNet2DConditionModel) -> MotionModules:
    """Modules with zero output projections, so films begin as the image UNet's; joint GroupNorm as in diffusers."""
    return MotionModules.for_unet(
        unet,
        motion_num_attention_heads=config.motion.heads,
        motion_max_seq_length=config.motion.max_frames,
        use_motion_mid_block=False,
        norm_mode="diffusers",
    )


def train_motion(config: MakeBaseConfig, device: torch.device, limits: Limits) -> dict[str, Any]:
    """Trains, saves model/motion, and returns the recorded facts."""
    torch.manual_seed(config.seed)
    folder, loop = config.out / "motion", config.motion.loop
    model = config.out / "model"
    vae = AutoencoderTiny.from_pretrained(model / "vae").to(device)
    text_encoder = load_text_encoder(model / "text_encoder").to(device).eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    unet = UNet2DConditionModel.from_pretrained(model / "unet").to(device).eval().requires_grad_(False)
    if (
        device.type == "cuda"
    ):  # on the CPU the backward of a frozen GroupNorm crashes on channels-last input (torch 2.13)
        unet = unet.to(memory_format=torch.channels_last)
    latents_NFCHW = load_array(config.cache / "clips" / "latents.npy", device)
    ids_NKL = load_array(config.cache / "clips" / "caption_ids.npy", device)
    empty_L = prompt_ids(tokenizer, [""])[0].to(device)

    earlier = model / "motion"
    motion = load_motion(earlier, device=device) if earlier.is_dir() else build_motion(config, unet).to(device)
    motion = motion.train().requires_grad_(True)
    motion.gradient_checkpointing = config.motion.gradient_checkpointing
    average = Average(motion, decay=loop.ema)
    optimizers = make_optimizers(motion, lr=loop.lr)
    generator = torch.Generator(device).manual_seed(config.seed)
    models = {"motion": motion, "average": average.model}
    stage = Stage(folder, loop=loop, models=models, optimizers=optimizers, generator=generator, limits=limits)
    scheduler = make_scheduler(SCHEDULER_CONFIG)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    walk = VideoUNet(unet, motion)
    predict = torch.compile(walk.__call__, dynamic=False) if loop.compile else walk
    ones_B11111 = torch.ones(loop.batch, 1, 1, 1, 1, device=device)

    for step in stage.steps():
        picks_B = torch.randint(len(latents_NFCHW), (loop.batch,), generator=generator, device=device)
        latents_BFCHW = latents_NFCHW[picks_B].float()
        timesteps_B = torch.randint(1000, (loop.batch,), generator=generator, device=device)
        noise_BFCHW = torch.randn(latents_BFCHW.shape, generator=generator, device=device)
        ids_BL = pick_captions(
            ids_NKL,
            picks_B,
            empty_L,
            empty=config.unet.empty_captions,
            noisy=config.unet.noisy_captions,
            generator=generator,
        )
        noisy_BFCHW = add_noise(scheduler, latents_BFCHW, noise_BFCHW, timesteps_B)
        target_BFCHW = training_target(scheduler, latents_BFCHW, noise_BFCHW, timesteps_B)
        with autocast(device, config.dtype):
            with torch.no_grad():
                text_BLD = text_encoder(input_ids=ids_BL).last_hidden_state
            predicted_BFCHW = predict(noisy_BFCHW, timesteps_B, text_BLD)
        loss = weighted_loss(
            scheduler, predicted_BFCHW, target_BFCHW, timesteps_B, ones_B11111, gamma=config.unet.gamma
        )
        loss.backward()
        nn.utils.clip_grad_norm_(motion.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update(step)
        stage.log(loss=loss.detach())
        if stage.wants_samples:
            shape = tuple(latents_NFCHW.shape[1:])
            with autocast(device, config.dtype):
                films_BFCHW = quick_samples(
                    VideoUNet(unet, average.model), text_encoder, tokenizer, shape, prompts=PROMPTS[:6]
                )
            frames_BCHW = decode_latents(vae, films_BFCHW[:, ::2].flatten(0, 1))
            save_grid(frames_BCHW, folder / "samples" / f"{step + 1:06d}.png", columns=-(-shape[0] // 2))

    average.model.config = replace(average.model.config, trained_for=weights_hash(model))
    save_motion(average.model, model / "motion")
    return {"steps": stage.step, "of": stage.total, "seconds": stage.seconds, "batch": loop.batch}
