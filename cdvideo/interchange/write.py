"""A concept in other people's files."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from cdvideo.base.loader import Base
from cdvideo.concept import lycoris
from cdvideo.concept.adapters import iter_changes
from cdvideo.concept.concept import Concept, distinct_words
from cdvideo.concept.file import frozen_copy, save_concept
from cdvideo.concept.lora import lora_paths
from cdvideo.errors import UserError
from cdvideo.interchange import sdxl
from cdvideo.interchange.custom_diffusion import custom_diffusion_tensors
from cdvideo.interchange.lora import (
    LoraLayer,
    adaptable_layers,
    as_factors,
    as_layers,
    kohya_tensors,
    low_rank,
    low_rank_product,
    peft_settings,
    peft_tensors,
)
from cdvideo.interchange.settings import METADATA, PEFT_CONFIG
from cdvideo.interchange.textual_inversion import WORD
from cdvideo.runs import atomic_path

logger = logging.getLogger(__name__)

PATIENCE = 2.0  # seconds of work after which a line says how far it is
_ARCHITECTURES = {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2"}  # by the width of the text


@dataclass(frozen=True)
class Export:
    """A concept on its way into a folder."""

    base: Base
    concept: Concept
    folder: Path
    name: str
    rank: int | None
    report: Callable[[str], object]


def write_cdvideo(export: Export) -> None:
    """One file of our own."""
    path = export.folder / f"{export.name}.safetensors"
    save_concept(frozen_copy(export.concept), path)
    export.report(f"wrote {path}")


def write_kohya(export: Export) -> None:
    """A LoRA as kohya's scripts write it, which web UIs read; each token in a file beside it.

    With one alpha for all layers: diffusers 0.42 takes the most common one for all.
    """
    factors, settings = as_factors(_lora_layers(export))
    layers = as_layers(factors, settings["alpha"])
    width = export.base.text_encoder.config.hidden_size
    is_sdxl, resolution = export.base.is_sdxl, str(export.concept.metadata.resolution)
    architecture = sdxl.ARCHITECTURE if is_sdxl else _ARCHITECTURES.get(width, "stable-diffusion")
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(layer.rank for layer in layers.values())),
        "ss_network_alpha": str(settings["alpha"]),
        "ss_v2": str(width == 1024),
        **({"ss_base_model_version": "sdxl_base_v1-0"} if is_sdxl else {}),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": export.name,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": export.concept.metadata.prediction_type.removesuffix("_prediction"),
        "modelspec.trigger_phrase": ", ".join(_phrases(export.concept)),
    }
    _write_safetensors(export, f"{export.name}.safetensors", kohya_tensors(layers, is_sdxl=is_sdxl), header)
    _write_tokens(export)


def write_diffusers(export: Export) -> None:
    """A LoRA that diffusers' `load_lora_weights` reads; each token in a file for `load_textual_inversion`."""
    layers = _lora_layers(export)
    settings = {
        f"{model}.{key}": value
        for model, of_model in _by_model(layers).items()
        for key, value in peft_settings(of_model).items()
    }
    header = {"format": "pt", METADATA: json.dumps(settings, sort_keys=True)}
    _write_safetensors(export, "pytorch_lora_weights.safetensors", peft_tensors(layers), header)
    _write_tokens(export)


def write_peft(export: Export) -> None:
    """An adapter of the UNet that PEFT's own `PeftModel.from_pretrained` reads; each token in a file beside it.

    Raises:
        UserError: For a concept that changes the text encoder: PEFT's folders are of one model.
    """
    layers = _lora_layers(export)
    if any(name.startswith("text_encoder") for name in layers):
        raise UserError(
            "the concept changes the text encoder too",
            allowed="changes of the UNet alone, since an adapter of PEFT belongs to one model",
            do="write it with --to diffusers, which holds both",
        )
    tensors = {f"base_model.model.{name.removeprefix('unet.')}": t for name, t in peft_tensors(layers).items()}
    _write_safetensors(export, "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "inference_mode": True, **peft_settings(layers)}
    _write(export, PEFT_CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    _write_tokens(export)


def write_textual_inversion(export: Export) -> None:
    """The tokens alone, each in a file. Raises UserError for a concept without any."""
    if not export.concept.tokens:
        raise UserError("the concept has no token", allowed="concepts with tokens", do="write it as a LoRA")
    if export.concept.weights:
        export.report("the concept's change of the model is left out: textual inversion holds tokens alone")
    _write_tokens(export)


def write_custom_diffusion(export: Export) -> None:
    """What diffusers' Custom Diffusion script writes: weights for `load_attn_procs`, and each token in a file.

    Pickles, since diffusers' own loader needs the empty entries that safetensors can not hold; of tensors alone.

    Raises:
        UserError: For a concept of SDXL, whose tokens these files have no place for.
    """
    if export.base.is_sdxl:
        raise UserError(
            "the concept is of SDXL",
            allowed="concepts of Stable Diffusion 1 or 2: Custom Diffusion's files hold rows for one text encoder",
            do="write it as a LoRA: --to kohya or --to diffusers",
        )
    tensors = custom_diffusion_tensors(export.base, export.concept)
    _write(export, "pytorch_custom_diffusion_weights.bin", _pickled(tensors))
    for token, rows_KD in export.concept.tokens.items():
        _write(export, f"{file_name(token)}.bin", _pickled({token: _rows(rows_KD)}))


def file_name(token: str) -> str:
    """A token as a file's name on every system: <new1> is new1, and the names that Windows keeps get a mark."""
    name = re.sub(r"[^\w.-]+", "-", token).strip("-").rstrip(".") or "token"
    return f"{name}-token" if re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name, re.IGNORECASE) else name


def _lora_layers(export: Export) -> dict[str, LoraLayer]:
    """The concept as low-rank layers: as they are where it is a LoRA of no more than the rank asked for, else the
    nearest ones of that rank.

    Raises:
        UserError: For a concept without a change, or one that changes what a LoRA has no place for, unless a rank, and
            so an approximation, was asked for.
    """
    concept, base = export.concept, export.base
    if not concept.weights:
        raise UserError("the concept is a token alone", allowed="changes of the model", do="use --to textual-inversion")
    if concept.metadata.adapter == "lora":
        layers = as_layers(concept.weights, float(concept.metadata.adapter_settings["alpha"]))
        if export.rank is None or max(layer.rank for layer in layers.values()) <= export.rank:
            return layers
    places = adaptable_layers(base)
    names = _changed_names(concept)
    beyond = sorted(names - places.keys())
    if beyond and export.rank is None:
        raise UserError(
            f"the concept changes {beyond[0]} and {len(beyond) - 1} more that a LoRA has no place for",
            allowed="changes of linear layers and convolutions",
            do="accept an approximation without them: --rank 64",
        )
    nearest: dict[str, LoraLayer] = {}
    lost = whole = 0.0
    start = told = time.perf_counter()
    for count, (name, layer, error, size) in enumerate(_each_nearest(export, places), start=1):
        whole, lost = whole + size, lost + error
        if layer is not None:
            nearest[name] = layer
        if time.perf_counter() - told > PATIENCE:
            told = time.perf_counter()
            export.report(f"{count} of {len(names)} changes as low-rank ones, {told - start:.0f} s")
    if not nearest:
        raise UserError(
            "the concept changes biases and norms alone",
            allowed="changes of linear layers and convolutions",
            do="use --to cdvideo, which holds all",
        )
    ranks = [layer.rank for layer in nearest.values()]
    export.report(
        f"{len(nearest)} changes as low-rank ones of rank {min(ranks)} to {max(ranks)}: error "
        f"{math.sqrt(max(0.0, lost) / whole):.1e} of the change"
        + (f", {len(beyond)} biases and norms left out" if beyond else "")
    )
    return nearest


def _changed_names(concept: Concept) -> set[str]:
    """What the concept changes: layers, and biases as `<layer>.bias`."""
    if concept.metadata.adapter == "lora":
        return lora_paths(concept.weights)
    deltas = {name: tensor for name, tensor in concept.weights.items() if name.endswith(".delta")}
    whole = {name.removesuffix(".delta") for name, change in deltas.items() if change.any()}
    return whole | set(lycoris.by_layer(concept.weights))


def _each_nearest(
    export: Export, places: Mapping[str, nn.Module]
) -> Iterator[tuple[str, LoraLayer | None, float, float]]:
    """For each change its name, the nearest low-rank one, its squared error and the squared size of the change; None
    in place of a layer where a LoRA has none. Factors of low rank are never unfolded."""
    concept = export.concept
    factored = lycoris.by_layer(concept.weights)
    for name, parts in factored.items():
        weight = places[name].weight
        assert isinstance(weight, Tensor)
        product = lycoris.low_rank_of(parts, weight)
        if product is not None and product[0].shape[1] < min(len(weight), weight[0].numel()):
            yield name, *low_rank_product(*product, weight.shape, export.rank)
        else:
            yield name, *low_rank(lycoris.change_of(parts, weight), export.rank)
    rest = {name: tensor for name, tensor in concept.weights.items() if name.rpartition(".")[0] not in factored}
    for name, change in iter_changes(export.base, dataclasses.replace(concept, weights=rest)):
        name = name.removesuffix(".delta")
        if not change.any():
            continue
        if name in places:
            yield name, *low_rank(change, export.rank)
        else:
            size = change.double().square().sum().item()
            yield name, None, size, size


def _by_model(layers: Mapping[str, LoraLayer]) -> dict[str, dict[str, LoraLayer]]:
    models = dict.fromkeys(name.partition(".")[0] for name in layers)
    return {model: {name: layer for name, layer in layers.items() if name.startswith(f"{model}.")} for model in models}


def _phrases(concept: Concept) -> list[str]:
    return [f"{token} {word}".strip() for token, word in concept.metadata.class_words.items()]


def _write_tokens(export: Export) -> None:
    """Each token's rows under its name: what diffusers writes, and what web UIs read as well; SDXL's in two parts."""
    tokens = export.concept.tokens
    for token, *others in distinct_words(tokens):
        rows_KD = tokens[token]
        if len(rows_KD) > 1 and token != token.lower() and not export.base.is_sdxl:
            logger.warning(
                "diffusers reads one row alone of a word with capitals (%s): --token %s", token, token.lower()
            )
        if others:
            export.report(f"{token} is also called {', '.join(others)}: written once")
        rows = sdxl.parted_rows(export.base, rows_KD) if export.base.is_sdxl else {token: _rows(rows_KD)}
        name = file_name(token)
        if name != token:
            export.report(f"the file of {token} is called {name}, which web UIs take for the word")
        _write_safetensors(export, f"{name}.safetensors", rows, {"format": "pt", WORD: token})


def _rows(rows_KD: Tensor) -> Tensor:
    """One row as the vector that it is elsewhere."""
    rows = rows_KD.detach().float().cpu()
    return rows[0].clone() if len(rows) == 1 else rows


def _write_safetensors(export: Export, name: str, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    ready = {key: tensor.detach().float().cpu().contiguous() for key, tensor in tensors.items()}
    _write(export, name, save(ready, metadata=header))


def _pickled(content: Mapping[str, Any]) -> bytes:
    buffer = BytesIO()
    torch.save(dict(content), buffer)
    return buffer.getvalue()


def _write(export: Export, name: str, content: bytes) -> None:
    path = export.folder / name
    with atomic_path(path) as part:
        part.write_bytes(content)
    export.report(f"wrote {path}")
