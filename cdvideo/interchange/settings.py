"""What PEFT writes about an adapter: alpha, its exceptions, how it was initialised, which base and model it is of."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cdvideo.errors import UserError
from cdvideo.interchange.files import PEFT, Foreign
from cdvideo.interchange.names import within

PEFT_CONFIG = "adapter_config.json"  # where PEFT keeps alpha, beside the factors
METADATA = "lora_adapter_metadata"  # where diffusers keeps the settings, in the header
MODELS = ("unet", "text_encoder", "text_encoder_2")
_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?")  # a path, whose dots may be escaped
_XL = re.compile(r"sdxl|(?<![a-z])xl(?![a-z])", re.IGNORECASE)
_SD2 = re.compile(r"stable-diffusion-2|sd-?2|v2-1", re.IGNORECASE)
_SD1 = re.compile(r"stable-diffusion-v1|sd-?v?1|v1-[45]", re.IGNORECASE)


@dataclass(frozen=True)
class Settings:
    """The settings of each of `MODELS`; `told` where the file, or the one beside it, has any."""

    by_model: Mapping[str, Mapping[str, Any]]
    told: bool

    def alpha(self, name: str, rank: int) -> float:
        """alpha of a layer: the one whose pattern its path ends with, else the common one, else the rank."""
        of_model = self.by_model[name.partition(".")[0]]
        path = within(name)
        alphas = of_model.get("alpha_pattern") or {}
        own = next((value for pattern, value in alphas.items() if _matcher(pattern)(path)), None)
        alpha = float(of_model.get("lora_alpha", rank) if own is None else own)
        return alpha * math.sqrt(rank) if of_model.get("use_rslora") else alpha

    def initialised(self, name: str) -> str:
        """How a layer's factors were initialised, in PEFT's word; "" for what leaves the base as it is."""
        how = self.by_model[name.partition(".")[0]].get("init_lora_weights", True)
        return how if isinstance(how, str) and how.lower() not in _HARMLESS_STARTS else ""

    @property
    def base(self) -> str:
        """The base that the settings name, as they name it."""
        return next((str(s["base_model_name_or_path"]) for s in self.by_model.values() if _named(s)), "")

    @property
    def family(self) -> str | None:
        """The family of that base, where its name tells it."""
        families = {"SDXL": _XL, "Stable Diffusion 2": _SD2, "Stable Diffusion 1": _SD1}
        return next((family for family, pattern in families.items() if pattern.search(self.base)), None)


_HARMLESS_STARTS = {
    "gaussian",
    "eva",
    "orthogonal",
    "mica",
    "true",
    "false",
}  # their product is zero, or the base stays


def _named(settings: Mapping[str, Any]) -> bool:
    return isinstance(settings.get("base_model_name_or_path"), str)


def read_settings(foreign: Foreign) -> Settings:
    """Out of the header or, in PEFT's own folders, the file beside.

    diffusers puts the model before each entry, `unet.lora_alpha`, but for what `unet.save_lora_adapter` writes.

    Raises:
        UserError: For settings that are no JSON object, or whose values are none that PEFT knows.
    """
    beside = foreign.path.with_name(PEFT_CONFIG)
    if beside.is_file() and (foreign.kind == PEFT or foreign.path.stem.startswith("adapter_model")):
        try:
            text = beside.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise _unreadable(beside, error) from error
        by_model = dict.fromkeys(MODELS, _parse(beside, text))
        told = True
    else:
        flat = _parse(foreign.path, foreign.header.get(METADATA, "{}"))
        by_model, told = {model: _of_model(flat, model) for model in MODELS}, bool(flat)
    for of_model in by_model.values():
        _check(beside if beside.is_file() else foreign.path, of_model)
    return Settings(by_model, told)


def model_of(foreign: Foreign) -> str | None:
    """The model that a file of PEFT belongs to, where its folder or its settings say so; its keys do not."""
    if foreign.kind != PEFT:
        return None
    if foreign.path.parent.name in MODELS:
        return foreign.path.parent.name
    settings = read_settings(foreign).by_model["unet"]
    mapping = settings.get("auto_mapping")
    kind = str((mapping if isinstance(mapping, Mapping) else {}).get("base_model_class"))
    named = str(settings.get("base_model_name_or_path", "")).rstrip("/").rpartition("/")[2]
    if named in MODELS:
        return named
    return {"CLIPTextModelWithProjection": "text_encoder_2", "CLIPTextModel": "text_encoder"}.get(kind)


def _of_model(flat: Mapping[str, Any], model: str) -> dict[str, Any]:
    own = {key.removeprefix(f"{model}."): value for key, value in flat.items() if key.startswith(f"{model}.")}
    return own or {key: value for key, value in flat.items() if not key.startswith(tuple(f"{m}." for m in MODELS))}


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(parsed, dict):
        raise _unreadable(path, TypeError(f"{type(parsed).__name__} in place of an object"))
    return parsed


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: its settings can not be read ({type(error).__name__}: {str(error)[:80]})",
        allowed="an adapter's settings as PEFT writes them, in JSON",
        do="save the adapter again with PEFT or diffusers",
    )


def _check(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises UserError for alphas that are no numbers, and for patterns that can not be trusted."""
    alphas = settings.get("alpha_pattern") or {}
    numbers = [settings.get("lora_alpha", 1.0), *(alphas.values() if isinstance(alphas, Mapping) else [alphas])]
    if not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
        raise _unreadable(path, TypeError("an alpha that is no number"))
    for pattern in alphas:
        try:
            _matcher(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise _unreadable(path, error) from error


@lru_cache(maxsize=4096)
def _matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a path in a model ends with what a pattern of PEFT's matches.

    Patterns are regular expressions, though all that is written by programs are paths. Those that could take
    forever, with a repetition of repetitions or more than two without a bound, raise `re.error`.
    """
    rooted = re.sub(
        r"^(\^?)text_model(\\?)\.", r"\1", pattern
    )  # whether or not `text_model` was part of the path there
    if _PLAIN.fullmatch(rooted):
        plain = rooted.strip("^$").replace("\\", "")
        return lambda path: path == plain or (not rooted.startswith("^") and path.endswith(f".{plain}"))
    if len(re.findall(r"(?<!\\)[*+{]", pattern)) > 2 or re.search(r"\)[*+?{]", pattern) or len(pattern) > 500:
        raise re.error(f"the pattern {pattern[:60]!r} is too involved")
    compiled = re.compile(rf"(.*\.)?({rooted})$")
    return lambda path: compiled.match(path) is not None
