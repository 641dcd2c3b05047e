"""A concept in other people's files."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.concept.adapters import delta_name, parameter_changes, text_changes
from cdvideo.concept.concept import Concept
from cdvideo.concept.file import frozen_copy, save_concept
from cdvideo.errors import UserError
from cdvideo.interchange import sdxl
from cdvideo.interchange.custom_diffusion import custom_diffusion_tensors
from cdvideo.interchange.lora import (
    METADATA,
    PEFT_CONFIG,
    LoraLayer,
    adaptable_layers,
    as_factors,
    as_layers,
    kohya_tensors,
    low_rank,
    peft_settings,
    peft_tensors,
)
from cdvideo.runs import atomic_path, legal_name

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
    """A token as a file's name: without slashes and the like; `<new1>` keeps its brackets where the system has them."""
    name = re.sub(r"[^\w<>.-]+", "-", token)
    return legal_name(name) if sys.platform == "win32" else name


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
    changes = {delta_name(name): change for name, change in parameter_changes(base.unet, concept).items()}
    changes |= text_changes(base, concept)
    changes = {name.removesuffix(".delta"): change for name, change in changes.items() if change.any()}
    places = adaptable_layers(base)
    beyond = sorted(changes.keys() - places.keys())
    if beyond and export.rank is None:
        raise UserError(
            f"the concept changes {beyond[0]} and {len(beyond) - 1} more that a LoRA has no place for",
            allowed="changes of linear layers and convolutions",
            do="accept an approximation without them: --rank 64",
        )
    parts = {name: low_rank(change, export.rank) for name, change in changes.items() if name in places}
    lost = sum(changes[name].double().square().sum().item() for name in beyond)
    error = sum(squared for _, squared, _ in parts.values()) + lost
    whole = sum(squared for *_, squared in parts.values()) + lost
    ranks = [layer.rank for layer, *_ in parts.values()]
    export.report(
        f"{len(parts)} changes as low-rank ones of rank {min(ranks)} to {max(ranks)}: error "
        f"{math.sqrt(error / whole):.1e} of the change"
        + (f", {len(beyond)} biases and norms left out" if beyond else "")
    )
    return {name: layer for name, (layer, *_) in parts.items()}


def _by_model(layers: Mapping[str, LoraLayer]) -> dict[str, dict[str, LoraLayer]]:
    models = dict.fromkeys(name.partition(".")[0] for name in layers)
    return {model: {name: layer for name, layer in layers.items() if name.startswith(f"{model}.")} for model in models}


def _phrases(concept: Concept) -> list[str]:
    return [f"{token} {word}".strip() for token, word in concept.metadata.class_words.items()]


def _write_tokens(export: Export) -> None:
    """Each token's rows under its name: what diffusers writes, and what web UIs read as well; SDXL's in two parts."""
    for token, rows_KD in export.concept.tokens.items():
        rows = sdxl.parted_rows(export.base, rows_KD) if export.base.is_sdxl else {token: _rows(rows_KD)}
        _write_safetensors(export, f"{file_name(token)}.safetensors", rows, {"format": "pt"})


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
