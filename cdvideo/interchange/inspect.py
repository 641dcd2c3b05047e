"""What a file holds, in words; no base is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from cdvideo.concept.file import read_metadata
from cdvideo.interchange.files import (
    CLONEOFSIMO,
    DELTA,
    LYCORIS,
    OWN,
    PEFT,
    TEXTUAL_INVERSION,
    TWO_ROWS,
    Foreign,
    read_foreign,
)
from cdvideo.interchange.lora import alpha_of
from cdvideo.interchange.lycoris import forms
from cdvideo.interchange.names import part_of
from cdvideo.interchange.sdxl import FAMILIES
from cdvideo.interchange.settings import PEFT_CONFIG, read_settings
from cdvideo.interchange.textual_inversion import words_of

# What headers say about a file's use, in kohya's and Stability's words.
_TOLD = (
    *("modelspec.title", "modelspec.trigger_phrase", "ss_training_comment", "modelspec.architecture"),
    *("ss_base_model_version", "ss_sd_model_name"),
)


def describe(path: Path) -> list[str]:
    """Lines for the reader: the kind of file, its layers or words, and what its header tells.

    Raises:
        UserError: As `read_foreign`.
    """
    foreign = read_foreign(path)
    size = path.stat().st_size / 1e6
    return [f"{path}: {foreign.kind}, {len(foreign.tensors)} tensors, {size:.2f} MB", *_details(foreign)]


def _details(foreign: Foreign) -> Iterator[str]:
    tensors = foreign.tensors
    if foreign.kind == OWN:
        metadata = read_metadata(foreign.path)
        words = ", ".join(f'"{token} {word}"'.replace(' "', '"') for token, word in metadata.class_words.items())
        yield f"  adapter {metadata.adapter}, tokens {words or 'none'}"
        yield f"  trained on {metadata.base_name} ({metadata.base_hash}), {metadata.steps} steps"
        return
    if found := words_of(foreign):
        rows = ", ".join(f"{word} ({count} {'row' if count == 1 else 'rows'})" for word, count in found.items())
        yield f"  {'word' if len(found) == 1 else 'words'}: {rows}"
    if foreign.kind == LYCORIS:
        yield "  " + ", ".join(f"{form} of {count} layers" for form, count in sorted(forms(tensors).items()))
    if foreign.kind not in (TEXTUAL_INVERSION, DELTA):
        yield from _strength(foreign)
    width = _text_width(foreign, tensors)
    if width:
        yield f"  reads text of {width} channels" + (f", as {FAMILIES[width]} does" if width in FAMILIES else "")
    yield from (f"  {key}: {foreign.header[key]}" for key in _TOLD if foreign.header.get(key))
    shown = sorted(tensors)
    yield from (f"  {key} {tuple(tensors[key].shape)}" for key in shown[:4])
    if len(shown) > 4:
        yield f"  ... and {len(shown) - 4} more"


def _strength(foreign: Foreign) -> Iterator[str]:
    """The ranks of a LoRA's layers and their alphas, and how far these are known."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in foreign.tensors.items():
        found = part_of(key)
        if found is not None:
            parts.setdefault(found.stem, {})[found.part] = tensor
    if foreign.kind == CLONEOFSIMO:
        downs = [tensor for key, tensor in foreign.tensors.items() if key.endswith(":down")]
        downs = downs or list(foreign.tensors.values())[1::2]
        parts = {str(index): {"A": down} for index, down in enumerate(downs)}
    ranks = Counter(len(own["A"]) for own in parts.values() if "A" in own and own["A"].ndim > 1)
    if ranks:
        yield "  ranks: " + ", ".join(f"{rank} in {count} layers" for rank, count in sorted(ranks.items()))
    alphas = Counter(alpha_of(own, 0) for own in parts.values() if "alpha" in own)
    settings = read_settings(foreign) if foreign.kind != CLONEOFSIMO else None
    if settings is not None and settings.told and not alphas:
        alphas = Counter(float(s["lora_alpha"]) for s in settings.by_model.values() if "lora_alpha" in s)
        told = (
            "; each layer's by its rank's root" if any(s.get("use_rslora") for s in settings.by_model.values()) else ""
        )
        yield f"  alpha: {', '.join(f'{alpha:g}' for alpha in sorted(alphas)) or 'the rank'}{told}"
        if settings.base:
            yield f"  base: {settings.base}"
    elif alphas:
        yield "  alpha: " + ", ".join(
            f"{alpha or 'the rank'} in {count} layers" for alpha, count in sorted(alphas.items())
        )
    elif foreign.kind == PEFT:
        yield f"  alpha: unknown, there is no {PEFT_CONFIG} beside it; taken for the rank"


def _text_width(foreign: Foreign, tensors: Mapping[str, Tensor]) -> int | None:
    """The text's width, where rows or the factor of a cross-attention's K that reads it tell it."""
    for pair in TWO_ROWS:
        if set(pair) <= tensors.keys():
            return sum(tensors[name].shape[-1] for name in pair if tensors[name].ndim)
    if foreign.kind == TEXTUAL_INVERSION:
        return max((tensor.shape[-1] for tensor in tensors.values() if tensor.ndim), default=None)
    keys = [(key, part_of(key), tensor) for key, tensor in tensors.items() if "attn2" in key and "to_k" in key]
    downs = [
        t
        for key, part, t in keys
        if t.ndim == 2 and ("custom_diffusion" in key or (part and part.part in ("A", "diff")))
    ]
    return max((tensor.shape[1] for tensor in downs), default=None)
