"""Train the base's image UNet on the world's latents, from scratch, with the frozen text encoder."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import nn
from transformers import CLIPTokenizer

from cdvideo.base.folder import load_text_encoder
from cdvideo.base.latents import decode_latents
from cdvideo.base.schedule import add_noise, make_scheduler, training_target
from cdvideo.world.config import MakeBaseConfig
from cdvideo.world.denoising import (
    SCHEDULER_CONFIG,
    pick_captions,
    prompt_ids,
    quick_samples,
    weighted_loss,
)
from cdvideo.world.muon import make_optimizers
from cdvideo.world.training import Average, Limits, Stage, autocast, load_array, save_grid


def build_unet(config: MakeBaseConfig) -> UNet2DConditionModel:
    levels, shape = len(config.unet.channels), config.unet
    return UNet2DConditionModel(
        sample_size=config.resolution // 8,
        in_channels=config.vae.latent_channels,
        out_channels=config.vae.latent_channels,
        block_out_channels=shape.channels,
        layers_per_block=shape.layers,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        norm_num_groups=shape.norm_groups,
        attention_head_dim=shape.heads,  # diffusers' name for the number of heads, kept from Stable Diffusion 1
        cross_attention_dim=config.text.width,
    )


def train_unet(config: MakeBaseConfig, device: torch.device, limits: Limits) -> dict[str, Any]:
    """Trains, saves model/unet and model/scheduler, and returns the recorded facts."""
    torch.manual_seed(config.seed)
    folder, settings, loop = config.out / "unet", config.unet, config.unet.loop
    model = config.out / "model"
    vae = AutoencoderTiny.from_pretrained(model / "vae").to(device)
    text_encoder = load_text_encoder(model / "text_encoder").to(device).eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    latents_NCHW = load_array(config.cache / "train" / "latents.npy", device)
    masks_NHW = load_array(config.cache / "train" / "masks.npy", device)
    ids_NKL = load_array(config.cache / "train" / "caption_ids.npy", device)
    empty_L = prompt_ids(tokenizer, [""])[0].to(device)

    earlier = model / "unet"
    unet = UNet2DConditionModel.from_pretrained(earlier) if earlier.is_dir() else build_unet(config)
    unet = unet.to(device, memory_format=torch.channels_last).train()
    average = Average(unet, decay=loop.ema)
    optimizers = make_optimizers(unet, lr=loop.lr)
    generator = torch.Generator(device).manual_seed(config.seed)
    models = {"unet": unet, "average": average.model}
    stage = Stage(folder, loop=loop, models=models, optimizers=optimizers, generator=generator, limits=limits)
    scheduler = make_scheduler(SCHEDULER_CONFIG)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    predict = torch.compile(unet, dynamic=False) if loop.compile else unet

    for step in stage.steps():
        picks_B = torch.randint(len(latents_NCHW), (loop.batch,), generator=generator, device=device)
        latents_BCHW = latents_NCHW[picks_B].float().contiguous(memory_format=torch.channels_last)
        timesteps_B = torch.randint(1000, (loop.batch,), generator=generator, device=device)
        noise_BCHW = torch.randn(latents_BCHW.shape, generator=generator, device=device)
        ids_BL = pick_captions(
            ids_NKL, picks_B, empty_L, empty=settings.empty_captions, noisy=settings.noisy_captions, generator=generator
        )
        noisy_BCHW = add_noise(scheduler, latents_BCHW, noise_BCHW, timesteps_B)
        target_BCHW = training_target(scheduler, latents_BCHW, noise_BCHW, timesteps_B)
        with autocast(device, config.dtype):
            with torch.no_grad():
                text_BLD = text_encoder(input_ids=ids_BL).last_hidden_state
            predicted_BCHW = predict(noisy_BCHW, timesteps_B, text_BLD, return_dict=False)[0]
        subject_B1HW = masks_NHW[picks_B].float().div(255)[:, None]
        weight_B1HW = 1 + (settings.subject_weight - 1) * subject_B1HW
        loss = weighted_loss(scheduler, predicted_BCHW, target_BCHW, timesteps_B, weight_B1HW, gamma=settings.gamma)
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update(step)
        stage.log(loss=loss.detach())
        if stage.wants_samples:
            with autocast(device, config.dtype):
                samples_BCHW = quick_samples(
                    lambda latents, timestep, text: average.model(latents, timestep, text).sample,
                    text_encoder,
                    tokenizer,
                    tuple(latents_NCHW.shape[1:]),
                )
            save_grid(decode_latents(vae, samples_BCHW), folder / "samples" / f"{step + 1:06d}.png", columns=4)

    average.model.save_pretrained(model / "unet")
    scheduler.save_pretrained(model / "scheduler")
    return {"steps": stage.step, "of": stage.total, "seconds": stage.seconds, "batch": loop.batch}
