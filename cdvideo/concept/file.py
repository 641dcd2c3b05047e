"""The concept file: one safetensors file with all that a concept is, and where it came from.

Tensors: `tokens.<token>` (K, D), float32, D the width of the text, which in SDXL is that of both text encoders side by
side; and what the adapter learned in the UNet. For `kv` and `unet` that is
`unet.<path>.delta` (`unet.<path>.bias.delta` for biases), float16: the change to add to the base's weight, and half
precision of the change is finer than half precision of the changed weight would be. For `lora` it is peft's factors,
`unet.<path>.lora_A.weight` and so on, float32; `token` has nothing more. What was converted from elsewhere may have no
token, and may change the text encoder too, under `text_encoder.text_model.<path>`, and SDXL's second one under
`text_encoder_2.text_model.<path>`.
Metadata: one JSON object under the key `concept` (ConceptMetadata). No file paths, no user names.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cdvideo.base.loader import TINY_BASE, Base
from cdvideo.base.prompts import text_widths
from cdvideo.base.text import find_tokens
from cdvideo.concept.adapters import unfit_weights
from cdvideo.concept.concept import FORMAT_VERSION, Concept, ConceptMetadata
from cdvideo.concept.config import CONCEPT_FILE
from cdvideo.errors import UserError
from cdvideo.runs import atomic_path

logger = logging.getLogger(__name__)

SAMPLE_CONCEPT = TINY_BASE / "sample_concept.safetensors"
PREVIEW_BYTES = 20_000
_ALLOWED = "a whole concept file, as scripts/train_concept.py writes it"


def png_preview(image: Image.Image) -> str:
    """A small PNG of a picture in base64, of at most 20 kB before encoding."""
    for side in (128, 96, 64, 48):
        buffer = io.BytesIO()
        image.resize((side, side), Image.Resampling.LANCZOS).quantize(128).save(buffer, "PNG", optimize=True)
        if buffer.tell() <= PREVIEW_BYTES:
            break
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def frozen_copy(concept: Concept, **changes: Any) -> Concept:
    """The concept exactly as its file holds it: detached, changes in float16; fields of the metadata may be changed."""
    return Concept(
        tokens={token: rows_KD.detach().float().clone() for token, rows_KD in concept.tokens.items()},
        weights={name: _as_stored(name, tensor.detach()) for name, tensor in concept.weights.items()},
        metadata=dataclasses.replace(concept.metadata, **changes),
    )


def save_concept(concept: Concept, path: Path) -> None:
    """Writes the file, whole or not at all.

    Raises:
        UserError: For a folder that can not be written, or for values that are not finite.
    """
    tensors = _named_tensors(concept)
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(
            f"{len(broken)} of {len(tensors)} tensors of the concept are not finite ({broken[0]}, ...)",
            allowed="finite numbers",
            do="train again with a lower optim.lr",
        )
    metadata = {"concept": json.dumps(dataclasses.asdict(concept.metadata), ensure_ascii=False, sort_keys=True)}
    # Not save_file: what it writes may be read by its owner alone, whatever the umask allows.
    content = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, metadata=metadata)
    with atomic_path(path) as part:
        part.write_bytes(content)


def load_concept(path: Path, *, base: Base | None = None, report: Callable[[str], object] = logger.info) -> Concept:
    """Reads a concept file; with a base, checks that the concept fits it and puts the tensors on its device.

    Args:
        report: Is told in a line how many tensors found their place in the base.

    Raises:
        UserError: For a file that is missing, truncated or no concept file; for a concept without tensors, or one whose
            tensors this base has no place for.
    """
    metadata, tensors = _read(path, device=str(base.device) if base else "cpu")
    concept = Concept(
        tokens={name.removeprefix("tokens."): tensor for name, tensor in tensors.items() if name.startswith("tokens.")},
        weights={name: tensor for name, tensor in tensors.items() if not name.startswith("tokens.")},
        metadata=metadata,
    )
    if concept.tokens.keys() != metadata.class_words.keys() or bool(concept.weights) == (metadata.adapter == "token"):
        raise UserError(
            f"{path} holds {len(concept.tokens)} tokens and {len(concept.weights)} tensors of the adapter "
            f"{metadata.adapter!r}, for the tokens {', '.join(metadata.class_words)}",
            allowed=_ALLOWED,
            do="train the concept again",
        )
    if base is not None:
        _check_fit(path, concept, base, report)
    return concept


def read_metadata(path: Path) -> ConceptMetadata:
    """Reads where a concept came from, without its tensors. Raises UserError as `load_concept`."""
    return _read(path, device=None)[0]


def find_concept(prompt: str, runs_folder: Path, *, base_hash: str) -> Path | None:
    """The newest concept trained on this base whose token stands in the prompt; else the one that ships; else None.

    Files that can not be read, or were trained on another base, are passed over with a warning.
    """
    found = [path for path in runs_folder.glob(f"*/{CONCEPT_FILE}") if path.exists()]  # a link may lead nowhere
    trained = sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
    for path in [*trained, *([SAMPLE_CONCEPT] if SAMPLE_CONCEPT.exists() else [])]:
        try:
            metadata = read_metadata(path)
        except UserError as error:
            logger.warning("passed over %s", error.given)
            continue
        if not find_tokens(prompt, list(metadata.class_words)):
            continue
        if metadata.base_hash == base_hash:
            return path
        if path != SAMPLE_CONCEPT:
            logger.warning(
                "passed over %s, learned on a base with other weights; --concept takes it all the same", path
            )
    return None


def _as_stored(name: str, tensor: Tensor) -> Tensor:
    return tensor.half() if name.endswith(".delta") else tensor.float().clone()


def _named_tensors(concept: Concept) -> dict[str, Tensor]:
    return {**{f"tokens.{token}": rows_KD for token, rows_KD in concept.tokens.items()}, **concept.weights}


def _read(path: Path, *, device: str | None) -> tuple[ConceptMetadata, dict[str, Tensor]]:
    """Metadata and tensors (none when there is no device to put them on). Raises UserError for anything else."""
    if not path.is_file():
        raise UserError(f"there is no concept file {path}", allowed=_ALLOWED, do="correct the path of --concept")
    try:
        with safe_open(path, framework="pt", device=device or "cpu") as file:
            header = (file.metadata() or {}).get("concept")
            names = file.keys() if device else []
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is damaged or no safetensors file ({error})",
            allowed=_ALLOWED,
            do="copy it again, or train it again",
        ) from error
    if header is None:
        raise UserError(f"{path} is a safetensors file, but no concept", allowed=_ALLOWED, do="name another --concept")
    return _parse_metadata(path, header), tensors


def _parse_metadata(path: Path, text: str) -> ConceptMetadata:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its metadata are no JSON ({error})", allowed=_ALLOWED, do="copy it again") from error
    if not isinstance(header, dict):
        raise UserError(
            f"{path}: its metadata are a {type(header).__name__}",
            allowed=_ALLOWED,
            do="copy it again, or train it again",
        )
    if header.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {header.get('format_version')}",
            allowed=f"format version {FORMAT_VERSION}",
            do="update cdvideo, or train the concept again",
        )
    fields = {item.name for item in dataclasses.fields(ConceptMetadata)}
    if header.keys() != fields:
        raise UserError(
            f"{path}: metadata differs in {', '.join(sorted(header.keys() ^ fields))}",
            allowed=_ALLOWED,
            do="train it again",
        )
    kinds = get_type_hints(ConceptMetadata)
    wrong = sorted(name for name, value in header.items() if not _is_of(value, kinds[name]))
    if not wrong and header["adapter"] == "lora" and not _is_of(header["adapter_settings"].get("alpha"), float):
        wrong = ["adapter_settings"]
    if wrong:
        raise UserError(
            f"{path}: {', '.join(wrong)} in its metadata are of another type",
            allowed=_ALLOWED,
            do="copy it again, or train it again",
        )
    return ConceptMetadata(**header)


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is one of a field of ConceptMetadata: text, a number, or a mapping of texts to those."""
    if get_origin(kind) is dict:
        inner = get_args(kind)[1]
        return isinstance(value, dict) and all(_is_of(each, inner) for each in value.values())
    if get_args(kind):
        return any(_is_of(value, each) for each in get_args(kind))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is kind


def _check_fit(path: Path, concept: Concept, base: Base, report: Callable[[str], object]) -> None:
    """Every tensor must have its place in the base. Raises UserError; warns of a base with other weights."""
    width = sum(text_widths(base))
    unfit = unfit_weights(base, concept)
    for token, rows_KD in concept.tokens.items():
        if rows_KD.ndim != 2 or len(rows_KD) == 0 or rows_KD.shape[1] != width or not rows_KD.is_floating_point():
            unfit.append(token)
    count = len(concept.weights) + len(concept.tokens)
    if unfit:
        raise UserError(
            f"{path}: matched {count - len(unfit)}/{count} tensors of base {base.name!r}; no place for {unfit[0]}, ...",
            allowed=f"a concept trained on this base; this one was trained on {concept.metadata.base_name!r}",
            do=f"use --base {concept.metadata.base_name}, or train the concept on {base.name!r}",
        )
    phrases = ", ".join(f'"{token} {word}"' for token, word in concept.metadata.class_words.items())
    report(f"concept {path}: {phrases}, matched {count - len(unfit)}/{count}")
    if concept.metadata.base_hash != base.hash:
        logger.warning(
            "%s was trained on %r with other weights than base %r: it may come out weaker or not at all",
            path.name,
            concept.metadata.base_name,
            base.name,
        )
