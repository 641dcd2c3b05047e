"""What was measured of drift while training, in a run's folder: drift.safetensors.

By token: `class.<token>` and `concept.<token>` (T, D), `path.<token>` (S, D), `class_mass.<token>` (W, R),
`mass.<token>` (S, W, R), `maps.<token>` (S, W, H, W); the steps S of text and of attention differ. Metadata: one JSON
object under the key `drift`, with the steps, the words W and the resolutions R.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cdvideo.errors import UserError
from cdvideo.runs import atomic_path

DRIFT_FILE = "drift.safetensors"
_TENSORS = ("class", "concept", "path", "class_mass", "mass", "maps")


@dataclass
class ConceptDrift:
    """One concept's way through its training, on the CPU.

    Attributes:
        words: Of the prompt that attention is measured on, in order, with its start and its rest.
        heights: The resolutions of attention: heights of its maps in cells, the finest first.
        class_TD: The class's cluster: unit features of the held-out phrases with the class word.
        class_mass_WR: The shares of attention that the base gives to the words of the class's own prompt, in [0, 1];
            0 for the token, which does not stand there.
        concept_TD: The concept's unit features of the same phrases, at the step last measured.
        path: Their mean, features_D, at every step measured.
        mass: The words' shares of attention, mass_WR, at every step where attention was measured.
        maps: The same for each pixel of one picture at one resolution, maps_WHW.
    """

    class_word: str
    words: tuple[str, ...]
    heights: tuple[int, ...]
    class_TD: Tensor
    class_mass_WR: Tensor
    concept_TD: Tensor
    path: list[Tensor] = field(default_factory=list)
    mass: list[Tensor] = field(default_factory=list)
    maps: list[Tensor] = field(default_factory=list)


@dataclass
class DriftRecord:
    """All that was measured: the steps of text and of attention, and each concept by its token."""

    text_steps: list[int]
    attention_steps: list[int]
    concepts: dict[str, ConceptDrift]

    def until(self, step: int) -> DriftRecord:
        """The record without what was measured after a step."""
        texts, attentions = (sum(s <= step for s in steps) for steps in (self.text_steps, self.attention_steps))
        concepts = {
            token: dataclasses.replace(c, path=c.path[:texts], mass=c.mass[:attentions], maps=c.maps[:attentions])
            for token, c in self.concepts.items()
        }
        return DriftRecord(self.text_steps[:texts], self.attention_steps[:attentions], concepts)


def save_drift(record: DriftRecord, path: Path) -> None:
    """Writes the file, whole or not at all; something must have been measured."""
    tensors, concepts = {}, {}
    for token, c in record.concepts.items():
        stacks = (torch.stack(c.path), c.class_mass_WR, torch.stack(c.mass), torch.stack(c.maps))
        for name, tensor in zip(_TENSORS, (c.class_TD, c.concept_TD, *stacks), strict=True):
            tensors[f"{name}.{token}"] = tensor.contiguous()
        concepts[token] = {"class_word": c.class_word, "words": c.words, "heights": c.heights}
    metadata = {"text_steps": record.text_steps, "attention_steps": record.attention_steps, "concepts": concepts}
    with atomic_path(path) as part:
        part.write_bytes(save(tensors, metadata={"drift": json.dumps(metadata, ensure_ascii=False)}))


def load_drift(path: Path) -> DriftRecord:
    """Reads the file.

    Raises:
        UserError: For a file that is missing or is none of drift.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads(file.metadata()["drift"])
            # Copied, since the file is mapped, and Windows replaces no file that is.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        texts, attentions = ([int(step) for step in metadata[name]] for name in ("text_steps", "attention_steps"))
        concepts = {
            token: _concept_of(token, about, tensors, counts=(len(texts), len(attentions)))
            for token, about in metadata["concepts"].items()
        }
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} can not be read as a record of drift",
            allowed=f"{DRIFT_FILE} in the folder of a run",
            do="name the folder of a run of scripts/train_concept.py",
        ) from error
    return DriftRecord(texts, attentions, concepts)


def _concept_of(token: str, about: Any, tensors: Mapping[str, Tensor], *, counts: tuple[int, int]) -> ConceptDrift:
    """One concept of a record of so many steps of text and of attention. Raises ValueError, KeyError or TypeError."""
    found = {name: tensors[f"{name}.{token}"] for name in _TENSORS}
    words, heights = tuple(map(str, about["words"])), tuple(map(int, about["heights"]))
    (texts, attentions), table = counts, (len(words), len(heights))
    width = found["class"].shape[-1]
    shapes = {
        "class": (len(found["class"]), width),
        "concept": (len(found["concept"]), width),
        "path": (texts, width),
        "class_mass": table,
        "mass": (attentions, *table),
        "maps": (attentions, len(words), *found["maps"].shape[2:4]),
    }
    for name, shape in shapes.items():
        if found[name].shape != shape or not found[name].is_floating_point():
            raise ValueError(f"{name}.{token} is of shape {tuple(found[name].shape)}, not {shape}")
    return ConceptDrift(
        class_word=str(about["class_word"]),
        words=words,
        heights=heights,
        class_TD=found["class"],
        class_mass_WR=found["class_mass"],
        concept_TD=found["concept"],
        path=list(found["path"]),
        mass=list(found["mass"]),
        maps=list(found["maps"]),
    )
