"""The semantic preservation loss bound to one concept: which phrases, which features, which class."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel

from cdvideo.base.loader import Base
from cdvideo.base.text import TokenRows, encode_text, tokenize
from cdvideo.concept.config import ConceptConfig
from cdvideo.concept.losses import semantic_preservation_loss
from cdvideo.concept.phrases import SEMANTIC_PHRASES, fill, training_prompts


def phrase_features(base: Base, phrases: list[str], rows: TokenRows | None = None) -> Tensor:
    """Features of phrases at their true end-of-text position: features_TD.

    Attention is causal, so the padding behind the longest phrase can not reach that position and is left out.
    """
    rows = rows or {}
    batch = tokenize(base.tokenizer, phrases, tokens={token: len(rows_KD) for token, rows_KD in rows.items()})
    batch = dataclasses.replace(batch, ids_BL=batch.ids_BL[:, : int(batch.eos_B.max()) + 1])
    return encode_text(base.text_encoder, batch, rows=rows).eos_BD.float()


class SemanticPreservation:
    """L_SPL as a function of the token's rows. The class features are constants, computed once."""

    def __init__(self, base: Base, config: ConceptConfig) -> None:
        self.base, self.config = base, config
        self.templates = (*training_prompts(config.data.style), *SEMANTIC_PHRASES)
        if config.semantic.variant == "released":
            self.templates = self.templates[:1]
        with torch.no_grad():
            self.class_features_TD = phrase_features(base, [fill(t, config.class_word) for t in self.templates])

    def __call__(self, rows_KD: Tensor, generator: torch.Generator) -> Tensor:
        """The loss over a draw of the phrases.

        Args:
            rows_KD: The token's rows; the only input that receives a gradient.
            generator: Draws the phrases; a generator of the CPU.
        """
        if self.config.semantic.variant == "released":
            return semantic_preservation_loss(self._released_features(rows_KD), self.class_features_TD)
        drawn = torch.randperm(len(self.templates), generator=generator)[: self.config.semantic.phrases].tolist()
        phrases = [fill(self.templates[i], self.config.phrase) for i in drawn]
        features_TD = phrase_features(self.base, phrases, {self.config.token: rows_KD})
        return semantic_preservation_loss(features_TD, self.class_features_TD[drawn])

    def _released_features(self, rows_KD: Tensor) -> Tensor:
        """The concept's feature as ClassDiffusion's released code has it, for one phrase.

        Its pooling takes the highest token id, which is the new token's, so it reads the concept's own position; and it
        writes the token's rows over the sum of token and position embedding. Subtracting the position beforehand does
        the same.
        """
        token, text_encoder = self.config.token, self.base.text_encoder
        phrase = fill(self.templates[0], self.config.phrase)
        batch = tokenize(self.base.tokenizer, [phrase], tokens={token: len(rows_KD)})
        at = [slot.at for slot in batch.slots]
        positions_KD = _position_embedding(text_encoder).weight[at]
        hidden_BLD = encode_text(text_encoder, batch, rows={token: rows_KD - positions_KD.float()}).hidden_BLD
        return hidden_BLD[:, at[-1]].float()


def _position_embedding(text_encoder: CLIPTextModel) -> nn.Embedding:
    """Found by name: transformers 5 took away the level `text_model` above it."""
    (found,) = (
        module for name, module in text_encoder.named_modules() if name.endswith("embeddings.position_embedding")
    )
    assert isinstance(found, nn.Embedding)
    return found
