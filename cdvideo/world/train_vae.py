"""Train the base's autoencoder (AutoencoderTiny, f = 8), and encode the rendered world with it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from cdvideo.base.latents import decode_latents, encode_pixels
from cdvideo.runs import atomic_path
from cdvideo.world.config import MakeBaseConfig, VaeConfig
from cdvideo.world.dataset import SPLITS, progress
from cdvideo.world.muon import make_optimizers
from cdvideo.world.training import Average, Limits, Stage, autocast, load_array, save_grid, to_pixels

MOMENT_WEIGHT = (
    0.01  # pull of each latent channel to mean 0 and variance 1, where the decoder's tanh(x / 3) is near linear
)
ENCODE_BATCH = 256


def build_vae(config: VaeConfig) -> AutoencoderTiny:
    return AutoencoderTiny(
        latent_channels=config.latent_channels,
        encoder_block_out_channels=(config.width,) * 4,
        decoder_block_out_channels=(config.width,) * 4,
        num_encoder_blocks=config.encoder_blocks,
        num_decoder_blocks=config.decoder_blocks,
    )


def train_vae(config: MakeBaseConfig, device: torch.device, limits: Limits) -> dict[str, Any]:
    """Trains, saves model/vae with its scaling factor, and returns the recorded facts, held-out PSNR included."""
    torch.manual_seed(config.seed)
    folder, settings, loop = config.out / "vae", config.vae, config.vae.loop
    vae = start_vae(config).to(device, memory_format=torch.channels_last)
    average = Average(vae, decay=loop.ema)
    generator = torch.Generator(device).manual_seed(config.seed)
    optimizers = make_optimizers(vae, lr=loop.lr)
    models = {"vae": vae, "average": average.model}
    stage = Stage(folder, loop=loop, models=models, optimizers=optimizers, generator=generator, limits=limits)
    images_NHWC = load_array(config.cache / "train" / "pixels.npy", device)
    heldout_NHWC = load_array(config.cache / "heldout" / "pixels.npy", device)
    compiler = torch.compile(dynamic=False) if loop.compile else lambda module: module
    encode, decode = compiler(vae.encoder), compiler(vae.decoder)

    for step in stage.steps():
        whole = step >= settings.whole_from * stage.total
        size = config.resolution if whole else settings.crop
        batch = max(1, loop.batch * settings.crop**2 // size**2)
        pixels_BCHW = random_crops(images_NHWC, batch, size, generator)
        with autocast(device, config.dtype):
            latents_BCHW = encode(pixels_BCHW)
            noise_BCHW = torch.randn(latents_BCHW.shape, device=device, generator=generator)
            amount_B111 = settings.latent_noise * torch.rand(batch, 1, 1, 1, device=device, generator=generator)
            output_BCHW = decode(latents_BCHW + amount_B111 * noise_BCHW)
        moments = moment_loss(latents_BCHW.float())
        loss = reconstruction_loss(output_BCHW.float(), pixels_BCHW) + MOMENT_WEIGHT * moments
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update(step)
        stage.log(loss=loss.detach(), moments=moments.detach())
        if stage.wants_samples:
            shown_BCHW = to_pixels(heldout_NHWC[:8])
            again_BCHW = decode_latents(average.model, encode_pixels(average.model, shown_BCHW))
            save_grid(torch.cat([shown_BCHW, again_BCHW]), folder / "samples" / f"{step + 1:06d}.png", columns=8)

    vae = average.model
    scale = 1 / float(torch.cat([vae.encode(to_pixels(part)).latents for part in images_NHWC[:1024].split(64)]).std())
    vae.register_to_config(scaling_factor=round(scale, 5))
    save_vae(vae, config.out / "model" / "vae")
    psnr = mean_psnr(vae, heldout_NHWC)
    return {"steps": stage.step, "of": stage.total, "seconds": stage.seconds, "batch": loop.batch, "psnr_db": psnr}


def save_vae(vae: AutoencoderTiny, folder: Path) -> None:
    """Writes it without `block_out_channels`, which AutoencoderTiny derives and saves, but warns of when it is read."""
    vae.save_pretrained(folder)
    file = folder / "config.json"
    settings = {name: value for name, value in json.loads(file.read_text()).items() if name != "block_out_channels"}
    file.write_text(json.dumps(settings, indent=2) + "\n")


def start_vae(config: MakeBaseConfig) -> AutoencoderTiny:
    """The weights to start from: those of an earlier model where there is one, else new ones."""
    earlier = config.out / "model" / "vae"
    return AutoencoderTiny.from_pretrained(earlier) if earlier.is_dir() else build_vae(config.vae)


def random_crops(images_NHWC: Tensor, batch: int, size: int, generator: torch.Generator) -> Tensor:
    """pixels_BCHW of random pictures at random places, each of its own."""
    count, height, width, _ = images_NHWC.shape
    device = images_NHWC.device
    picks = torch.randint(count, (batch,), generator=generator, device=device)
    top = torch.randint(height - size + 1, (batch,), generator=generator, device=device)
    left = torch.randint(width - size + 1, (batch,), generator=generator, device=device)
    span = torch.arange(size, device=device)
    rows, columns = (top[:, None] + span)[:, :, None], (left[:, None] + span)[:, None, :]
    return to_pixels(images_NHWC[picks[:, None, None], rows, columns])


def reconstruction_loss(output_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """L1 at full, half and quarter size, plus L1 of horizontal and vertical differences, which keeps outlines sharp."""
    loss = output_BCHW.new_zeros(())
    for scale in (1, 2, 4):
        loss = loss + F.l1_loss(F.avg_pool2d(output_BCHW, scale), F.avg_pool2d(target_BCHW, scale))
    for axis in (2, 3):
        loss = loss + F.l1_loss(output_BCHW.diff(dim=axis), target_BCHW.diff(dim=axis))
    return loss


def moment_loss(latents_BCHW: Tensor) -> Tensor:
    """Squared distance of each channel's mean from 0 and log variance from 0, averaged over channels."""
    variance_C, mean_C = torch.var_mean(latents_BCHW, dim=(0, 2, 3))
    return (mean_C.square() + variance_C.clamp(min=1e-6).log().square()).mean()


@torch.no_grad()
def mean_psnr(vae: AutoencoderTiny, images_NHWC: Tensor) -> float:
    """Mean over pictures of 10 log10(255^2 / MSE) of the round trip, on uint8."""
    values = []
    for part in images_NHWC.split(64):
        again_BCHW = decode_latents(vae, encode_pixels(vae, to_pixels(part)))
        again = ((again_BCHW + 1) * 127.5).round().permute(0, 2, 3, 1)
        error_B = (again - part.float()).square().mean(dim=(1, 2, 3)).clamp(min=1e-6)
        values.append(10 * torch.log10(255**2 / error_B))
    return round(float(torch.cat(values).mean()), 2)


@torch.no_grad()
def encode_world(config: MakeBaseConfig, device: torch.device) -> None:
    """Encodes every still and every frame once: latents.npy (N, [F,] C, h, w) float16 beside the pixels.

    Does nothing for a split that this very VAE has encoded already.
    """
    vae = AutoencoderTiny.from_pretrained(config.out / "model" / "vae").to(device, memory_format=torch.channels_last)
    made_by = json.dumps({"vae": vae_fingerprint(config.out / "model" / "vae")})
    for split in SPLITS:
        folder = config.cache / split
        pixels = np.load(folder / "pixels.npy", mmap_mode="c")
        mark = folder / "latents.json"
        if mark.exists() and mark.read_text() == made_by:
            continue
        mark.unlink(missing_ok=True)
        flat = pixels.reshape(-1, *pixels.shape[-3:])
        parts = []
        with progress(f"encode {split}", len(flat)) as bar:
            for start in range(0, len(flat), ENCODE_BATCH):
                images_BHWC = torch.from_numpy(flat[start : start + ENCODE_BATCH]).to(device)
                parts.append(encode_pixels(vae, to_pixels(images_BHWC)).half().cpu())
                bar.update(len(images_BHWC))
        latents = torch.cat(parts)
        shape = (*pixels.shape[:-3], *latents.shape[1:])
        np.save(folder / "latents.npy", latents.view(shape).numpy())
        with atomic_path(mark) as part:
            part.write_text(made_by)


def vae_fingerprint(folder: Path) -> str:
    """16 hex digits of the SHA-256 of the VAE's weights and config."""
    files = sorted(folder.iterdir())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
