from __future__ import annotations

import math

import numpy as np
import pytest

from cdvideo.sampling.distance import film_psnr, film_ssim


def film(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, (2, 16, 20, 3), dtype=np.uint8)


def test_psnr() -> None:
    assert math.isinf(film_psnr(film(0), film(0)))
    assert film_psnr(film(0), film(0) + np.uint8(5)) == pytest.approx(20 * math.log10(255 / 5))


def test_ssim() -> None:
    assert film_ssim(film(0), film(0)) == pytest.approx(1)
    assert abs(film_ssim(film(0), film(1))) < 0.3
    assert film_ssim(film(0), 255 - film(0)) < 0, "inverted structure"
    black, grey = np.zeros((1, 16, 16, 3), np.uint8), np.full((1, 16, 16, 3), 100, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert film_ssim(black, grey) == pytest.approx(c1 / (100**2 + c1)), "equation 6 alone, where nothing varies"
