"""The base's tokenizer: a CLIP-style byte-level BPE whose single tokens are the world's words.

The vocabulary files are CLIP's (vocab.json, merges.txt), so transformers' CLIPTokenizer reads them. All 256 bytes are
in the vocabulary, in the middle and at the end of a word, so any prompt tokenises without an unknown token.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from cdvideo.runs import atomic_path
from cdvideo.world.dataset import read_labels

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
WORLD_WEIGHT = 1000  # how often a word of the captions counts against a common word, so that it becomes one token
WORDS = re.compile(r"[^\W\d_]+|\d|[^\s\w]+")  # as CLIP splits: letters, single digits, runs of signs
TOKENIZE_BATCH = 20_000


def caption_words(captions: Iterable[str]) -> list[str]:
    """The different words of captions, lower case, the most frequent first."""
    return [
        word for word, _ in Counter(word for text in captions for word in WORDS.findall(text.lower())).most_common()
    ]


def train_tokenizer(
    folder: Path, *, world_words: Iterable[str], common_words: Iterable[str], size: int, length: int
) -> None:
    """Learn the merges and write vocab.json, merges.txt and tokenizer_config.json into ``folder``.

    Args:
        world_words: words of the world's captions; each becomes a single token.
        common_words: other English words, which shape the pieces that unknown words fall into.
        size: entries of the vocabulary: 256 bytes twice, the merged pieces, and the two special tokens (highest ids).
        length: ``model_max_length``.

    Raises:
        ValueError: ``size`` is too small for every world word to become one token.
    """
    world = sorted({word.lower() for word in world_words})
    common = sorted({word.lower() for word in common_words} - set(world))
    learner = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2 - len(alphabet),
        initial_alphabet=alphabet,
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    learner.train_from_iterator([" ".join([word] * WORLD_WEIGHT) for word in world] + common, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    merges = merges[: size - 2 - 2 * len(alphabet)]

    entries = [*alphabet, *(letter + END_OF_WORD for letter in alphabet)]
    entries += [left + right for left, right in merges]
    vocabulary = {entry: index for index, entry in enumerate(dict.fromkeys([*entries, START, END]))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "do_lower_case": True,
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    split = [word for word in world if len(tokenizer(word, add_special_tokens=False).input_ids) != 1]
    if split:
        raise ValueError(f"vocabulary of {size} is too small: {len(split)} world words are split, such as {split[:5]}")


def with_unknown_words(caption: str, rng: np.random.Generator, common_words: Sequence[str]) -> str:
    """A caption with one to three words put in that its picture does not show, and now and then a word left out.

    Half of the new words are made of random letters, the others drawn from ``common_words``. What is learned with such
    captions is to pass over words that mean nothing here.
    """
    words = caption.split()
    if len(words) > 2 and rng.random() < 0.3:
        words.pop(rng.integers(len(words)))
    for _ in range(rng.integers(1, 4)):
        invented = "".join(chr(97 + letter) for letter in rng.integers(26, size=rng.integers(3, 8)))
        known = bool(common_words) and rng.random() < 0.5
        words.insert(
            rng.integers(len(words) + 1), common_words[int(rng.integers(len(common_words)))] if known else invented
        )
    return " ".join(words)


def tokenize_split(folder: Path, tokenizer: CLIPTokenizer, *, common_words: Sequence[str], seed: int) -> None:
    """Writes caption_ids.npy (N, captions + 1, L) int16 beside a split's labels; the last column has unknown words."""
    rng = np.random.default_rng([seed, 99])
    texts: list[str] = []
    labels = read_labels(folder)
    for item in labels:
        captions: list[str] = item["captions"]
        texts += [*captions, with_unknown_words(str(rng.choice(captions)), rng, common_words)]
    different = list(dict.fromkeys(texts))
    rows: dict[str, int] = {text: row for row, text in enumerate(different)}
    ids = np.empty((len(different), tokenizer.model_max_length), dtype=np.int16)
    for start in range(0, len(different), TOKENIZE_BATCH):
        batch = different[start : start + TOKENIZE_BATCH]
        ids[start : start + len(batch)] = tokenizer(
            batch, padding="max_length", truncation=True, return_tensors="np", return_attention_mask=False
        ).input_ids
    picked = ids[[rows[text] for text in texts]].reshape(len(labels), -1, ids.shape[1])
    with atomic_path(folder / "caption_ids.npy") as part:
        np.save(part, picked)
