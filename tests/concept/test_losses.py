from __future__ import annotations

import pytest
import torch

from cdvideo.concept.losses import denoising_loss, semantic_preservation_loss


def test_denoising_loss_is_the_mean_square_where_everything_counts() -> None:
    prediction, target = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    expected = torch.nn.functional.mse_loss(prediction, target)
    torch.testing.assert_close(denoising_loss(prediction, target, torch.ones(2, 1, 8, 8)), expected)


def test_denoising_loss_sees_nothing_outside_of_the_mask() -> None:
    prediction, target, mask = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.zeros(2, 1, 8, 8)
    mask[:, :, 2:5, 2:5] = 1
    before = denoising_loss(prediction, target, mask)
    prediction[:, :, 5:] += 100
    torch.testing.assert_close(denoising_loss(prediction, target, mask), before)


def test_every_picture_counts_the_same_however_small_its_region() -> None:
    target, mask = torch.zeros(2, 4, 8, 8), torch.ones(2, 1, 8, 8)
    mask[0] = 0
    mask[0, :, 0, 0] = 1
    prediction = torch.stack([torch.full((4, 8, 8), 3.0), torch.full((4, 8, 8), 1.0)])
    assert denoising_loss(prediction, target, mask).item() == pytest.approx((9 + 1) / 2)


def test_semantic_loss_is_zero_for_equal_and_one_for_orthogonal_phrases() -> None:
    features = torch.randn(5, 16)
    assert semantic_preservation_loss(features, features).item() == pytest.approx(0, abs=1e-6)
    assert semantic_preservation_loss(3 * features, features).item() == pytest.approx(0, abs=1e-6)
    assert semantic_preservation_loss(torch.eye(4)[:2], torch.eye(4)[2:]).item() == pytest.approx(1)
    assert semantic_preservation_loss(-features, features).item() == pytest.approx(2, abs=1e-6)


def test_semantic_loss_takes_the_class_as_constant() -> None:
    concept, class_ = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    semantic_preservation_loss(concept, class_).backward()
    assert concept.grad is not None and concept.grad.norm() > 0
    assert class_.grad is None
