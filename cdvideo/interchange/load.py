"""Any file of a concept or an adapter, ours or another's, as a concept of a base; never without effect."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.base.text import is_vocabulary_word
from cdvideo.concept.concept import Concept, ConceptMetadata, public_base_name
from cdvideo.concept.config import CONCEPT_FILE
from cdvideo.concept.file import load_concept
from cdvideo.concept.merge import merge_concepts, weighted
from cdvideo.errors import UserError
from cdvideo.interchange.custom_diffusion import adapter_kind, read_custom_diffusion, read_delta
from cdvideo.interchange.files import (
    CUSTOM_DIFFUSION,
    DELTA,
    LYCORIS,
    OWN,
    READABLE,
    TEXTUAL_INVERSION,
    Foreign,
    read_foreign,
)
from cdvideo.interchange.lora import as_layers, read_lora
from cdvideo.interchange.lycoris import read_lycoris
from cdvideo.interchange.textual_inversion import read_rows

logger = logging.getLogger(__name__)

ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def load_adapters(
    base: Base,
    paths: Sequence[tuple[Path, float]],
    *,
    report: Callable[[str], object] = logger.info,
) -> Concept:
    """Files or folders, each with a weight, as one concept.

    A folder is all of its files of weights together, as training scripts leave them: an adapter and its tokens.

    Args:
        report: Is told in a line for each file what it is and how much of it found its place in the base.

    Raises:
        UserError: For what can not be read, does not fit this base, or changes nothing.
    """
    loaded = []
    for path, weight in paths:
        parts = [_load_file(file, base, report) for file in files_of(path)]
        whole = parts[0] if len(parts) == 1 else merge_concepts(base, parts)
        loaded.append(weighted(base, whole, weight))
    return loaded[0] if len(loaded) == 1 else merge_concepts(base, loaded)


def files_of(path: Path) -> list[Path]:
    """The files that belong together: those of a folder, or a file with what lies beside it for it.

    Custom Diffusion's script leaves the tokens in `<new1>.bin` beside the weights; they come along.
    """
    if path.is_dir():
        if (path / CONCEPT_FILE).is_file():  # a run's folder, which holds the run's state too
            return [path / CONCEPT_FILE]
        files = sorted(file for file in path.iterdir() if file.suffix in ENDINGS)
        if not files:
            raise UserError(f"{path} holds no file of weights", allowed=READABLE, do="name another folder, or a file")
        return files
    beside = sorted(file for file in path.parent.glob("<*>.*") if file.suffix in ENDINGS and file != path)
    return [path, *beside] if beside and read_foreign(path).kind == CUSTOM_DIFFUSION else [path]


def _load_file(path: Path, base: Base, report: Callable[[str], object]) -> Concept:
    foreign = read_foreign(path)
    if foreign.kind == OWN:
        concept = load_concept(path, base=base, report=report)
    else:
        concept = _as_concept(foreign, base)
        words = f" for {', '.join(concept.tokens)}" if concept.tokens else ""
        count = len(foreign.tensors)
        report(f"{foreign.kind} {path}{words}: matched {count}/{count} tensors")
        for token in concept.tokens:
            if is_vocabulary_word(base.tokenizer, token):
                logger.warning("%s calls its token %r, a word of the base, which it hides", path.name, token)
    _require_effect(path, concept)
    return concept


def _as_concept(foreign: Foreign, base: Base) -> Concept:
    tokens: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    if foreign.kind == TEXTUAL_INVERSION:
        kind, tokens = "token", read_rows(foreign, base)
    elif foreign.kind == CUSTOM_DIFFUSION:
        weights = read_custom_diffusion(foreign, base)
        kind = adapter_kind(base.unet, weights)
    elif foreign.kind == LYCORIS:
        weights = read_lycoris(foreign, base)
        kind = adapter_kind(base.unet, weights)
    elif foreign.kind == DELTA:
        weights, tokens = read_delta(foreign, base)
        kind = adapter_kind(base.unet, weights) if weights else "token"
    else:
        kind = "lora"
        weights, settings = read_lora(foreign, base)
    return Concept(
        {name: rows_KD.to(base.device) for name, rows_KD in tokens.items()},
        {name: tensor.to(base.device) for name, tensor in weights.items()},
        _metadata(base, kind, settings, dict.fromkeys(tokens, "")),
    )


def _metadata(base: Base, kind: str, settings: dict[str, Any], class_words: dict[str, str]) -> ConceptMetadata:
    """What can be said of a file from elsewhere: that it fits this base. How it was trained it does not tell."""
    return ConceptMetadata(
        class_words=class_words,
        initialiser="",
        base_name=public_base_name(base.name),
        base_hash=base.hash,
        resolution=base.resolution,
        prediction_type=str(base.scheduler_config.get("prediction_type", "epsilon")),
        steps=0,
        lr=0.0,
        token_lr=0.0,
        seed=0,
        loss_weights={},
        sample_prompt="",
        adapter=kind,
        adapter_settings=settings,
    )


def _require_effect(path: Path, concept: Concept) -> None:
    """Raises UserError for an adapter that changes no weight, or whose words have empty rows."""
    idle = bool(concept.weights) and not any(_effects(concept))
    if idle or not all(rows_KD.any() for rows_KD in concept.tokens.values()):
        raise UserError(
            f"{path} changes nothing: {'its changes are' if idle else 'its rows are'} zero",
            allowed="an adapter that was trained",
            do="fetch it again, or train it longer",
        )


def _effects(concept: Concept) -> Iterator[bool]:
    """Whether each of the concept's changes is one."""
    if concept.metadata.adapter != "lora":
        yield from (bool(delta.any()) for delta in concept.weights.values())
        return
    for layer in as_layers(concept.weights, alpha=1.0).values():
        yield layer.magnitude is not None or bool((layer.up.flatten(1) @ layer.down.flatten(1)).any())
