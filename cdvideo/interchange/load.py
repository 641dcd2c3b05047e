"""Any file of a concept or an adapter, ours or another's, as a concept of a base; never without effect."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.base.text import is_vocabulary_word
from cdvideo.concept import lycoris
from cdvideo.concept.concept import Concept, ConceptMetadata, public_base_name
from cdvideo.concept.file import load_concept
from cdvideo.concept.merge import merge_concepts, weighted
from cdvideo.errors import UserError
from cdvideo.interchange.adapter import read_adapter
from cdvideo.interchange.cloneofsimo import read_cloneofsimo
from cdvideo.interchange.custom_diffusion import adapter_kind, read_custom_diffusion, read_delta
from cdvideo.interchange.files import (
    CLONEOFSIMO,
    CUSTOM_DIFFUSION,
    DELTA,
    OWN,
    TEXTUAL_INVERSION,
    Foreign,
    read_foreign,
)
from cdvideo.interchange.folders import files_of, without_twins
from cdvideo.interchange.lora import as_layers
from cdvideo.interchange.textual_inversion import read_rows, split_bundle

logger = logging.getLogger(__name__)


def load_adapters(
    base: Base,
    paths: Sequence[tuple[Path, float]],
    *,
    report: Callable[[str], object] = logger.info,
) -> Concept:
    """Files or folders, each with a weight, as one concept.

    A folder is all of its files of weights together, as training scripts leave them: an adapter and its tokens; see
    folders.py for what is left out.

    Args:
        report: Is told in a line for each file what it is and how much of it found its place in the base.

    Raises:
        UserError: For what can not be read, does not fit this base, or changes nothing.
    """
    loaded = []
    for path, weight in paths:
        parts = [(file, _load_file(file, base, report)) for file in files_of(path, report)]
        concepts = without_twins(path, parts, report)
        whole = concepts[0] if len(concepts) == 1 else merge_concepts(base, concepts)
        loaded.append(weighted(base, whole, weight))
    return loaded[0] if len(loaded) == 1 else merge_concepts(base, loaded)


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
    elif foreign.kind == DELTA:
        weights, tokens = read_delta(foreign, base)
        kind = adapter_kind(base.unet, weights) if weights else "token"
    elif foreign.kind == CLONEOFSIMO:
        kind = "lora"
        weights, settings, tokens = read_cloneofsimo(foreign, base)
    else:
        tokens = split_bundle(foreign, base)
        kind, weights, settings = read_adapter(foreign, base)
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
    if concept.metadata.adapter == "lora":
        for layer in as_layers(concept.weights, alpha=1.0).values():
            yield layer.magnitude is not None or bool((layer.up.flatten(1) @ layer.down.flatten(1)).any())
        return
    for parts in lycoris.by_layer(concept.weights).values():
        yield lycoris.has_effect(parts)
    yield from (bool(delta.any()) for name, delta in concept.weights.items() if name.endswith(".delta"))
