"""Noise schedules: diffusers' schedulers made from the base's own settings, and the maths of the training loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler
from torch import Tensor

SamplerName: TypeAlias = Literal["ddim", "dpm++", "euler", "lcm"]
Scheduler: TypeAlias = DDIMScheduler | DPMSolverMultistepScheduler | EulerDiscreteScheduler | LCMScheduler


class SeededLCMScheduler(LCMScheduler):
    """LCM adds fresh noise after every step: here each sample's follows from its own seed, whatever else is drawn."""

    seeds: Sequence[int]

    def set_timesteps(self, *args: Any, **options: Any) -> None:
        super().set_timesteps(*args, **options)
        # The noise that sampling starts from is drawn with the seeds as they are. torch's generator on the CPU takes
        # the lower 32 bits of a seed, so those must differ.
        self.generators = [torch.Generator().manual_seed(seed ^ 0x9E3779B9) for seed in self.seeds]

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Any:
        return super().step(model_output, timestep, sample, generator=self.generators)


def make_scheduler(
    config: Mapping[str, Any], name: SamplerName = "ddim", *, seeds: Sequence[int] = (), steps: int | None = None
) -> Scheduler:
    """A sampler with the base's betas and prediction.

    DDIM (arXiv 2010.02502), DPM-Solver++ 2M (2211.01095), Euler (2206.00364, algorithm 2 without churn), LCM's
    (2310.04378, algorithm 3).

    Args:
        seeds: One for each sample of the batch; LCM alone asks for them.
        steps: How many will be taken. Steps that are counted from the first timestep up ("leading") have a whole number
            between them, rounded down: hundreds of them end far below the last timestep, so that sampling would begin
            in the middle of the schedule, from pure noise. Such are counted down from the last ("trailing").
    """
    scheduler = _make(config, name, seeds)
    if steps is not None and scheduler.config["timestep_spacing"] == "leading" and name != "lcm":
        timesteps, gaps = scheduler.config["num_train_timesteps"], steps + (name == "dpm++")
        if gaps > timesteps // 2 or timesteps % gaps > timesteps // 10:
            scheduler.register_to_config(timestep_spacing="trailing")
    return scheduler


def _make(config: Mapping[str, Any], name: SamplerName, seeds: Sequence[int]) -> Scheduler:
    if name == "ddim":
        return DDIMScheduler.from_config(dict(config))
    if name == "euler":
        return EulerDiscreteScheduler.from_config(dict(config))
    if name == "lcm":
        scheduler = SeededLCMScheduler.from_config(dict(config))
        scheduler.seeds = seeds
        return scheduler
    return DPMSolverMultistepScheduler.from_config(dict(config), algorithm_type="dpmsolver++", solver_order=2)


def add_noise(scheduler: Scheduler, latents: Tensor, noise: Tensor, timesteps_B: Tensor) -> Tensor:
    """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise (arXiv 2006.11239, eq. 4); latents of any rank, batch first."""
    signal, sigma = _signal_and_noise(scheduler, timesteps_B, latents)
    return signal * latents + sigma * noise


def training_target(scheduler: Scheduler, latents: Tensor, noise: Tensor, timesteps_B: Tensor) -> Tensor:
    """What the UNet predicts: noise, or v = sqrt(abar_t) noise - sqrt(1 - abar_t) z_0 (arXiv 2202.00512, app. D)."""
    if scheduler.config["prediction_type"] == "epsilon":
        return noise
    assert scheduler.config["prediction_type"] == "v_prediction", scheduler.config["prediction_type"]
    signal, sigma = _signal_and_noise(scheduler, timesteps_B, latents)
    return signal * noise - sigma * latents


def _signal_and_noise(scheduler: Scheduler, timesteps_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    alpha_bar = scheduler.alphas_cumprod.to(like.device)[timesteps_B].float()
    alpha_bar = alpha_bar.view(-1, *[1] * (like.ndim - 1))
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def snr(scheduler: Scheduler, timesteps_B: Tensor) -> Tensor:
    """Signal-to-noise ratio abar_t / (1 - abar_t), float32; 0 at the last step of a zero-terminal-SNR schedule."""
    alpha_bar_B = scheduler.alphas_cumprod.to(timesteps_B.device)[timesteps_B].float()
    return alpha_bar_B / (1 - alpha_bar_B)


def truncated_v_weights(scheduler: Scheduler, timesteps_B: Tensor, *, gamma: float = 5.0) -> Tensor:
    """(min(SNR, gamma) + 1) / (SNR + 1): Min-SNR's cut at gamma (arXiv 2303.09556, section 3.4) applied to the SNR + 1
    weighting of v prediction (arXiv 2202.00512, section 4).

    Min-SNR's own v weight, min(SNR, gamma) / (SNR + 1), is 0 at SNR 0, so a zero-terminal-SNR model would never learn
    its first sampling step. Here the weight stays 1 up to SNR = gamma and falls above it.
    """
    assert scheduler.config["prediction_type"] == "v_prediction", scheduler.config["prediction_type"]
    snr_B = snr(scheduler, timesteps_B)
    return (snr_B.clamp(max=gamma) + 1) / (snr_B + 1)
