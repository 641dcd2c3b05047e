"""Train the judge, calibrate it, measure it on stills it has not seen, and write it with its card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cdvideo.evaluation.config import JudgeConfig
from cdvideo.evaluation.judge.augmentation import augment, degrade, round_trip
from cdvideo.evaluation.judge.card import write_card
from cdvideo.evaluation.judge.model import HEADS, Judge, label_indices, load_judge, save_judge
from cdvideo.evaluation.statistics import calibration_error, wilson
from cdvideo.runs import atomic_path
from cdvideo.world.dataset import read_labels
from cdvideo.world.muon import make_optimizers
from cdvideo.world.training import Average, Limits, Stage, autocast, load_array, to_pixels

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

Arrow: TypeAlias = Callable[[Tensor], Tensor]

LATENT_NOISE = 0.15  # most noise on the latents of training round trips, in their standard deviations


def train_judge(config: JudgeConfig, device: torch.device, limits: Limits) -> dict[str, Any]:
    """Trains on the rendered stills in config.cache; writes the judge, its facts and its card into config.out.

    Returns:
        The recorded facts, accuracies and calibration errors included.
    """
    torch.manual_seed(config.seed)
    loop, generator = config.loop, torch.Generator(device).manual_seed(config.seed)
    judge = Judge(widths=config.widths, blocks=config.blocks, side=config.side).to(device)
    judge.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = Average(judge, decay=loop.ema)
    optimizers = make_optimizers(judge, lr=loop.lr)
    models = {"judge": judge, "average": average.model}
    stage = Stage(config.out, loop=loop, models=models, optimizers=optimizers, generator=generator, limits=limits)
    vae = load_vae(config.vae, device)
    images_NHWC, figures_Nhw, labels_NH = load_stills(config.cache / "train", device)

    for step in stage.steps():
        picks = torch.randint(len(images_NHWC), (loop.batch,), generator=generator, device=device)
        pixels_BCHW, labels_BH = to_pixels(images_NHWC[picks]), labels_NH[picks]
        figure_B1HW = F.interpolate(figures_Nhw[picks][:, None].float(), pixels_BCHW.shape[-2:])
        pixels_BCHW = augment(pixels_BCHW, figure_B1HW, generator)
        if vae is not None:
            share = int(config.vae_share * loop.batch)
            encode, decode = vae_arrows(vae, device, config.dtype)
            again_BCHW = round_trip(pixels_BCHW[:share], encode, decode, noise=LATENT_NOISE, generator=generator)
            pixels_BCHW = torch.cat([again_BCHW, pixels_BCHW[share:]])
        pixels_BCHW = degrade(pixels_BCHW, generator)
        with autocast(device, config.dtype):
            logits = judge(pixels_BCHW.contiguous(memory_format=torch.channels_last))
        losses = [
            F.cross_entropy(logits[head].float(), labels_BH[:, h], label_smoothing=config.label_smoothing)
            for h, head in enumerate(HEADS)
        ]
        loss = torch.stack(losses).sum()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update(step)
        copy_statistics(judge, average.model)
        right = {head: (logits[head].argmax(dim=1) == labels_BH[:, h]).float().mean() for h, head in enumerate(HEADS)}
        stage.log(loss=loss.detach(), **right)

    return finish(config, average.model.eval(), vae, stage, device)


def finish(
    config: JudgeConfig, judge: Judge, vae: AutoencoderTiny | None, stage: Stage, device: torch.device
) -> dict[str, Any]:
    """Calibrates, writes the weights, measures what was written, and records it."""
    images_NHWC, _, labels_NH = load_stills(config.cache / "heldout", device)
    half = len(images_NHWC) // 2
    judge.temperature_H.copy_(fit_temperatures(judge, images_NHWC[:half], labels_NH[:half]))
    file = save_judge(judge, config.out)
    shipped = load_judge(config.out, device=device)
    facts: dict[str, Any] = {
        "parameters": sum(p.numel() for p in shipped.parameters()),
        "bytes": file.stat().st_size,
        "seed": config.seed,
        "scenes": config.scenes,
        "dtype": config.dtype,
        **stage.facts(),
        "vae_in_training": config.vae is not None,
        "temperature": dict(zip(HEADS, (round(float(t), 4) for t in shipped.temperature_H), strict=True)),
        "renders": measure(shipped, images_NHWC[half:], labels_NH[half:]),
    }
    if vae is not None:
        encode, decode = vae_arrows(vae, device, "fp32")
        through: Arrow = lambda pixels_BCHW: decode(encode(pixels_BCHW)).clamp(-1, 1)  # noqa: E731
        facts["round_trip"] = measure(shipped, images_NHWC[half:], labels_NH[half:], through=through)
    with atomic_path(config.out / "training.json") as part:
        part.write_text(json.dumps(facts, indent=2) + "\n")
    write_card(config.out)
    return facts


def load_stills(folder: Path, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """images_NHWC uint8 and figures_Nhw uint8 (mean of the mask in cells of 8 pixels), labels_NH; all on the device."""
    images_NHWC = load_array(folder / "pixels.npy", device)
    figures_Nhw = torch.from_numpy(np.load(folder / "masks.npy")).to(device)
    labels = [label_indices({head: str(line[head]) for head in HEADS}) for line in read_labels(folder)]
    return images_NHWC, figures_Nhw, torch.tensor(labels, device=device)


def load_vae(folder: Path | None, device: torch.device) -> AutoencoderTiny | None:
    """The frozen VAE in a diffusers folder, or None."""
    if folder is None:
        return None
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny.from_pretrained(folder, torch_dtype=torch.float32)
    return vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def vae_arrows(vae: AutoencoderTiny, device: torch.device, dtype: str) -> tuple[Arrow, Arrow]:
    """Encode and decode, fast and without scaling: what training round trips need."""

    def encode(pixels_BCHW: Tensor) -> Tensor:
        with autocast(device, dtype):
            return vae.encoder(pixels_BCHW).float()

    def decode(latents_BCHW: Tensor) -> Tensor:
        with autocast(device, dtype):
            return vae.decoder(latents_BCHW).float()

    return encode, decode


def copy_statistics(trained: Judge, average: Judge) -> None:
    """The average's batch norms take the trained network's statistics, which are averages themselves."""
    torch._foreach_copy_(list(average.buffers()), list(trained.buffers()))


@torch.no_grad()
def all_logits(judge: Judge, images_NHWC: Tensor, *, through: Arrow | None = None) -> tuple[Tensor, ...]:
    """Uncalibrated logits of every picture, one tensor per head."""
    parts = []
    for part in images_NHWC.split(128):
        pixels_BCHW = to_pixels(part)
        parts.append(judge(pixels_BCHW if through is None else through(pixels_BCHW)))
    return tuple(torch.cat([part[head] for part in parts]) for head in HEADS)


def fit_temperatures(judge: Judge, images_NHWC: Tensor, labels_NH: Tensor) -> Tensor:
    """temperature_H that minimises the negative log likelihood, tried one by one (arXiv 1706.04599, section 4.2)."""
    candidates_T = torch.logspace(-1, 1, 401, base=4.0, device=labels_NH.device)
    best = []
    for h, logits_NC in enumerate(all_logits(judge, images_NHWC)):
        losses = [float(F.cross_entropy(logits_NC / t, labels_NH[:, h])) for t in candidates_T]
        best.append(candidates_T[int(np.argmin(losses))])
    return torch.stack(best)


def measure(judge: Judge, images_NHWC: Tensor, labels_NH: Tensor, *, through: Arrow | None = None) -> dict[str, Any]:
    """Accuracy with its interval and expected calibration error per head, and the share with all three right."""
    logits = all_logits(judge, images_NHWC, through=through)
    all_right_N = torch.ones(len(labels_NH), dtype=torch.bool, device=labels_NH.device)
    facts: dict[str, Any] = {"n": len(labels_NH)}
    for h, head in enumerate(HEADS):
        confidence_N, picked_N = (logits[h] / judge.temperature_H[h]).softmax(dim=1).max(dim=1)
        right_N = picked_N == labels_NH[:, h]
        all_right_N &= right_N
        low, high = wilson(int(right_N.sum()), len(right_N))
        error = calibration_error(confidence_N.cpu().numpy(), right_N.cpu().numpy())
        facts[head] = {
            "accuracy": round(float(right_N.float().mean()), 5),
            "interval": [round(low, 5), round(high, 5)],
            "calibration_error": round(error, 5),
        }
    facts["all_three"] = round(float(all_right_N.float().mean()), 5)
    return facts
