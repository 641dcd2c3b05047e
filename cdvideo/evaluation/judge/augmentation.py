"""What the judge's training pictures go through, so that it names pictures that are not clean renders.

All functions take pixels_BCHW in [-1, 1] and a generator on their device, and treat every picture differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BLUR_RADIUS = 4
# ITU-T T.81, table K.1
LUMINANCE = torch.tensor(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    dtype=torch.float32,
)
# ITU-T T.871: R, G, B to Y, Cb, Cr
YCBCR = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
RGB = torch.linalg.inv(YCBCR)


def augment(pixels_BCHW: Tensor, figure_B1HW: Tensor, generator: torch.Generator) -> Tensor:
    """A rectangle of the background gone, moved and turned, other colours. What a VAE or a file does comes after it.

    Args:
        figure_B1HW: where the figure is (above 0); nothing is erased there.
    """
    pixels_BCHW = _sometimes(0.5, erase_background(pixels_BCHW, figure_B1HW, generator), pixels_BCHW, generator)
    pixels_BCHW = move(pixels_BCHW, generator)
    return _sometimes(0.7, shift_colours(pixels_BCHW, generator), pixels_BCHW, generator)


def degrade(pixels_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, noise and compression, each on about a third of the pictures."""
    for spoil in (blur, add_noise, compress):
        pixels_BCHW = _sometimes(0.35, spoil(pixels_BCHW, generator), pixels_BCHW, generator)
    return pixels_BCHW


@torch.no_grad()
def round_trip(
    pixels_BCHW: Tensor,
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    *,
    noise: float,
    generator: torch.Generator,
) -> Tensor:
    """Through a VAE, with normal noise of up to `noise` on the latents, as a sampler leaves errors there."""
    latents_BCHW = encode(pixels_BCHW)
    amount_B111 = noise * _uniform(pixels_BCHW, 0, 1, generator)
    noise_BCHW = torch.randn(latents_BCHW.shape, generator=generator, device=latents_BCHW.device)
    return decode(latents_BCHW + amount_B111 * noise_BCHW).clamp(-1, 1)


def erase_background(pixels_BCHW: Tensor, figure_B1HW: Tensor, generator: torch.Generator) -> Tensor:
    """Fills a rectangle of up to 0.4 of each side with one colour, except on the figure (arXiv 1708.04896)."""
    height, width = pixels_BCHW.shape[-2:]
    inside_B1HW = torch.ones_like(figure_B1HW, dtype=torch.bool)
    for axis, size in ((2, height), (3, width)):
        place = torch.linspace(0, 1, size, device=pixels_BCHW.device).view([-1 if a == axis else 1 for a in range(4)])
        middle, extent = _uniform(pixels_BCHW, 0, 1, generator), _uniform(pixels_BCHW, 0.1, 0.4, generator)
        inside_B1HW = inside_B1HW & ((place - middle).abs() < extent / 2)
    colour = _uniform(pixels_BCHW, -1, 1, generator, channels=3)
    return torch.where(inside_B1HW & (figure_B1HW <= 0), colour, pixels_BCHW)


def move(pixels_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Turned by up to 8 degrees, scaled by 0.88 to 1.14, moved by up to 6 % of the side, half of them mirrored."""
    angle = _uniform(pixels_BCHW, -8, 8, generator).flatten() * math.pi / 180
    scale = _uniform(pixels_BCHW, 0.88, 1.14, generator).flatten()
    mirror = _uniform(pixels_BCHW, -1, 1, generator).flatten().sign()
    x, y = (_uniform(pixels_BCHW, -0.12, 0.12, generator).flatten() for _ in range(2))
    rows = [scale * mirror * angle.cos(), -scale * angle.sin(), x, scale * mirror * angle.sin(), scale * angle.cos(), y]
    theta_B23 = torch.stack(rows, dim=1).view(-1, 2, 3)
    grid_BHW2 = F.affine_grid(theta_B23, list(pixels_BCHW.shape), align_corners=False)
    return F.grid_sample(pixels_BCHW, grid_BHW2, padding_mode="reflection", align_corners=False)


def shift_colours(pixels_BCHW: Tensor, generator: torch.Generator, *, strength: float = 1.0) -> Tensor:
    """Other contrast, saturation, brightness and white balance; `strength` 0 changes nothing."""
    s = strength
    grey_B1HW = pixels_BCHW.mean(dim=1, keepdim=True)
    pixels_BCHW = grey_B1HW + (pixels_BCHW - grey_B1HW) * _uniform(pixels_BCHW, 1 - 0.4 * s, 1 + 0.4 * s, generator)
    pixels_BCHW = pixels_BCHW * _uniform(pixels_BCHW, 1 - 0.25 * s, 1 + 0.2 * s, generator)
    return (pixels_BCHW + s * _uniform(pixels_BCHW, -0.15, 0.15, generator, channels=3)).clamp(-1, 1)


def blur(pixels_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian, of a standard deviation from 0.3 to 1.6 pixels."""
    batch, channels, height, width = pixels_BCHW.shape
    sigma_B1 = _uniform(pixels_BCHW, 0.3, 1.6, generator).view(batch, 1)
    offset_K = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=pixels_BCHW.device)
    kernel_BK = torch.exp(-0.5 * (offset_K / sigma_B1) ** 2)
    kernel_NK = (kernel_BK / kernel_BK.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    flat = F.pad(pixels_BCHW.reshape(1, batch * channels, height, width), [BLUR_RADIUS] * 4, mode="reflect")
    flat = F.conv2d(flat, kernel_NK[:, None, :, None], groups=batch * channels)
    flat = F.conv2d(flat, kernel_NK[:, None, None, :], groups=batch * channels)
    return flat.view(batch, channels, height, width)


def add_noise(pixels_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise, a standard deviation of up to 0.12 for each pixel and of up to 0.12 for each 8 x 8 block."""
    batch, channels, height, width = pixels_BCHW.shape
    device = pixels_BCHW.device
    fine = torch.randn(pixels_BCHW.shape, generator=generator, device=device)
    coarse = torch.randn(batch, channels, height // 8, width // 8, generator=generator, device=device)
    coarse = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    noise = fine * _uniform(pixels_BCHW, 0, 0.12, generator) + coarse * _uniform(pixels_BCHW, 0, 0.12, generator)
    return (pixels_BCHW + noise).clamp(-1, 1)


def compress(pixels_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """As a JPEG of quality 20 to 90: 8 x 8 cosine transform of Y, Cb, Cr, rounded to steps; no chroma subsampling."""
    device = pixels_BCHW.device
    quality = _uniform(pixels_BCHW, 20, 90, generator)
    scale = torch.where(quality < 50, 50 / quality, 2 - quality / 50).view(-1, 1, 1, 1, 1, 1)
    steps = (LUMINANCE.to(device).view(1, 1, 1, 8, 1, 8) * scale).clamp(min=1)
    cosine = cosine_matrix(8).to(device)
    ycbcr_BCHW = torch.einsum("dc,bchw->bdhw", YCBCR.to(device), pixels_BCHW * 127.5)
    blocks = ycbcr_BCHW.unflatten(3, (-1, 8)).unflatten(2, (-1, 8))
    frequencies = torch.einsum("ui,vj,bcyixj->bcyuxv", cosine, cosine, blocks)
    frequencies = (frequencies / steps).round() * steps
    blocks = torch.einsum("ui,vj,bcyuxv->bcyixj", cosine, cosine, frequencies)
    rgb_BCHW = torch.einsum("dc,bchw->bdhw", RGB.to(device), blocks.flatten(4, 5).flatten(2, 3))
    return (rgb_BCHW / 127.5).clamp(-1, 1)


def cosine_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II, rows are frequencies: C_ui = a_u cos(pi (2 i + 1) u / (2 size))."""
    index = torch.arange(size, dtype=torch.float32)
    matrix = torch.cos(math.pi * (2 * index[None] + 1) * index[:, None] / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def _uniform(like: Tensor, low: float, high: float, generator: torch.Generator, *, channels: int = 1) -> Tensor:
    """(B, channels, 1, 1), one draw for each picture."""
    draw = torch.rand(len(like), channels, 1, 1, generator=generator, device=like.device)
    return low + (high - low) * draw


def _sometimes(share: float, changed: Tensor, pixels_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    return torch.where(_uniform(pixels_BCHW, 0, 1, generator) < share, changed, pixels_BCHW)
