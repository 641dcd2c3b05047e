"""Is the token free, and does the base know the class word? Asked first, since either ruins a concept silently."""

from __future__ import annotations

import logging

from transformers import CLIPTokenizer

from cdvideo.base.text import is_vocabulary_word
from cdvideo.errors import UserError

logger = logging.getLogger(__name__)

# CLIP's vocabulary is sorted by frequency; its last part are rare pieces such as "sks" (48136), made for being a token.
_RARE_FROM = 40_000


def check_token(tokenizer: CLIPTokenizer, token: str) -> None:
    """Raises UserError for a token that is an ordinary word of the base: prompts with it would change their meaning."""
    word_id = tokenizer(token, add_special_tokens=False).input_ids[0]
    if is_vocabulary_word(tokenizer, token) and word_id < _RARE_FROM:
        raise UserError(
            f"token {token!r} is an ordinary word that the base knows",
            allowed='a made-up word without a meaning, such as "sks"',
            do="choose another --token",
        )


def warn_of_unknown_words(tokenizer: CLIPTokenizer, class_word: str) -> None:
    """Warns in one line of words that the base only reads in three or more pieces, so hardly knows."""
    pieces = {word: tokenizer.tokenize(word) for word in class_word.split()}
    unknown = [
        f"{word!r} ({' '.join(p.removesuffix('</w>') for p in ps)})" for word, ps in pieces.items() if len(ps) > 2
    ]
    if unknown:
        logger.warning("the base may not know the class word %s: a plainer one keeps more meaning", ", ".join(unknown))
