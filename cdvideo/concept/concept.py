"""What a concept is: the rows of its tokens, what its adapter learned, and where it came from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from cdvideo.base.loader import HUB_ID

FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class ConceptMetadata:
    """Where a concept came from."""

    class_words: dict[str, str]  # token -> class word
    initialiser: str
    base_name: str
    base_hash: str
    resolution: int  # pixels
    prediction_type: str
    steps: int
    lr: float
    token_lr: float
    seed: int
    loss_weights: dict[str, float]  # loss -> weight
    sample_prompt: str
    preview: str = ""  # a PNG in base64
    versions: dict[str, str] = field(default_factory=lambda: library_versions())
    adapter: str = "kv"  # as AdapterConfig.kind
    adapter_settings: dict[str, str | int | float | bool] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Concept:
    """One learned concept: rows_KD for each token, and what its adapter learned, by its names in the file."""

    tokens: dict[str, Tensor]
    weights: dict[str, Tensor]
    metadata: ConceptMetadata


def distinct_words(tokens: Mapping[str, Tensor]) -> list[list[str]]:
    """The words, those together that have the same rows: names of one thing."""
    groups: list[list[str]] = []
    for word, rows_KD in tokens.items():
        group = next((group for group in groups if torch.equal(tokens[group[0]], rows_KD)), None)
        if group is None:
            groups.append([word])
        else:
            group.append(word)
    return groups


def library_versions() -> dict[str, str]:
    """The libraries whose arithmetic made a concept."""
    return {name: version(name) for name in ("torch", "diffusers", "transformers")}


def public_base_name(name: str) -> str:
    """A base's name without the folders above it, which are nobody's business: /home/me/sd15 is sd15. Names on the hub
    stay."""
    path = Path(name).expanduser()
    if path.exists():
        return path.resolve().name
    return name if re.fullmatch(HUB_ID, name) else re.split(r"[\\/]", name.rstrip("\\/"))[-1]
