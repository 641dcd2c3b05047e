"""The losses of concept training. Pure functions: tensors in, one scalar out."""

from __future__ import annotations

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
        mask_B1HW: 1 where the loss counts, 0 elsewhere; at least one cell of every picture counts.
    """
    error_B1HW = (prediction_BCHW.float() - target_BCHW.float()).square().mean(dim=1, keepdim=True)
    return ((error_B1HW * mask_B1HW).sum(dim=(1, 2, 3)) / mask_B1HW.sum(dim=(1, 2, 3))).mean()


def semantic_preservation_loss(concept_features_TD: Tensor, class_features_TD: Tensor) -> Tensor:
    """How far the concept phrases stand from the class phrases in text space; in [0, 2], 0 for equal phrases.

    ClassDiffusion (Huang et al., arXiv 2405.17532), eq. 10: the cosine distance of the text features of "a sks dog"
    and "a dog", here averaged over T phrases ("a photo of a sks dog", "a sks dog on a beach", ...).

    Args:
        concept_features_TD: Features of the phrases with the concept's token.
        class_features_TD: Features of the same phrases with the class word alone; taken as constants.
    """
    return (1 - F.cosine_similarity(concept_features_TD, class_features_TD.detach(), dim=-1)).mean()
