from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cdvideo.concept.losses import (
    anchor_loss,
    background_loss,
    denoising_loss,
    output_preservation_loss,
    semantic_preservation_loss,
    semantic_relation_loss,
)


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


def test_a_picture_of_which_nothing_counts_adds_nothing_and_no_nan() -> None:
    prediction = torch.ones(2, 4, 8, 8, requires_grad=True)
    mask = torch.ones(2, 1, 8, 8)
    mask[0] = 0
    loss = denoising_loss(prediction, torch.zeros(2, 4, 8, 8), mask)
    loss.backward()
    assert loss.item() == pytest.approx((0 + 1) / 2)
    assert prediction.grad is not None and not prediction.grad[0].any() and prediction.grad[1].all()


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


def test_within_the_margin_nothing_counts() -> None:
    concept_TD, class_TD = torch.randn(5, 8), torch.randn(5, 8)
    distance_T = 1 - F.cosine_similarity(concept_TD, class_TD)
    expected = sum(max(0.0, d - 0.9) for d in distance_T.tolist()) / 5
    assert 0 < expected < distance_T.mean()
    assert semantic_preservation_loss(concept_TD, class_TD, margin=0.9).item() == pytest.approx(expected, abs=1e-6)
    assert semantic_preservation_loss(class_TD, class_TD, margin=0.1).item() == 0


def test_the_relation_form_by_hand() -> None:
    class_UD, drawn = torch.randn(6, 8), [4, 1]
    concept_TD = torch.randn(2, 8)
    changes = [
        abs(F.cosine_similarity(concept_TD[t], class_UD[u], 0) - F.cosine_similarity(class_UD[d], class_UD[u], 0))
        for t, d in enumerate(drawn)
        for u in range(6)
        if u != d
    ]
    loss = semantic_relation_loss(concept_TD, class_UD, torch.tensor(drawn))
    torch.testing.assert_close(loss, torch.stack(changes).mean())
    loss = semantic_relation_loss(concept_TD, class_UD, torch.tensor(drawn), margin=0.3)
    torch.testing.assert_close(loss, torch.stack([(change - 0.3).clamp(min=0) for change in changes]).mean())
    assert semantic_relation_loss(class_UD[drawn], class_UD, torch.tensor(drawn)) <= 1e-6


def test_the_relation_form_leaves_free_where_the_concept_stands() -> None:
    """Along a direction that no class phrase has a part in, the point form pulls and the relation form hardly does."""
    class_UD = torch.cat([torch.randn(6, 7) + 3, torch.zeros(6, 1)], dim=1)
    concept_TD = class_UD.clone()
    concept_TD[:, 7] = 1.0
    concept_TD.requires_grad_()
    semantic_relation_loss(concept_TD, class_UD, torch.arange(6), margin=0.2).backward()
    assert concept_TD.grad is not None and not concept_TD.grad.any()
    assert semantic_preservation_loss(concept_TD, class_UD) > 1e-3


def test_the_base_s_output_is_a_constant() -> None:
    ours, base = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 4, 8, 8, requires_grad=True)
    loss = output_preservation_loss(ours, base)
    loss.backward()
    torch.testing.assert_close(loss, ((ours - base) ** 2).mean())
    assert base.grad is None and ours.grad is not None


def test_the_anchor_is_relative_to_the_base() -> None:
    weights = [torch.randn(4, 4), torch.randn(3)]
    changes = [0.1 * weight for weight in weights]
    assert anchor_loss(zip(changes, weights, strict=True)).item() == pytest.approx(0.01)
    assert anchor_loss((10 * c, 10 * w) for c, w in zip(changes, weights, strict=True)).item() == pytest.approx(0.01)


def test_background_loss_counts_only_around_the_subject() -> None:
    base_BCHW = torch.zeros(2, 3, 4, 4)
    prediction_BCHW = torch.full((2, 3, 4, 4), 2.0)
    around_B1HW = torch.zeros(2, 1, 4, 4)
    around_B1HW[0, :, 0] = 1
    prediction_BCHW[0, :, 1:] = 100.0  # on the subject
    assert background_loss(prediction_BCHW, base_BCHW, around_B1HW).item() == pytest.approx((4 + 0) / 2)
