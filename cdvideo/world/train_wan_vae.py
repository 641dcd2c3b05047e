"""Train the embedded Wan's autoencoder on single frames and short clips, and encode the rendered world with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from einops import rearrange
from torch import Tensor

from cdvideo.models.wan.vae import decode_pixels, encode_moments, normalised
from cdvideo.runs import atomic_path
from cdvideo.world.config import MakeBaseConfig
from cdvideo.world.dataset import SPLITS, progress
from cdvideo.world.muon import make_optimizers
from cdvideo.world.train_vae import reconstruction_loss, vae_fingerprint
from cdvideo.world.training import Average, Limits, Stage, autocast, load_array, save_grid
from cdvideo.world.wan_parts import build_vae

ENCODE_FRAMES = 1024  # frames that are encoded at once


def train_wan_vae(config: MakeBaseConfig, device: torch.device, limits: Limits) -> dict[str, Any]:
    """Train, save model-wan/vae with its channels' moments, and return the recorded facts, held-out PSNR included."""
    torch.manual_seed(config.seed)
    settings, loop = config.wan_vae, config.wan_vae.loop
    folder = config.out / "model-wan" / "vae"
    vae = AutoencoderKLWan.from_pretrained(folder) if folder.is_dir() else build_vae(settings)
    vae = to_device(vae, device)
    average = Average(vae, decay=loop.ema)
    generator = torch.Generator(device).manual_seed(config.seed)
    optimizers = make_optimizers(vae, lr=loop.lr, edges=("conv_in", "conv_out", "quant_conv"))
    models = {"vae": vae, "average": average.model}
    stage = Stage(
        config.out / "wan-vae", loop=loop, models=models, optimizers=optimizers, generator=generator, limits=limits
    )
    stills_NHWC = load_array(config.cache / "train" / "pixels.npy", device)
    clips_NFHWC = load_array(config.cache / "clips" / "pixels.npy", device)
    heldout_NHWC = load_array(config.cache / "heldout" / "pixels.npy", device)

    for step in stage.steps():
        whole = step >= settings.whole_from * stage.total
        size = config.resolution if whole else settings.crop
        shrink = size**2 // settings.crop**2
        losses = []
        for count, frames, pool in (
            (loop.batch, 1, stills_NHWC[:, None]),
            (settings.clips, settings.frames, clips_NFHWC),
        ):
            pixels_BCFHW = random_clips(pool, max(1, count // shrink), frames, size, generator)
            with autocast(device, config.dtype):
                mean, spread = encode_moments(vae, pixels_BCFHW).float().chunk(2, dim=1)
                spread = spread.clamp(-30, 20)
                noise = torch.randn(mean.shape, device=device, generator=generator)
                output_BCFHW = decode_pixels(vae, mean + torch.exp(0.5 * spread) * noise)
            divergence = 0.5 * (mean.square() + spread.exp() - 1 - spread).mean()
            losses.append(clip_loss(output_BCFHW.float(), pixels_BCFHW) + settings.kl_weight * divergence)
        loss = torch.stack(losses).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update(step)
        stage.log(
            loss=loss.detach(), stills=losses[0].detach(), clips=losses[1].detach(), divergence=divergence.detach()
        )
        if stage.wants_samples:
            shown_BCFHW = _to_pixels(clips_NFHWC[:1, : settings.frames])
            pair_BCFHW = torch.cat([shown_BCFHW, round_trip(average.model, shown_BCFHW)])
            grid_BCHW = rearrange(pair_BCFHW, "b c f h w -> (b f) c h w")
            save_grid(grid_BCHW, stage.folder / "samples" / f"{step + 1:06d}.png", columns=settings.frames)

    vae = average.model
    with_moments(vae, clips_NFHWC)
    vae.save_pretrained(folder)
    return {
        "steps": stage.step,
        "of": stage.total,
        "seconds": stage.seconds,
        "batch": loop.batch + settings.clips,
        "psnr_stills_db": mean_psnr(vae, heldout_NHWC[:, None]),
        "psnr_clips_db": mean_psnr(vae, clips_NFHWC[:64]),
    }


def to_device(vae: AutoencoderKLWan, device: torch.device) -> AutoencoderKLWan:
    """Move the autoencoder; on CUDA its 3-D convolutions go channels last, which tensor cores ask for."""
    vae = vae.to(device)
    if device.type == "cuda":
        for layer in vae.modules():
            if isinstance(layer, torch.nn.Conv3d):
                layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last_3d)
    return vae


def random_clips(pool_NFHWC: Tensor, batch: int, frames: int, size: int, generator: torch.Generator) -> Tensor:
    """Return pixels_BCFHW of random clips, each from a random frame and place on."""
    count, length, height, width, _ = pool_NFHWC.shape
    device = pool_NFHWC.device

    def draw(limit: int) -> Tensor:
        return torch.randint(limit, (batch,), generator=generator, device=device)

    picks, start = draw(count), draw(length - frames + 1)
    top, left = draw(height - size + 1), draw(width - size + 1)
    span, span_F = torch.arange(size, device=device), torch.arange(frames, device=device)
    frames_BF = (start[:, None] + span_F)[:, :, None, None]
    rows_BH, columns_BW = (top[:, None] + span)[:, None, :, None], (left[:, None] + span)[:, None, None, :]
    return _to_pixels(pool_NFHWC[picks[:, None, None, None], frames_BF, rows_BH, columns_BW])


def _to_pixels(clips_BFHWC: Tensor) -> Tensor:
    """Return uint8 clips as float32 pixels_BCFHW in [-1, 1]."""
    return rearrange(clips_BFHWC, "b f h w c -> b c f h w").float().div(127.5).sub(1)


def clip_loss(output_BCFHW: Tensor, target_BCFHW: Tensor) -> Tensor:
    """Return the stills' loss over all frames, plus the L1 distance of what changes from frame to frame."""
    output, target = (rearrange(x, "b c f h w -> (b f) c h w") for x in (output_BCFHW, target_BCFHW))
    loss = reconstruction_loss(output, target)
    if output_BCFHW.shape[2] > 1:
        loss = loss + F.l1_loss(output_BCFHW.diff(dim=2), target_BCFHW.diff(dim=2))
    return loss


@torch.no_grad()
def round_trip(vae: AutoencoderKLWan, pixels_BCFHW: Tensor) -> Tensor:
    """Return the pixels that come back of the latents' means, clamped to [-1, 1]."""
    return decode_pixels(vae, encode_moments(vae, pixels_BCFHW).chunk(2, dim=1)[0]).clamp(-1, 1)


def _parts(pool_NFHWC: Tensor) -> Iterator[Tensor]:
    """The clips in parts of about ENCODE_FRAMES frames."""
    yield from pool_NFHWC.split(max(1, ENCODE_FRAMES // pool_NFHWC.shape[1]))


@torch.no_grad()
def with_moments(vae: AutoencoderKLWan, clips_NFHWC: Tensor) -> None:
    """Write the mean and deviation of each latent channel over some clips into the autoencoder's config."""
    latents = [encode_moments(vae, _to_pixels(part)).chunk(2, dim=1)[0] for part in _parts(clips_NFHWC[:512])]
    deviation_C, mean_C = torch.std_mean(torch.cat(latents).float(), dim=(0, 2, 3, 4))
    vae.register_to_config(
        latents_mean=[round(float(x), 4) for x in mean_C], latents_std=[round(float(x), 4) for x in deviation_C]
    )


@torch.no_grad()
def mean_psnr(vae: AutoencoderKLWan, clips_NFHWC: Tensor) -> float:
    """Return the mean over clips of 10 log10(255^2 / MSE) of the round trip, on uint8."""
    values = []
    for part in _parts(clips_NFHWC):
        again = rearrange(round_trip(vae, _to_pixels(part)), "b c f h w -> b f h w c")
        error_B = (((again.float() + 1) * 127.5).round() - part.float()).square().mean(dim=(1, 2, 3, 4))
        values.append(10 * torch.log10(255**2 / error_B.clamp(min=1e-6)))
    return round(float(torch.cat(values).mean()), 2)


@torch.no_grad()
def encode_wan_world(config: MakeBaseConfig, device: torch.device) -> None:
    """Encode every still and clip once: wan_latents.npy (N, C, f, h, w) float16, normalised, beside the pixels.

    Do nothing for a split that this very autoencoder has encoded already.
    """
    folder = config.out / "model-wan" / "vae"
    vae = to_device(AutoencoderKLWan.from_pretrained(folder), device)
    made_by = json.dumps({"vae": vae_fingerprint(folder)})
    for split in SPLITS:
        mark = config.cache / split / "wan_latents.json"
        if mark.exists() and mark.read_text() == made_by:
            continue
        mark.unlink(missing_ok=True)
        pixels = np.load(config.cache / split / "pixels.npy", mmap_mode="c")
        clips_NFHWC = torch.from_numpy(pixels if pixels.ndim == 5 else pixels[:, None])
        encoded = []
        with progress(f"encode {split}", len(clips_NFHWC)) as bar:
            for part in _parts(clips_NFHWC):
                with autocast(device, config.dtype):
                    mean = encode_moments(vae, _to_pixels(part.to(device))).chunk(2, dim=1)[0]
                encoded.append(normalised(vae, mean.float()).half().cpu())
                bar.update(len(part))
        np.save(config.cache / split / "wan_latents.npy", torch.cat(encoded).numpy())
        with atomic_path(mark) as part_file:
            part_file.write_text(made_by)
