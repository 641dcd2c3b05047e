"""Prompts as a base's UNet reads them: through one text encoder, or through SDXL's two (arXiv 2307.01952, section 2).

Beside the text of both encoders, D their widths together, SDXL's UNet reads one pooled feature, and three sizes: of the
picture before it was scaled, of what was cut off it above and on the left, and of what is seen (section 2.2). A concept
token's rows_KD are as wide as the text: the first channels stand in the first encoder, the others in the second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.base.text import TextFeatures, TokenBatch, TokenRows, encode_text, tokenize


@dataclass(frozen=True)
class EncodedText:
    """hidden_BLD: what cross-attentions read; pooled_BP: SDXL's pooled text, of its second encoder."""

    hidden_BLD: Tensor
    pooled_BP: Tensor | None = None

    def added(self, sizes_B6: Tensor) -> dict[str, Tensor] | None:
        """The UNet's `added_cond_kwargs`: the pooled text, with sizes for each or one for all; None but for SDXL."""
        if self.pooled_BP is None:
            return None
        sizes_B6 = sizes_B6.to(self.pooled_BP.device).expand(len(self.pooled_BP), -1)
        return {"text_embeds": self.pooled_BP, "time_ids": sizes_B6}


def encode_prompts(base: Base, prompts: Sequence[str], *, rows: TokenRows | None = None) -> EncodedText:
    """Encodes B prompts, with a concept's rows_KD in place of its tokens."""
    return encode_batch(base, tokenize_prompts(base, prompts, rows), rows=rows)


def tokenize_prompts(base: Base, prompts: Sequence[str], rows: TokenRows | None = None) -> TokenBatch:
    """Tokenises B prompts, in which each token takes as many positions as it has rows."""
    return tokenize(base.tokenizer, prompts, tokens={token: len(rows_KD) for token, rows_KD in (rows or {}).items()})


def encode_batch(base: Base, batch: TokenBatch, *, rows: TokenRows | None = None) -> EncodedText:
    """Encodes tokenised prompts; an empty one is zeros where the base learned it so."""
    features = encode_each(base, batch, rows=rows)
    if base.text_encoder_2 is None:
        return EncodedText(features[0].hidden_BLD)
    hidden_BLD = torch.cat([each.hidden_BLD for each in features], dim=-1)
    pooled_BP = base.text_encoder_2.text_projection(features[1].eos_BD)
    if base.zero_empty_prompt:
        empty_B = batch.eos_B.to(hidden_BLD.device) == 1  # the end directly after the start
        hidden_BLD = hidden_BLD.masked_fill(empty_B[:, None, None], 0)
        pooled_BP = pooled_BP.masked_fill(empty_B[:, None], 0)
    return EncodedText(hidden_BLD, pooled_BP)


def encode_each(base: Base, batch: TokenBatch, *, rows: TokenRows | None = None) -> list[TextFeatures]:
    """What each of the base's text encoders makes of the prompts."""
    if base.text_encoder_2 is None or base.tokenizer_2 is None:
        return [encode_text(base.text_encoder, batch, rows=rows)]
    batches = (batch, _padded_with(batch, base.tokenizer_2.pad_token_id))
    return [
        encode_text(encoder, of_encoder, rows=own_rows, penultimate=True)
        for encoder, of_encoder, own_rows in zip(
            base.text_encoders.values(), batches, split_rows(base, rows or {}), strict=True
        )
    ]


def text_widths(base: Base) -> list[int]:
    """The widths of the base's text encoders; together D, what a token's rows are wide."""
    return [encoder.config.hidden_size for encoder in base.text_encoders.values()]


def split_rows(base: Base, rows: TokenRows) -> list[dict[str, Tensor]]:
    """The part of each token's rows_KD that belongs to each of the base's text encoders."""
    widths = text_widths(base)
    parts = {token: rows_KD.split(widths, dim=-1) for token, rows_KD in rows.items()}
    return [{token: split[index] for token, split in parts.items()} for index in range(len(widths))]


def joined_features(features: Sequence[Tensor]) -> Tensor:
    """One encoder's features_BD as they are; those of two side by side, each of length 1.

    So the cosine of two joined features is the mean of the cosines in the encoders.
    """
    if len(features) == 1:
        return features[0]
    return torch.cat([F.normalize(each_BD, dim=-1) for each_BD in features], dim=-1)


def picture_sizes(height: int, width: int) -> Tensor:
    """sizes_16 of a picture in pixels that was neither scaled nor cut, which is what samples are to look like."""
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)


def latent_sizes(base: Base, latents_BCHW: Tensor) -> Tensor:
    """`picture_sizes` of the pictures of these latents."""
    height, width = latents_BCHW.shape[-2:]
    cell = 2 ** (len(base.vae.config.block_out_channels) - 1)
    return picture_sizes(height * cell, width * cell)


def repeated(added: Mapping[str, Tensor] | None, times: int) -> dict[str, Tensor] | None:
    """`EncodedText.added` with each prompt's entries so many times in a row, as for the frames of films."""
    return None if added is None else {name: each.repeat_interleave(times, dim=0) for name, each in added.items()}


def _padded_with(batch: TokenBatch, pad_id: int) -> TokenBatch:
    """The same prompts, padded with another id: SDXL's two tokenizers know the same words; the second pads with "!"."""
    behind_BL = torch.arange(batch.ids_BL.shape[1]) > batch.eos_B[:, None]
    return dataclasses.replace(batch, ids_BL=batch.ids_BL.masked_fill(behind_BL, pad_id))
