"""Read a base from a folder in diffusers' layout."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from cdvideo.base.checkpoint import read_tensors
from cdvideo.base.latents import vae_dtype
from cdvideo.base.single_file import BaseParts, check_added_inputs
from cdvideo.errors import UserError

T = TypeVar("T")
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
SECOND_TEXT_PARTS = ("text_encoder_2", "tokenizer_2")  # of SDXL
HASHED_PARTS = ("unet", "text_encoder", "vae")
# What is read of each part: neither the same weights as pickles, ONNX, Flax or OpenVINO, nor variants, but where a part
# has nothing else.
CONFIGS = (
    "*config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
WEIGHTS = tuple(
    f"{stem}{ending}"
    for stem in ("diffusion_pytorch_model", "model")
    for ending in (".safetensors", "-?????-of-?????.safetensors")
)
VARIANTS = ("fp16", "bf16")  # the first that a part has
VARIANT_FILES = {
    variant: tuple(
        f"{stem}{ending}"
        for stem in ("diffusion_pytorch_model", "model")
        for ending in (
            f".{variant}.safetensors",
            f".{variant}-?????-of-?????.safetensors",
            f"-?????-of-?????.{variant}.safetensors",
        )
    )
    for variant in VARIANTS
}

# The VAE's attention as folders of Stable Diffusion 1 name it, from before diffusers had one class for all attentions.
_OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
_OLD_ATTENTION = re.compile("|".join(map(re.escape, _OLD_NAMES)))


def is_sdxl_folder(path: Path) -> bool:
    """Whether the UNet also reads a pooled text and sizes, as its config says."""
    config = path / "unet" / "config.json"
    return config.is_file() and read_json(config).get("addition_embed_type") == "text_time"


def read_json(path: Path) -> dict[str, Any]:
    """A config. Raises UserError where it is missing, damaged, or no JSON object."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(read, dict):
            return read
        reason = f"it holds a {type(read).__name__}"
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error)
    raise UserError(
        f"{path} can not be read ({reason})",
        allowed="the configs that a folder in diffusers' layout has, as JSON",
        do="get the folder again, or give another --base",
    )


def _read_part(folder: Path, read: Callable[[], T]) -> T:
    """What one of the libraries reads of a folder. Raises UserError where it can not."""
    try:
        return read()
    except UserError:
        raise
    except Exception as error:  # damaged files raise whatever the library first stumbles over
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{folder} can not be read ({reason})",
            allowed="a part of a base, as diffusers saves it",
            do="get the folder again, or give another --base",
        ) from error


def read_folder(path: Path, dtype: torch.dtype) -> BaseParts:
    is_sdxl = is_sdxl_folder(path)
    _check_configs(path)
    # First the text encoders, which are read whole before they are cast: by then little else is in memory.
    text_encoder = load_text_encoder(path / "text_encoder", dtype=dtype)
    second = _read_second_text(path, dtype) if is_sdxl else {}
    is_small = read_json(path / "vae" / "config.json").get("_class_name") == "AutoencoderTiny"
    vae = _empty(path, "vae", AutoencoderTiny if is_small else AutoencoderKL)
    _fill(vae, path, "vae", vae_dtype(vae, dtype, is_sdxl=is_sdxl))
    unet = _empty(path, "unet", UNet2DConditionModel)
    if unet.config.in_channels != vae.config.latent_channels:
        raise UserError(
            f"the UNet in {path} reads {unet.config.in_channels} channels, its VAE has {vae.config.latent_channels}",
            allowed="text-to-image models; those for inpainting, depth or editing read more than noise",
            do="give another --base",
        )
    if second:
        check_added_inputs(unet, second["text_encoder_2"].config.projection_dim, path.name)
    _fill(unet, path, "unet", dtype)
    modules = {"UNet": unet, "VAE": vae, "text encoder": text_encoder}
    if second:
        modules["second text encoder"] = second["text_encoder_2"]
    return BaseParts(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=load_tokenizer(path, "tokenizer"),
        # Latents go beyond [-1, 1]; folders of samplers that never clip do not say so, and DDIM would. Those of Stable
        # Diffusion 1 are older than other predictions than that of noise.
        scheduler_config={
            "clip_sample": False,
            "prediction_type": "epsilon",
            **_read_part(path / "scheduler", lambda: DDIMScheduler.load_config(path, subfolder="scheduler")),
        },
        found=f"{'SDXL, ' if second else ''}a folder in diffusers' layout{_told_variants(path)}",
        matched={part: len(module.state_dict()) for part, module in modules.items()},
        **second,
    )


def _check_configs(path: Path) -> None:
    """Raises UserError, by name, for models that read or predict something else than Stable Diffusion's do."""
    unet, vae = (read_json(path / part / "config.json") for part in ("unet", "vae"))
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    name, prediction = str(scheduler.get("_class_name")), scheduler.get("prediction_type", "epsilon")
    kinds = {
        "a latent consistency model, whose UNet also reads the guidance (time_cond_proj_dim)": unet.get(
            "time_cond_proj_dim"
        ),
        "a VAE whose latents are centred by means of their own (latents_mean)": vae.get("latents_mean"),
        "a VAE whose latents are scaled by spreads of their own (latents_std)": vae.get("latents_std"),
        f"a scheduler of other noise levels ({name})": name.startswith(("EDM", "FlowMatch")),
        f"a model that predicts {prediction!r}": prediction not in ("epsilon", "v_prediction"),
    }
    for kind, is_it in kinds.items():
        if is_it:
            raise UserError(
                f"{path} holds {kind}",
                allowed="text-to-image models of Stable Diffusion 1, 2 and XL, which predict noise or v",
                do="give another --base",
            )


def _empty(path: Path, part: str, kind: Any) -> Any:
    with init_empty_weights():
        return _read_part(path / part, lambda: kind.from_config(kind.load_config(path, subfolder=part)))


def load_tokenizer(path: Path, part: str) -> CLIPTokenizer:
    return _read_part(path / part, lambda: CLIPTokenizer.from_pretrained(path, subfolder=part))


def _told_variants(path: Path) -> str:
    """In words, the variants of the parts that have no other weights."""
    variants = {part: variant_of(path / part) for part in (*HASHED_PARTS, "text_encoder_2") if (path / part).is_dir()}
    told = ", ".join(f"{part} {variant}" for part, variant in variants.items() if variant)
    return f" (of variants: {told})" if told else ""


def _fill(module: nn.Module, path: Path, part: str, dtype: torch.dtype) -> None:
    """Gives an empty module the weights of its folder; not `from_pretrained`, which has them twice when it casts."""
    given: dict[str, Tensor] = {}
    for file in weight_files(path / part):
        for name, tensor in read_tensors(file, dtype_of=lambda _: dtype).items():
            given[_OLD_ATTENTION.sub(lambda found: _OLD_NAMES[found[0]], name)] = tensor
    wanted = {name: tensor.shape for name, tensor in module.state_dict().items()}
    shared = wanted.keys() & given.keys()
    for name in shared:  # the VAE's attention, which some have as convolutions of one pixel
        if ".attentions." in name and part == "vae" and given[name].numel() == wanted[name].numel():
            given[name] = given[name].reshape(wanted[name])
    info = {
        "missing_keys": wanted.keys() - shared,
        "unexpected_keys": given.keys() - shared,
        "mismatched_keys": {name for name in shared if given[name].shape != wanted[name]},
    }
    _check_all_matched({"unet": "UNet", "vae": "VAE"}[part], info, path)
    module.load_state_dict(given, assign=True)


def _read_second_text(path: Path, dtype: torch.dtype) -> dict[str, Any]:
    """What a folder of SDXL has beside the parts of all: fields of BaseParts."""
    encoder = load_text_encoder(path / "text_encoder_2", dtype=dtype, kind=CLIPTextModelWithProjection)
    index = path / "model_index.json"
    said = read_json(index) if index.is_file() else {}
    return {
        "text_encoder_2": encoder,
        "tokenizer_2": load_tokenizer(path, "tokenizer_2"),
        "zero_empty_prompt": bool(said.get("force_zeros_for_empty_prompt", True)),
    }


def _check_all_matched(part: str, info: Mapping[str, Collection[Any]], path: Path) -> None:
    """Raises UserError for weights without a place, and for places that would keep random weights."""
    wrong = {kind: info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if wrong:
        told = ", ".join(
            f"{len(keys)} {kind.removesuffix('_keys')} (such as {min(map(str, keys))})" for kind, keys in wrong.items()
        )
        raise UserError(
            f"the {part} in {path}: {told}",
            allowed="weights that fit the folder's config.json key by key",
            do="get the folder again, or give another --base",
        )


def load_text_encoder(folder: Path, *, dtype: torch.dtype = torch.float32, kind: Any = CLIPTextModel) -> Any:
    """A text encoder of that class on the CPU, without the progress bar that transformers shows for every file."""
    for file in weight_files(folder):
        read_tensors(file)  # mapped: tells what a damaged file is
    options: dict[str, Any] = {"dtype": dtype, "variant": variant_of(folder), "output_loading_info": True}
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        text_encoder, info = _read_part(folder, lambda: kind.from_pretrained(folder, **options))
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    _check_all_matched("text encoder", info, folder.parent)
    return text_encoder


def matching(folder: Path, patterns: Collection[str]) -> list[Path]:
    return sorted(file for pattern in patterns for file in folder.glob(pattern))


def variant_of(folder: Path) -> str | None:
    """The variant to read, where the folder has no weights without one."""
    if matching(folder, WEIGHTS):
        return None
    return next((variant for variant in VARIANTS if matching(folder, VARIANT_FILES[variant])), None)


def weight_files(folder: Path) -> list[Path]:
    """One file, or its shards. Raises UserError where there are none, or of unknown variants alone."""
    variant = variant_of(folder)
    files = matching(folder, WEIGHTS if variant is None else VARIANT_FILES[variant])
    if not files:
        others = sorted(file.name for file in folder.glob("*.safetensors"))
        raise UserError(
            f"{folder} holds {f'no weights but {others[0]}' if others else 'no .safetensors weights'}",
            allowed="weights in safetensors files (no pickle), named as diffusers does, or of variants fp16 and bf16",
            do=f"rename {others[0]} so, if it is what you want"
            if others
            else "convert the base to safetensors, or give another --base",
        )
    return files
