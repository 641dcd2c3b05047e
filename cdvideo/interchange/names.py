"""What files call the layers of a base: kohya's names, diffusers' of all times, PEFT's, ComfyUI's, MotionDirector's.

A key is a layer's name and a part: `lora_unet_..._to_q` and `lora_down.weight`. Trainers put wrappings around both;
they are taken off first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from cdvideo.base.loader import Base
from cdvideo.concept.adapters import text_models
from cdvideo.interchange import sdxl

# Wrappings of torch.compile, FSDP, DDP and PEFT, and a model's name twice.
_WITHIN = re.compile(
    r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|(?<=\.)base_layer\.|(?<=\.)processor\."
)
_BEFORE = re.compile(r"^(?:module\.|base_model\.model\.|model\.(?=unet\.|text_encoder))+")
_TWICE = re.compile(r"^(unet|text_encoder_2|text_encoder)\.(?:\1\.|module\.|base_model\.model\.)+")
_KOHYA_WRAPPED = re.compile(r"^(lora_(?:unet|te\d?)_)(?:_orig_mod_|module_)+")

# The parts of a layer by the ends of its keys. A: narrows to the rank; B: back; m: DoRA's magnitudes.
_FACTORS = {
    "A": ("lora_down.weight", "lora_A.weight", "lora.down.weight", "lora_linear_layer.down.weight", "lora_A"),
    "B": ("lora_up.weight", "lora_B.weight", "lora.up.weight", "lora_linear_layer.up.weight", "lora_B"),
    "mid": ("lora_mid.weight",),
    "m": ("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"),
    "B.bias": ("lora_B.bias",),
}
LYCORIS_PARTS = (
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *("diff", "diff_b", "w_norm", "b_norm", "scalar", "bias_indices", "bias_values", "bias_size"),
)
_PARTS = {end: part for part, ends in _FACTORS.items() for end in ends}
_PARTS |= {part: part for part in (*LYCORIS_PARTS, "alpha", "bias")}
_KEY = re.compile(rf"(?P<stem>.+?)\.(?P<part>{'|'.join(map(re.escape, sorted(_PARTS, key=len, reverse=True)))})")
# In the oldest names the layer and the part are one: attn1.to_q_lora.down.weight, ff.net.2_lora.up.weight.
_OLDEST = re.compile(r"(?P<stem>.+)\.(?P<leaf>\w+)_lora\.(?P<side>down|up)\.weight")
_OF_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass
class Found:
    """Where a file's keys belong: by layer and part the key; those without a place; those that nothing ever reads."""

    layers: dict[str, dict[str, str]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


class Part(NamedTuple):
    """A key taken apart: what the layer is called there, and which of its parts it is."""

    stem: str
    part: str


def part_of(key: str) -> Part | None:
    """A key of an adapter taken apart; None for what is none. The oldest names count as one: attn1.to_q, and A."""
    key = plain_key(key)
    if oldest := _OLDEST.fullmatch(key):
        return Part(f"{oldest['stem']}.{oldest['leaf']}", "A" if oldest["side"] == "down" else "B")
    match = _KEY.fullmatch(key)
    return None if match is None else Part(match["stem"], _PARTS[match["part"]])


class Places:
    """All layers of a base that have a weight, by their names in a concept file, and what else files call them."""

    def __init__(self, base: Base) -> None:
        models: dict[str, nn.Module] = {"unet.": base.unet, **text_models(base)}
        self.layers = {
            prefix + path: layer
            for prefix, model in models.items()
            for path, layer in model.named_modules()
            if isinstance(getattr(layer, "weight", None), Tensor)
        }
        self._names: dict[str, str] = {}
        layers, blocks = base.unet.config.layers_per_block, enumerate(base.unet.up_blocks)
        bare = {number for number, block in blocks if not getattr(block, "attentions", None)}
        for name in self.layers:
            for alias in _aliases(name, layers if isinstance(layers, int) else layers[0], bare):
                self._names.setdefault(alias, name)

    def of(self, keys: Iterable[str], *, model: str | None = None) -> Found:
        """Where these keys belong.

        Args:
            model: The one that all of them are of, where the file is of one model and its names do not say which.
        """
        found = Found()
        for key in keys:
            name, part, is_read = self._place(key, model)
            if not is_read:
                found.unread.append(key)
            elif name is None or part in found.layers.get(name, ()):  # or two keys for one place
                found.lost.append(key)
            else:
                found.layers.setdefault(name, {})[part] = key
        return found

    def _place(self, key: str, model: str | None) -> tuple[str | None, str, bool]:
        if oldest := _OLDEST.fullmatch(plain_key(key)):
            stem, leaf, part = oldest["stem"], oldest["leaf"], "A" if oldest["side"] == "down" else "B"
            of_text = _OF_TEXT.get(leaf)
            if stem.endswith(tuple(_OF_TEXT.values())):
                # diffusers 0.15 saved four pairs under each projection, and called only the one that is named alike.
                return self._find(stem, model), part, of_text is not None and stem.endswith(of_text)
            leaves = (leaf, f"{leaf}.0", *([of_text] if of_text else []))
            return next((n for each in leaves if (n := self._find(f"{stem}.{each}", model))), None), part, True
        found = part_of(key)
        return (None, "", True) if found is None else (self._find(found.stem, model), found.part, True)

    def _find(self, stem: str, model: str | None) -> str | None:
        if model and model != "unet" and not stem.startswith((f"{model}.", "lora_")):
            stem = f"{model}.{stem}"
        return self._names.get(stem)


def plain_key(key: str) -> str:
    """A key without what trainers wrap around it."""
    key, before = _WITHIN.sub("", key).replace(".default.", ".").removesuffix(".default"), ""
    while key != before:
        before = key
        key = _KOHYA_WRAPPED.sub(r"\1", _TWICE.sub(r"\1.", _BEFORE.sub("", key)))
    return key


def kohya_name(name: str) -> str:
    """unet.mid_block.x is lora_unet_mid_block_x, text_encoder.text_model.x is lora_te_text_model_x."""
    return f"lora_{name.replace('text_encoder.', 'te.', 1).replace('.', '_')}"


def within(name: str) -> str:
    """A layer's path in its model, as the ends of paths that all versions of transformers have."""
    return re.sub(r"^(unet|text_encoder|text_encoder_2)\.", "", name).removeprefix("text_model.")


def _aliases(name: str, layers: int, bare: set[int]) -> list[str]:
    """What files call a layer: by dots and by underscores, with and without the model, in both layouts of the UNet."""
    model, _, path = name.partition(".")
    if model == "unet":
        first = sdxl.sgm_name(path, layers=layers, bare=bare)
        dotted = [name, path, f"diffusion_model.{first}", f"diffusion_model.{path}"]
        return [*dotted, kohya_name(name), f"lora_unet_{first.replace('.', '_')}"]
    short = path.removeprefix("text_model.")
    clips = ("clip_l", "clip_h") if model == "text_encoder" else ("clip_g",)
    dotted = [name, f"{model}.{short}", f"{model}.transformer.{path}"]
    for clip in clips:
        dotted += [
            f"{start}{clip}.{middle}{path}" for start in ("text_encoders.", "") for middle in ("transformer.", "")
        ]
    if model == "text_encoder":
        dotted += [path, short]
    number = "1" if model == "text_encoder" else "2"
    ends = {path.replace(".", "_"), short.replace(".", "_")}
    return [*dotted, kohya_name(name), *(f"lora_te{number}_{end}" for end in sorted(ends, key=len, reverse=True))]
