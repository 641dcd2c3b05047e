"""The noise of films: shuffled copies for long ones, and a film's own low frequencies under fresh high ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cdvideo.base.schedule import Scheduler, add_noise
from cdvideo.errors import UserError
from cdvideo.sampling.denoise import draw_noise
from cdvideo.sampling.options import Noise

ORDER = 4  # of the Butterworth filter, as FreeInit's authors and diffusers have it


def film_noise(seeds: Sequence[int], shape: Sequence[int], noise: Noise, *, window: int, stride: int) -> Tensor:
    """noise_BFCHW of films of `shape` (F, C, H, W); a longer film starts with the noise of the shorter one.

    Args:
        window, stride: frames of a window, and from one window to the next.
    """
    if noise.kind == "fresh" or shape[0] <= window:
        return draw_noise(seeds, shape)
    drawn_BFCHW = draw_noise(seeds, (window, *shape[1:]))
    order_BF = torch.tensor([shuffled_order(seed, shape[0], window, stride) for seed in seeds])
    return torch.stack([drawn_FCHW[order_F] for drawn_FCHW, order_F in zip(drawn_BFCHW, order_BF, strict=True)])


def shuffled_order(seed: int, frames: int, window: int, stride: int) -> list[int]:
    """Which of the first window's noise each frame has (FreeNoise, arXiv 2310.15169, section 4.1, equation 5).

    The first window has its own; then each `stride` frames have, shuffled, the noise of those a window earlier. So
    any window holds noise that is nearly independent, and frames a window apart begin alike.
    """
    generator = torch.Generator().manual_seed(seed)
    order = list(range(window))
    while len(order) < frames:
        earlier = order[len(order) - window :][:stride]
        order += [earlier[index] for index in torch.randperm(len(earlier), generator=generator).tolist()]
    return order[:frames]


def reinitialised(
    latents_BFCHW: Tensor, noise_BFCHW: Tensor, seeds: Sequence[int], scheduler: Scheduler, noise: Noise, *, turn: int
) -> Tensor:
    """Noise that has a finished film's low frequencies, and new high ones (FreeInit, arXiv 2312.07537, section 4).

    Args:
        latents_BFCHW: the finished film.
        noise_BFCHW: what it started from.
        turn: how many times this was done before, and one.

    Raises:
        UserError: the noise schedule's last step has no signal left, so that no frequency of the film would return.
    """
    last = torch.tensor([scheduler.config["num_train_timesteps"] - 1])
    if scheduler.alphas_cumprod[last].item() < 1e-6:
        raise UserError(
            "FreeInit with a noise schedule that ends in pure noise",
            allowed="bases whose last noise level has some signal left, as Stable Diffusion 1 has: training then shows "
            "low frequencies that sampling lacks, which FreeInit mends",
            do="leave --freeinit out: this base was trained to start from pure noise",
        )
    timesteps_B = last.expand(len(latents_BFCHW)).to(latents_BFCHW.device)
    noisy_BFCHW = add_noise(scheduler, latents_BFCHW, noise_BFCHW, timesteps_B)
    # Seeds of other films are near; these are far. torch's generator on the CPU reads the lowest 32 bits alone.
    fresh_BFCHW = draw_noise([(seed + turn * 0x9E3779B1) % 2**32 for seed in seeds], noise_BFCHW.shape[1:])
    return mix_frequencies(noisy_BFCHW, fresh_BFCHW.to(noise_BFCHW), noise)


def mix_frequencies(low_BFCHW: Tensor, high_BFCHW: Tensor, noise: Noise) -> Tensor:
    """The low frequencies, over frames, rows and columns, of one film, and the high ones of another."""
    axes = (1, 3, 4)
    _, frames, _, height, width = low_BFCHW.shape
    keep_FHW = low_pass((frames, height, width), spatial=noise.freeinit_spatial, temporal=noise.freeinit_temporal)
    keep_F1HW = torch.fft.ifftshift(keep_FHW).unsqueeze(1).to(low_BFCHW.device)
    spectrum = torch.fft.fftn(high_BFCHW, dim=axes)
    # h + (l - h) k in place of l k + h (1 - k): one spectrum fewer in memory.
    spectrum += (torch.fft.fftn(low_BFCHW, dim=axes) - spectrum) * keep_F1HW
    return torch.fft.ifftn(spectrum, dim=axes).real


def low_pass(shape_FHW: tuple[int, int, int], *, spatial: float, temporal: float) -> Tensor:
    """Butterworth filter_FHW with the zero frequency in the middle; `spatial`, `temporal`: where it falls to a half,
    as shares of the highest frequency."""
    frames, height, width = (2 * torch.arange(count) / count - 1 for count in shape_FHW)
    squared_FHW = (frames * spatial / temporal).square()[:, None, None] + height.square()[:, None] + width.square()
    return 1 / (1 + (squared_FHW / spatial**2) ** ORDER)
