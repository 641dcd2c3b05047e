"""The losses of concept training. Pure functions: tensors in, one scalar out."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def denoising_loss(prediction_BCHW: Tensor, target_BCHW: Tensor, mask_B1HW: Tensor) -> Tensor:
    """Squared error of the UNet's prediction within the mask, averaged per picture, then over pictures.

    Ho et al. 2020 (arXiv 2006.11239), eq. 14, for noise; Salimans & Ho 2022 (arXiv 2202.00512), appendix D, for v.
    The mask is Custom Diffusion's (Kumari et al., arXiv 2212.04488, section 3.2): a picture pasted into the canvas
    teaches nothing about the canvas around it.

    Args:
        prediction_BCHW: What the UNet predicts.
        target_BCHW: Noise or v, as the base was trained for.
        mask_B1HW: 1 where the loss counts, 0 elsewhere; a picture of which nothing counts adds 0 to the mean.
    """
    error_B1HW = (prediction_BCHW.float() - target_BCHW.float()).square().mean(dim=1, keepdim=True)
    return ((error_B1HW * mask_B1HW).sum(dim=(1, 2, 3)) / mask_B1HW.sum(dim=(1, 2, 3)).clamp(min=1)).mean()


def semantic_preservation_loss(
    concept_features_TD: Tensor, class_features_TD: Tensor, *, margin: float = 0.0
) -> Tensor:
    """How far the concept phrases stand from the class phrases in text space; in [0, 2], 0 for equal phrases.

    ClassDiffusion (Huang et al., arXiv 2405.17532), eq. 10: the cosine distance of the text features of "a sks dog"
    and "a dog", here averaged over T phrases ("a photo of a sks dog", "a sks dog on a beach", ...).

    Args:
        concept_features_TD: Features of the phrases with the concept's token.
        class_features_TD: Features of the same phrases with the class word alone; taken as constants.
        margin: What a phrase's distance may be; only what exceeds it counts.
    """
    distance_T = 1 - F.cosine_similarity(concept_features_TD, class_features_TD.detach(), dim=-1)
    return (distance_T - margin).relu().mean()


def semantic_relation_loss(
    concept_features_TD: Tensor, class_features_UD: Tensor, phrases_T: Tensor, *, margin: float = 0.0
) -> Tensor:
    """How far the concept phrases' relations to the class's phrases differ from the class's own; in [0, 2].

    The mean over t and u != t of |cos(concept_t, class_u) - cos(class_t, class_u)|, after ACCORD's prior-relation term
    (ICLR 2026), which keeps the relation of concept and class prompts to general ones instead of pulling the one onto
    the other.

    Args:
        concept_features_TD: Features of phrases with the concept's token.
        class_features_UD: Features of all phrases with the class word alone; taken as constants.
        phrases_T: Which of the U phrases each of the T is.
        margin: What a cosine may change by; only what exceeds it counts.
    """
    class_UD = F.normalize(class_features_UD.detach(), dim=-1)
    change_TU = (F.normalize(concept_features_TD, dim=-1) - class_UD[phrases_T]) @ class_UD.T
    excess_TU = (change_TU.abs() - margin).relu()
    return excess_TU.scatter(1, phrases_T[:, None], 0.0).sum() / (excess_TU.numel() - len(phrases_T))


def output_preservation_loss(prediction_BCHW: Tensor, base_prediction_BCHW: Tensor) -> Tensor:
    """Squared error of the tuned UNet's prediction to the base's, both for class prompts and on the same noisy latents.

    Differential output preservation (kohya's sd-scripts, pull request 1710); as a prior on the model's output it is
    DreamBooth's preservation term (arXiv 2208.12242, eq. 2) with the base's predictions in place of its pictures.
    """
    return F.mse_loss(prediction_BCHW.float(), base_prediction_BCHW.detach().float())


def background_loss(prediction_BCHW: Tensor, base_prediction_BCHW: Tensor, around_B1HW: Tensor) -> Tensor:
    """Squared error of the tuned UNet's prediction to the base's around the subject, a mean per picture, then of all.

    The complement of a masked denoising loss: what surrounds the thing in its pictures is not learned, and the base's
    own idea of it is kept, as differential output preservation keeps that of whole class pictures.

    Args:
        prediction_BCHW: For the concept's prompt.
        base_prediction_BCHW: For the class prompt, without the adapter, on the same noisy latents.
        around_B1HW: 1 around the subject, 0 on it; a picture may have nothing around it.
    """
    error_B1HW = (prediction_BCHW.float() - base_prediction_BCHW.detach().float()).square().mean(dim=1, keepdim=True)
    return ((error_B1HW * around_B1HW).sum(dim=(1, 2, 3)) / around_B1HW.sum(dim=(1, 2, 3)).clamp(min=1)).mean()


def anchor_loss(changes: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The squared norm of the changes of all weights, relative to that of the base's own weights.

    Preserve & Personalize (ICLR 2026) penalises |theta - theta_0|^2 in place of prior pictures; divided by
    |theta_0|^2 one weight serves adapters of every kind and size.

    Args:
        changes: Each with the weight that it changes.
    """
    squares_N2 = torch.stack(
        [
            torch.stack([change.float().square().sum(), weight.detach().float().square().sum()])
            for change, weight in changes
        ]
    )
    return squares_N2[:, 0].sum() / squares_N2[:, 1].sum()
