from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cdvideo.evaluation.judge import augmentation
from cdvideo.evaluation.judge.augmentation import (
    add_noise,
    augment,
    blur,
    compress,
    cosine_matrix,
    degrade,
    erase_background,
    move,
    round_trip,
    shift_colours,
)


@pytest.fixture
def pixels_BCHW() -> Tensor:
    ramp = torch.linspace(-0.9, 0.9, 32)
    return torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), torch.zeros(32, 32)]).repeat(6, 1, 1, 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("function", [move, shift_colours, blur, add_noise, compress])
def test_every_picture_is_changed_in_a_way_of_its_own(function, pixels_BCHW: Tensor) -> None:  # type: ignore[no-untyped-def]
    changed_BCHW = function(pixels_BCHW, seeded())
    assert changed_BCHW.shape == pixels_BCHW.shape
    assert changed_BCHW.abs().max() <= 1 + 1e-6
    assert not torch.allclose(changed_BCHW[0], pixels_BCHW[0], atol=1e-3)
    assert not torch.allclose(changed_BCHW[0], changed_BCHW[1], atol=1e-4)
    assert torch.equal(changed_BCHW, function(pixels_BCHW, seeded()))


def test_the_figure_is_never_erased(pixels_BCHW: Tensor) -> None:
    figure_B1HW = torch.zeros(6, 1, 32, 32)
    figure_B1HW[:, :, 8:24, 8:24] = 1
    erased_BCHW = erase_background(pixels_BCHW, figure_B1HW, seeded())
    assert torch.equal(erased_BCHW[:, :, 8:24, 8:24], pixels_BCHW[:, :, 8:24, 8:24])
    share = (erased_BCHW != pixels_BCHW).any(dim=1).float().mean()
    assert 0 < share < 0.16


def test_blur_keeps_a_plain_picture_and_softens_an_edge() -> None:
    plain_BCHW = torch.full((2, 3, 16, 16), 0.3)
    assert torch.allclose(blur(plain_BCHW, seeded()), plain_BCHW, atol=1e-5)
    edge_BCHW = torch.cat([torch.zeros(2, 3, 16, 8), torch.ones(2, 3, 16, 8)], dim=3)
    assert blur(edge_BCHW, seeded()).diff(dim=3).max() < 0.9


def test_the_cosine_transform_is_orthonormal() -> None:
    matrix = cosine_matrix(8)
    assert torch.allclose(matrix @ matrix.mT, torch.eye(8), atol=1e-6)


def test_compression_loses_fine_detail_and_keeps_the_rest(pixels_BCHW: Tensor) -> None:
    assert (compress(pixels_BCHW, seeded()) - pixels_BCHW).abs().mean() < 0.05
    fine_BCHW = pixels_BCHW + 0.02 * torch.randn(pixels_BCHW.shape, generator=seeded(1))
    assert compress(fine_BCHW, seeded()).diff(dim=3).std() < fine_BCHW.diff(dim=3).std()


def test_round_trip_without_noise_is_encode_then_decode(pixels_BCHW: Tensor) -> None:
    again_BCHW = round_trip(pixels_BCHW, lambda p: p / 2, lambda z: z * 4, noise=0.0, generator=seeded())
    assert torch.allclose(again_BCHW, (2 * pixels_BCHW).clamp(-1, 1))


def test_shares(pixels_BCHW: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    many_BCHW = pixels_BCHW[:1].expand(400, -1, -1, -1)
    monkeypatch.setattr(augmentation, "blur", lambda pixels, generator: pixels)
    monkeypatch.setattr(augmentation, "compress", lambda pixels, generator: pixels)
    changed = (degrade(many_BCHW, seeded()) != many_BCHW).flatten(1).any(dim=1).float().mean()
    assert 0.28 < changed < 0.42


def test_augment_keeps_shape_and_range(pixels_BCHW: Tensor) -> None:
    augmented_BCHW = augment(pixels_BCHW, torch.zeros(6, 1, 32, 32), seeded())
    assert augmented_BCHW.shape == pixels_BCHW.shape
    assert augmented_BCHW.abs().max() <= 1
