"""Prompts to text features, with concept tokens spliced into the input embeddings.

A concept token such as ``sks`` owns K rows of width D. It never enters the embedding table: in a prompt it takes K
positions, and the rows are put there after the table lookup and before the position embedding is added. So no other
word can drift.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from cdvideo.config import check_text

log = logging.getLogger(__name__)

TokenRows = Mapping[str, Tensor]  # concept token string -> rows_KD
SLOT_ID = 0  # the id that stands at a slot's position; its embedding is replaced


class Slot(NamedTuple):
    """Position ``at`` of prompt ``prompt`` is taken by row ``row`` of the concept token ``token``."""

    prompt: int
    at: int
    token: str
    row: int


@dataclass(frozen=True)
class TokenBatch:
    """Tokenised prompts: ids_BL padded to the tokenizer's length, concept slots, true end-of-text positions eos_B."""

    ids_BL: Tensor
    slots: tuple[Slot, ...]
    eos_B: Tensor


class TextFeatures(NamedTuple):
    """hidden_BLD: what the UNet reads; eos_BD: last layer after the final norm, at the true end-of-text position."""

    hidden_BLD: Tensor
    eos_BD: Tensor


def _token_pattern(tokens: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(r"(?<!\w)(" + "|".join(map(re.escape, longest_first)) + r")(?!\w)", re.IGNORECASE)


def find_tokens(prompt: str, tokens: Sequence[str]) -> list[str]:
    """The concept tokens that stand in a prompt as whole words (case ignored), in order of appearance, repeats kept."""
    if not tokens:
        return []
    return [_spelled(found, tokens) for found in _token_pattern(tokens).findall(prompt)]


def _spelled(found: str, tokens: Iterable[str]) -> str:
    """The token that was found, as it is spelled itself: `re` takes ſ for s, which lower-casing does not."""
    return next(token for token in tokens if re.fullmatch(re.escape(token), found, re.IGNORECASE))


def _ids_and_slots(
    tokenizer: CLIPTokenizer, prompt: str, tokens: Mapping[str, int]
) -> tuple[list[int], list[tuple[int, str, int]]]:
    """Ids of one prompt without start and end, and its slots (position without start, token, row)."""
    pieces = _token_pattern(list(tokens)).split(prompt) if tokens else [prompt]
    ids: list[int] = []
    slots: list[tuple[int, str, int]] = []
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            ids += tokenizer(piece, add_special_tokens=False, verbose=False).input_ids  # `tokenize` tells what is cut
            continue
        token = _spelled(piece, tokens)
        slots += [(len(ids) + row, token, row) for row in range(tokens[token])]
        ids += [SLOT_ID] * tokens[token]
    return ids, slots


def tokenize(
    tokenizer: CLIPTokenizer, prompts: Sequence[str], *, tokens: Mapping[str, int] | None = None
) -> TokenBatch:
    """Tokenise prompts; concept tokens (string -> number of rows K) take K positions each.

    Args:
        prompts: B prompts; what exceeds the tokenizer's ``model_max_length`` is cut, and warned of in one line.
        tokens: concept tokens, matched as whole words, case ignored.

    Raises:
        UserError: As `check_text`.

    Returns:
        ids_BL with start and end of text, padded with the tokenizer's pad token to ``model_max_length``.
    """
    length = tokenizer.model_max_length
    ids_BL = torch.full((len(prompts), length), tokenizer.pad_token_id, dtype=torch.long)
    all_slots: list[Slot] = []
    eos: list[int] = []
    for b, prompt in enumerate(prompts):
        check_text(prompt)
        ids, slots = _ids_and_slots(tokenizer, prompt, tokens or {})
        if len(ids) > length - 2:
            log.warning("prompt cut to %d of its %d tokens: %s", length - 2, len(ids), prompt)
            ids = ids[: length - 2]
        row = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        ids_BL[b, : len(row)] = torch.tensor(row)
        all_slots += [Slot(b, at + 1, token, k) for at, token, k in slots if at < length - 2]
        eos.append(len(row) - 1)
    return TokenBatch(ids_BL, tuple(all_slots), torch.tensor(eos))


def encode_text(
    text_encoder: CLIPTextModel | CLIPTextModelWithProjection,
    batch: TokenBatch,
    *,
    rows: TokenRows | None = None,
    penultimate: bool = False,
) -> TextFeatures:
    """Encode tokenised prompts; the rows of concept tokens replace the table's embeddings at the batch's slots.

    The pooled feature is read at the true end-of-text position, also when the encoder's own pooling (highest id) would
    read another one. With a frozen encoder gradients flow into ``rows`` alone.

    Args:
        rows: concept token -> rows_KD, one entry for every token that has a slot.
        penultimate: hidden_BLD is the last layer but one, before the final norm, as SDXL reads it; else the last layer
            after the norm.

    Returns:
        hidden_BLD and eos_BD in the encoder's dtype, on its device.
    """
    table = text_encoder.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    device = table.weight.device

    def splice(_module: nn.Module, _inputs: object, embedded_BLD: Tensor) -> Tensor:
        where_b = torch.tensor([slot.prompt for slot in batch.slots], device=device)
        where_l = torch.tensor([slot.at for slot in batch.slots], device=device)
        assert rows is not None, "the batch has concept slots but no rows were given"
        new_ND = torch.stack([rows[slot.token][slot.row] for slot in batch.slots])
        return embedded_BLD.index_put((where_b, where_l), new_ND.to(device, embedded_BLD.dtype))

    hook = table.register_forward_hook(splice) if batch.slots else None
    try:
        encoded = text_encoder(input_ids=batch.ids_BL.to(device), output_hidden_states=penultimate)
    finally:
        if hook is not None:
            hook.remove()
    last_BLD, eos_B = encoded.last_hidden_state, batch.eos_B.to(device)
    eos_BD = last_BLD[torch.arange(len(eos_B), device=device), eos_B]
    return TextFeatures(encoded.hidden_states[-2] if penultimate else last_BLD, eos_BD)


def is_vocabulary_word(tokenizer: CLIPTokenizer, word: str) -> bool:
    """Whether a word is one single token of the vocabulary, so an ordinary word that a concept token must not hide."""
    ids = tokenizer(word.strip(), add_special_tokens=False).input_ids
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id
