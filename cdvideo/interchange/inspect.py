"""What a file holds, in words; no base is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from cdvideo.concept.file import read_metadata
from cdvideo.interchange.files import LYCORIS, OWN, TEXTUAL_INVERSION, Foreign, read_foreign
from cdvideo.interchange.lycoris import forms
from cdvideo.interchange.sdxl import ROWS

# What headers say about a file's use, in kohya's and Stability's words.
_TOLD = ("modelspec.title", "modelspec.trigger_phrase", "modelspec.architecture", "ss_base_model_version")
_DOWN = ("lora_down.weight", "lora_A.weight", "lora.down.weight", "layer.down.weight")
_BASES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}


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
    if foreign.kind == LYCORIS:
        yield "  " + ", ".join(f"{form} of {count} layers" for form, count in sorted(forms(tensors).items()))
    ranks = Counter(len(tensor) for key, tensor in tensors.items() if key.endswith(_DOWN))
    if ranks:
        yield "  ranks: " + ", ".join(f"{rank} in {count} layers" for rank, count in sorted(ranks.items()))
    width = _text_width(foreign, tensors)
    if width:
        yield f"  reads text of {width} channels" + (f", as {_BASES[width]} does" if width in _BASES else "")
    yield from (f"  {key}: {foreign.header[key]}" for key in _TOLD if foreign.header.get(key))
    shown = sorted(tensors)
    yield from (f"  {key} {tuple(tensors[key].shape)}" for key in shown[:4])
    if len(shown) > 4:
        yield f"  ... and {len(shown) - 4} more"


def _text_width(foreign: Foreign, tensors: dict[str, Tensor]) -> int | None:
    """The text's width, where rows or a cross-attention's K tell it."""
    if set(ROWS) <= tensors.keys():
        return sum(tensors[name].shape[-1] for name in ROWS)
    if foreign.kind == TEXTUAL_INVERSION:
        return max(tensor.shape[-1] for tensor in tensors.values() if tensor.ndim)
    keys = [tensor for key, tensor in tensors.items() if "attn2" in key and "to_k" in key and tensor.ndim == 2]
    return max((tensor.shape[1] for tensor in keys if tensor.shape[1] > 4), default=None)
