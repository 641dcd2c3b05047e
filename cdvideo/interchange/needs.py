"""How much memory adapters take while they act, told by their files' names alone: a second set of what they change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.concept.file import read_metadata
from cdvideo.concept.kv import kv_projections
from cdvideo.interchange.cloneofsimo import read_cloneofsimo
from cdvideo.interchange.files import (
    CLONEOFSIMO,
    CUSTOM_DIFFUSION,
    DELTA,
    OWN,
    TEXTUAL_INVERSION,
    Foreign,
    read_foreign,
)
from cdvideo.interchange.folders import files_of
from cdvideo.interchange.lora import place_keys
from cdvideo.interchange.names import Places


def merged_bytes(base: Base, files: Sequence[tuple[Path, float]]) -> tuple[int, int]:
    """Bytes of the UNet's and of the text encoders' weights that stand twice while these adapters act.

    Changes of K and V alone are compiled into prompts, and take none.

    Args:
        base: May be on the meta device.

    Raises:
        UserError: For files that can not be read.
    """
    places = Places(base)
    changed = {
        name for path, _ in files for file in files_of(path) for name in _changed(read_foreign(file), base, places)
    }
    sizes = {
        name: weight.numel() * base.unet.dtype.itemsize
        for name in changed
        if (weight := _weight(places, name)) is not None
    }
    unet = sum(size for name, size in sizes.items() if name.startswith("unet."))
    return unet, sum(sizes.values()) - unet


def _weight(places: Places, name: str) -> Tensor | None:
    weight = getattr(places.layers.get(name), "weight", None)
    return weight if isinstance(weight, Tensor) else None


def _changed(foreign: Foreign, base: Base, places: Places) -> Iterable[str]:
    """The layers whose weights an adapter changes, by their names in a concept file."""
    if foreign.kind in (TEXTUAL_INVERSION, CUSTOM_DIFFUSION, DELTA):
        return ()
    if foreign.kind == OWN:
        if read_metadata(foreign.path).adapter in ("kv", "token"):
            return ()
        return {_layer_of(key, places) for key in foreign.tensors}
    if foreign.kind == CLONEOFSIMO:
        return {_layer_of(key, places) for key in read_cloneofsimo(foreign, base)[0]}
    layers = place_keys(foreign, base, places).layers
    is_lora = any("A" in parts for parts in layers.values())
    return () if not is_lora and {f"{name}.delta" for name in layers} <= kv_projections(base.unet).keys() else layers


def _layer_of(key: str, places: Places) -> str:
    """The layer that a name in a concept file begins with."""
    parts = key.split(".")
    return next((name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in places.layers), "")
