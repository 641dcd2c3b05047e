"""How far a film is from another one of the same seed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Pixels = npt.NDArray[np.uint8]


def distance(film_FHWC: Pixels, other_FHWC: Pixels) -> str:
    """In words."""
    return f"PSNR {film_psnr(film_FHWC, other_FHWC):.1f} dB, SSIM {film_ssim(film_FHWC, other_FHWC):.3f}"


def film_psnr(film_FHWC: Pixels, other_FHWC: Pixels) -> float:
    """Peak signal-to-noise ratio in dB over all pixels of all frames; infinite for equal films."""
    pairs = zip(film_FHWC, other_FHWC, strict=True)
    error = np.mean([np.square(frame_HWC.astype(np.float64) - other_HWC).mean() for frame_HWC, other_HWC in pairs])
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def film_ssim(film_FHWC: Pixels, other_FHWC: Pixels) -> float:
    """Mean structural similarity of the frames' channels (Wang et al. 2004, equation 13; Gaussian window, sigma 1.5).

    Where the window would reach over the edge nothing is measured; frames are at least 11 pixels wide and high.
    """
    return float(np.mean([_picture_ssim(*pair) for pair in zip(film_FHWC, other_FHWC, strict=True)]))


def _picture_ssim(picture_HWC: Pixels, other_HWC: Pixels) -> float:
    x, y = (torch.from_numpy(each).double().permute(2, 0, 1)[:, None] for each in (picture_HWC, other_HWC))
    row = torch.exp(-(torch.arange(11, dtype=torch.float64) - 5).square() / (2 * 1.5**2))
    row /= row.sum()

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, row.view(1, 1, 11, 1)), row.view(1, 1, 1, 11))

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())
