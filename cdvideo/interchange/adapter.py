"""An adapter's file as what a concept holds: a plain LoRA stays one, all else is kept as LyCORIS' factors."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.interchange.files import Foreign
from cdvideo.interchange.lora import PLAIN_PARTS, place_keys, read_lora
from cdvideo.interchange.lycoris import read_lycoris
from cdvideo.interchange.names import Places

logger = logging.getLogger(__name__)


def read_adapter(foreign: Foreign, base: Base) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """The kind of the adapter, its weights by their names in a concept file, and its settings.

    Raises:
        UserError: For keys that are unknown or incomplete, and for layers that this base has not or has in other sizes.
    """
    places = Places(base)
    found = place_keys(foreign, base, places)
    if found.unread:
        logger.info(
            "%s: %d tensors are of pairs that diffusers 0.15 saved and never used", foreign.path, len(found.unread)
        )
    of_inputs = any(_is_of_inputs(foreign, keys) for keys in found.layers.values())
    if not of_inputs and all(keys.keys() <= PLAIN_PARTS for keys in found.layers.values()):
        return "lora", *read_lora(foreign, base, found, places)
    return *read_lycoris(foreign, base, found, places), {}


def _is_of_inputs(foreign: Foreign, keys: dict[str, str]) -> bool:
    """Whether magnitudes are LyCORIS' older ones, of the inputs."""
    return "m" in keys and keys["m"].endswith("dora_scale") and foreign.tensors[keys["m"]].shape[:1] == (1,)
