"""The semantic preservation loss bound to a concept: which phrases, which features, which classes."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from cdvideo.base.loader import Base
from cdvideo.base.prompts import encode_each, joined_features, split_rows, tokenize_prompts
from cdvideo.base.text import TokenRows, encode_text
from cdvideo.concept.config import ConceptConfig
from cdvideo.concept.losses import semantic_preservation_loss, semantic_relation_loss
from cdvideo.concept.phrases import SEMANTIC_PHRASES, fill, training_prompts


def phrase_features(base: Base, phrases: list[str], rows: TokenRows | None = None) -> Tensor:
    """Features of phrases at their true end-of-text position: features_TD, of SDXL's two encoders as `joined_features`.

    Attention is causal, so the padding behind the longest phrase can not reach that position and is left out.
    """
    batch = tokenize_prompts(base, phrases, rows)
    batch = dataclasses.replace(batch, ids_BL=batch.ids_BL[:, : int(batch.eos_B.max()) + 1])
    return joined_features([of_encoder.eos_BD.float() for of_encoder in encode_each(base, batch, rows=rows)])


class SemanticPreservation:
    """L_SPL as a function of the tokens' rows. The class features are constants, computed once."""

    def __init__(self, base: Base, config: ConceptConfig) -> None:
        self.base, self.config = base, config
        self.templates = (*training_prompts(config.data.style), *SEMANTIC_PHRASES)
        if config.semantic.form == "relation":  # which would tell a phrase apart from itself, where both have it
            self.templates = tuple(dict.fromkeys(self.templates))
        if config.semantic.variant == "released":
            self.templates = self.templates[:1]
        if config.semantic.form == "relation":  # a phrase has no relation to itself
            self.templates = tuple(dict.fromkeys(self.templates))
        with torch.no_grad():
            self.class_features = {
                token: phrase_features(base, [fill(t, class_word) for t in self.templates])
                for token, class_word in config.class_words.items()
            }

    def __call__(self, rows: TokenRows, generator: torch.Generator) -> Tensor:
        """The loss over a draw of the phrases, averaged over the subjects.

        Args:
            rows: The tokens' rows; the only input that receives a gradient.
            generator: Draws the phrases; a generator of the CPU.
        """
        semantic = self.config.semantic
        if semantic.variant == "released":
            losses = [
                semantic_preservation_loss(self._released_feature(token, rows), class_TD, margin=semantic.margin)
                for token, class_TD in self.class_features.items()
            ]
            return torch.stack(losses).mean()
        drawn_T = torch.randperm(len(self.templates), generator=generator)[: semantic.phrases]
        phrases = [fill(self.templates[t], phrase) for phrase in self.config.phrases.values() for t in drawn_T.tolist()]
        features = phrase_features(self.base, phrases, rows).chunk(len(self.class_features))
        losses = [
            self._loss(concept_TD, class_UD, drawn_T.to(class_UD.device))
            for concept_TD, class_UD in zip(features, self.class_features.values(), strict=True)
        ]
        return torch.stack(losses).mean()

    def _loss(self, concept_TD: Tensor, class_UD: Tensor, drawn_T: Tensor) -> Tensor:
        margin = self.config.semantic.margin
        if self.config.semantic.form == "relation":
            return semantic_relation_loss(concept_TD, class_UD, drawn_T, margin=margin)
        return semantic_preservation_loss(concept_TD, class_UD[drawn_T], margin=margin)

    def _released_feature(self, token: str, rows: TokenRows) -> Tensor:
        """A subject's feature as ClassDiffusion's released code has it, for one phrase.

        Its pooling takes the highest token id, which is the new token's, so it reads the concept's own position; and it
        writes the token's rows over the sum of token and position embedding. Subtracting the position beforehand does
        the same.
        """
        phrase = fill(self.templates[0], self.config.phrases[token])
        batch = tokenize_prompts(self.base, [phrase], {token: rows[token]})
        at = [slot.at for slot in batch.slots]
        features = []
        for encoder, own in zip(self.base.text_encoders.values(), split_rows(self.base, rows), strict=True):
            positions_KD = _position_embedding(encoder).weight[at]
            hidden_BLD = encode_text(encoder, batch, rows={token: own[token] - positions_KD.float()}).hidden_BLD
            features.append(hidden_BLD[:, at[-1]].float())
        return joined_features(features)


def _position_embedding(text_encoder: nn.Module) -> nn.Embedding:
    """Found by name: transformers 5 took away the level `text_model` above it."""
    (found,) = (
        module for name, module in text_encoder.named_modules() if name.endswith("embeddings.position_embedding")
    )
    assert isinstance(found, nn.Embedding)
    return found
