"""The first LoRA files of all, of cloneofsimo/lora (lora_diffusion) and of trainers that used it, Replicate's of 2023.

They name no layer. `unet:<i>:up` in safetensors, or a list [up 0, down 0, up 1, ...] in a pickle, counts the layers in
the order in which their modules were registered, within modules of some classes: by default all linear layers of
attentions, and in later files of GEGLU; in the text encoder those of CLIPAttention. The scale is 1: W' = W + up down.

The order is lora_diffusion's `_find_modules` on the diffusers and transformers of then: downward blocks, upward blocks,
the middle; to_q, to_k, to_v, to_out; and k, v, q, out in CLIP. Where the feed-forward layer stands depends on the
version of diffusers: at first it was registered between the two attentions, later behind both. Shapes tell which.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from cdvideo.base.loader import Base
from cdvideo.concept.adapters import text_models
from cdvideo.errors import UserError
from cdvideo.interchange.files import Foreign
from cdvideo.interchange.lora import LoraLayer, as_factors

_KEY = re.compile(r"(\w+):(\d+):(up|down)")
_EMBEDDING = "<embed>"  # what the header says of a row
_ATTENTION = ("CrossAttention", "Attention")  # diffusers has called it both
_DEFAULTS = {"unet": [[*_ATTENTION], [*_ATTENTION, "GEGLU"]], "text_encoder": [["CLIPAttention"]]}
# The order of children where it is not the one that today's classes have.
_FIRST_LAYOUT = {"BasicTransformerBlock": ("norm1", "attn1", "ff", "norm2", "attn2", "norm3")}
_WHOLE_ORDER = {
    "UNet2DConditionModel": ("down_blocks", "up_blocks", "mid_block"),
    "Attention": ("to_q", "to_k", "to_v", "to_out"),
    "CLIPAttention": ("k_proj", "v_proj", "q_proj", "out_proj"),
}

Pair = tuple[Tensor, Tensor]  # up, down


def read_cloneofsimo(foreign: Foreign, base: Base) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """The factors by their names in a concept file, the adapter's settings, and rows_KD by word.

    Raises:
        UserError: For pairs that are not those of this base's layers, in number and sizes.
    """
    is_list = isinstance(foreign.content, list)
    rows: dict[str, Tensor] = {}
    if is_list:
        models = {"unet or text_encoder": _paired(foreign.content)}
    else:
        models = _by_model(foreign)
        keys = [key for key in foreign.content if _KEY.fullmatch(key) is None]
        rows = {key: foreign.content[key].detach().float().reshape(1, -1) for key in keys}
    layers: dict[str, LoraLayer] = {}
    for model, pairs in models.items():
        names = ("unet", "text_encoder") if is_list else (model,)
        fits = [found for name in names for found in _fitting(foreign, base, name, pairs)]
        if not fits:
            raise _unfit(foreign, base, model, len(pairs))
        for (name, layer), (up, down) in zip(fits[0], pairs, strict=True):
            weight = layer.weight
            assert isinstance(weight, Tensor)
            down = down.float().reshape(len(down), *weight.shape[1:])
            up = up.float().reshape(len(weight), len(down), *[1] * (weight.ndim - 2))
            layers[name] = LoraLayer(down, up, alpha=len(down))
    return (*as_factors(layers), rows)


def _by_model(foreign: Foreign) -> dict[str, list[Pair]]:
    """The pairs of each model, in order."""
    sides: dict[str, dict[int, dict[str, Tensor]]] = {}
    for key, tensor in foreign.content.items():
        if match := _KEY.fullmatch(key):
            sides.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = tensor
        elif foreign.header.get(key, _EMBEDDING) != _EMBEDDING or not isinstance(tensor, Tensor) or tensor.ndim > 2:
            raise _broken(foreign, key)
    for model, pairs in sides.items():
        whole = [index for index in range(len(pairs)) if pairs.get(index, {}).keys() == {"up", "down"}]
        if len(whole) != len(pairs):
            raise _broken(foreign, f"no whole pair {model}:{min(set(range(len(pairs))) - set(whole))}")
    return {model: [(pairs[i]["up"], pairs[i]["down"]) for i in range(len(pairs))] for model, pairs in sides.items()}


def _paired(tensors: Sequence[Tensor]) -> list[Pair]:
    return [(up.detach(), down.detach()) for up, down in zip(tensors[::2], tensors[1::2], strict=True)]


def _fitting(foreign: Foreign, base: Base, model: str, pairs: Sequence[Pair]) -> Iterator[list[tuple[str, nn.Module]]]:
    """The readings of a model's pairs that agree with the base in number and sizes: its layers, in order."""
    models: Mapping[str, tuple[str, nn.Module]] = {
        "unet": ("unet.", base.unet),
        **{prefix.partition(".")[0]: (prefix, encoder) for prefix, encoder in text_models(base).items()},
    }
    if model not in models:
        return
    prefix, module = models[model]
    for classes in _classes(foreign, model):
        for layout in ({}, _FIRST_LAYOUT):
            layers = [(prefix + name, layer) for name, layer in _layers(module, set(classes), layout)]
            if len(layers) == len(pairs) and all(map(_fits, [layer for _, layer in layers], pairs)):
                yield layers


def _classes(foreign: Foreign, model: str) -> list[list[str]]:
    """The classes that the header names; a list has no header, and is of one of the defaults."""
    try:
        named = json.loads(foreign.header[model])
    except (KeyError, ValueError, RecursionError):
        return _DEFAULTS.get(model, [])
    return [[str(each) for each in named]] if isinstance(named, list) else _DEFAULTS.get(model, [])


def _layers(
    module: nn.Module, classes: set[str], layout: Mapping[str, Sequence[str]], path: str = "", inside: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers and, where the classes hold them, convolutions below modules of these classes, as registered."""
    kind = type(module).__name__
    inside = inside or kind in classes or (kind == "Attention" and bool(classes & set(_ATTENTION)))
    if inside and isinstance(module, (nn.Linear, nn.Conv2d)):
        yield path, module
        return
    children = dict(module.named_children())
    order = {**_WHOLE_ORDER, **layout}.get(kind, ())
    for name in sorted(children, key=lambda name: order.index(name) if name in order else -1):
        yield from _layers(children[name], classes, layout, f"{path}.{name}" if path else name, inside)


def _fits(layer: nn.Module, pair: Pair) -> bool:
    up, down = pair
    weight = layer.weight
    assert isinstance(weight, Tensor)
    fits = down.ndim >= 2 and up.ndim >= 2 and up.shape[1] == len(down) > 0 and up[0, 0].numel() == 1
    return fits and len(up) == len(weight) and down[0].numel() == weight[0].numel()


def _broken(foreign: Foreign, what: str) -> UserError:
    return UserError(
        f"{foreign.path} is a LoRA of cloneofsimo/lora that is not whole: {what}",
        allowed="pairs <model>:<i>:up and <model>:<i>:down, counted from 0, and rows of words",
        do="fetch it again, or train it anew",
    )


def _unfit(foreign: Foreign, base: Base, model: str, count: int) -> UserError:
    return UserError(
        f"{foreign.path} is a LoRA of cloneofsimo/lora for {model}: its {count} pairs are not those of base "
        f"{base.name!r}, matched 0/{len(foreign.tensors)}",
        allowed="pairs in the order and the sizes of the base's attentions (and GEGLU), or of its text encoder",
        do="use the --base that it was made for; most are of Stable Diffusion 1, some of 2",
    )
