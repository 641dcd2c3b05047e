"""What a file is that is no adapter of these bases: named by its keys, so that its owner knows what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Other(NamedTuple):
    """What a file is, a key that shows it, and what its owner can do."""

    what: str
    key: str
    do: str


_LORA_FOR_OURS = "name a LoRA that was trained on Stable Diffusion 1, 2 or XL"
_ANOTHER = "name another file"
# By what a key matches, of LoRAs: models whose layers are called so.
_LORAS = {
    r"(^|[._])(double_blocks|single_blocks|single_transformer_blocks)[._]": "a LoRA for a transformer, Flux or alike",
    r"(^|[._])(joint_blocks|joint_transformer_blocks)[._]|\.add_[kqv]_proj\.": "a LoRA for a transformer, SD3 or alike",
    r"(^|\.|^lora_unet_)blocks[._]\d+[._](cross_attn|self_attn|ffn)[._]": "a LoRA for a transformer, Wan or alike",
    r"(^|[._])(temp_attentions|temp_convs|transformer_in|temporal_transformer_blocks)[._]": "a LoRA for a film model",
    r"(encoder|decoder)\.block\.\d+\.layer|^lora_te3_": "a LoRA for T5, a language model",
    r"^((base_model\.)?model\.)*layers\.\d+\.": "a LoRA for a language model",
    r"^lora_prior_": "a LoRA for Stable Cascade",
    r"^((base_model\.)?model\.)*transformer\.(?!text_model)|^lora_transformer_": "a LoRA for a transformer (Flux, SD3)",
    r"lora_controlnet": "a ControlLoRA",
}
# Layers of a UNet or of CLIP, in any spelling.
_OURS = re.compile(
    r"(down|up|input|output)_blocks?[._]|mid(dle)?_block[._]|text_model[._]|lora_te\d?_|encoder[._]layers[._]"
    r"|conv_(in|out)\b|time_embed|add_embedding|label_emb|clip_[lgh]\."
)
# Of whole models and others, in the order in which they are looked for.
_OTHERS: tuple[tuple[str, str, str], ...] = (
    (r"oft_", "an OFT adapter", _ANOTHER),
    (r"\.on_input", "an (IA)^3 of LyCORIS", _ANOTHER),
    (r"\.a1\.weight", "a GLoRA of LyCORIS", _ANOTHER),
    (r"model\.diffusion_model\.", "a whole image model, or a part of one in its first layout", "give it as --base"),
    (r"ip_adapter\.|^image_proj\.", "an IP-Adapter", _ANOTHER),
    (r"control_model\.|controlnet_cond_embedding|input_hint_block", "a ControlNet", _ANOTHER),
    (r"^adapter\.(body|conv_in)", "a T2I-Adapter", _ANOTHER),
    (r"vision_model\.|^visual\.", "CLIP's reader of pictures", _ANOTHER),
    (
        r"token_embedding\.weight$|^shared\.weight$",
        "a whole text encoder, and no embedding",
        "name the embedding that was trained with it, most often learned_embeds.safetensors",
    ),
    (r"(encoder\.down|decoder\.up|decoder\.mid)[._]|quant_conv\.", "a VAE", "give it within a base's folder, as vae/"),
    (r"(body|model)\.\d+\.(rdb|sub)", "an upscaler of pictures", _ANOTHER),
    (r"^param_groups$", "the state of an optimizer", "name the weights beside it"),
    (r"^(last_epoch|base_lrs|_step_count)$", "the state of a learning-rate scheduler", "name the weights beside it"),
    (r"^(growth_factor|growth_interval)$", "the state of a gradient scaler", "name the weights beside it"),
    (
        r"^(torch_manual_seed|random_state|numpy_random_seed)$",
        "the state of random generators",
        "name the weights beside it",
    ),
)


def other_lora(keys: Iterable[str]) -> Other | None:
    """What model a LoRA is for, where it is for none of ours."""
    keys = list(keys)
    for pattern, what in _LORAS.items():
        if found := next((key for key in keys if re.search(pattern, key)), None):
            return Other(what, found, _LORA_FOR_OURS)
    if keys and not any(map(_OURS.search, keys)):
        return Other("a LoRA for a model that is no UNet of Stable Diffusion and no CLIP", keys[0], _LORA_FOR_OURS)
    return None


def other_kind(keys: Sequence[str], flat: Sequence[str]) -> Other | None:
    """What else a file is.

    Args:
        keys: Of the outermost mapping.
        flat: All, joined by dots.
    """
    if keys and all(key.isdigit() for key in keys):
        return Other("a hypernetwork of a web UI", keys[0], "name a LoRA or an embedding in its place")
    if {"emb", "emb2"} <= set(keys):
        return Other(
            "an embedding for SDXL in the form of oss-roettger's notebook, {emb, emb2}",
            "emb",
            "save emb as clip_l and emb2 as clip_g in a .safetensors file, called by its word",
        )
    for pattern, what, do in _OTHERS:
        if found := next((key for key in (*keys, *flat) if re.search(pattern, key)), None):
            return Other(what, found, do)
    start = next((key for key in flat if re.search(r"(^|\.)down_blocks\.0\.resnets\.0\.", key)), None)
    if start is not None and any(re.search(r"(^|\.)conv_in\.weight$", key) for key in flat):
        return Other("a whole UNet", start, "give it within a base's folder, as unet/")
    return None
