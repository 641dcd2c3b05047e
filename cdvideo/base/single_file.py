"""Stable Diffusion 1.x, 2.x and XL from one .safetensors or .ckpt file, without a config from anywhere else.

The config is read from the keys, the weights are renamed by diffusers' own conversion, and the modules are built
without weights and then given the file's, so no tensor is held twice. Every key of the file is accounted for.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from cdvideo.base.checkpoint import read_metadata, read_tensors
from cdvideo.base.latents import Vae, vae_dtype
from cdvideo.base.ldm import (
    CLIP,
    OPEN_CLIP,
    SCHEDULER,
    UNET,
    VAE,
    XL_CLIP,
    XL_OPEN_CLIP,
    family_of,
    name_attention,
    text_config,
    unet_config,
    unused_layers,
    vae_config,
)
from cdvideo.errors import UserError

CLIP_VOCABULARY = Path(__file__).parent / "clip"

# What stands beside the weights: tables of the schedule, marks, and parts of CLIP that are never called.
_BESIDE = re.compile(
    r"(model_ema|first_stage_model\.loss|safety_checker)\..*|(sqrt_|sqrt_recip_|sqrt_recipm1_|log_|)(one_minus_|)(alphas_cumprod).*"
    r"|posterior_.*|betas|logvar|lvlb_weights|scale_factor|v_pred|ztsnr|denoiser\.sigmas"
    r"|(cond_stage_model|conditioner\.embedders\.[01])\..*\.position_ids"
    r"|(cond_stage_model|conditioner\.embedders\.0)\.(model\.|transformer\.|)"
    r"(logit_scale|text_projection(\.weight)?|attn_mask)"
    r"|conditioner\.embedders\.1\.(model\.|)(logit_scale|attn_mask)"
)


@dataclass(frozen=True)
class BaseParts:
    """What a base is made of, on the CPU. `found`: what was loaded, in words; `matched`: tensors in each part."""

    unet: UNet2DConditionModel
    vae: Vae
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler_config: dict[str, Any]
    found: str
    matched: Mapping[str, int]
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: CLIPTokenizer | None = None
    zero_empty_prompt: bool = False


class Prediction(NamedTuple):
    """What the UNet predicts, in the words of diffusers' schedulers, and how that is known."""

    kind: str
    source: str


def read_single_file(path: Path, *, dtype: torch.dtype = torch.float32) -> BaseParts:
    """Reads a base from one file as CompVis, Stability AI and the web interfaces have it; never touches the network.

    Where the file holds averaged weights (EMA) of the UNet beside the last ones, the averaged are taken.

    Raises:
        UserError: another kind of model, by name; a part that is missing, or a key that has no place.
    """
    is_xl = any(name.startswith(XL_CLIP) for name in read_tensors(path))
    of_vae = torch.float32 if is_xl else dtype  # SDXL's gets its own type when its config is known
    return base_from_tensors(
        read_tensors(path, dtype_of=lambda name: of_vae if name.startswith(VAE) else dtype), path, dtype
    )


def base_from_tensors(tensors: dict[str, Tensor], path: Path, dtype: torch.dtype) -> BaseParts:
    """`read_single_file` for tensors that are read already; `tensors` is emptied of what is not used."""
    _refuse_other_kinds(tensors, path)
    stated, zero_snr = _stated_prediction(tensors, path), "ztsnr" in tensors
    averaged = _take_averaged(tensors)
    try:
        family = family_of(tensors)
        _drop_unused(tensors, family)
        name_attention(tensors)
        unet_shape = unet_config(tensors)
        vae_shape = vae_config(tensors, scaling_factor=0.13025 if family == "XL" else 0.18215)
        unet_weights = convert_ldm_unet_checkpoint(_part(tensors, UNET), unet_shape)
        vae_weights = convert_ldm_vae_checkpoint(_part(tensors, VAE), vae_shape)
        texts = _texts(tensors, family)
    except (KeyError, IndexError) as error:
        raise _not_whole(path, f"lacks {error}") from error
    text_weights = [weight for _, _, weights in texts.values() for weight in weights.values()]
    _check_all_used(tensors, [*unet_weights.values(), *vae_weights.values(), *text_weights], path)
    del tensors, text_weights
    with init_empty_weights():
        unet, vae = UNet2DConditionModel(**unet_shape), AutoencoderKL(**vae_shape)
        encoders = {name: kind(CLIPTextConfig(**shape)) for name, (kind, shape, _) in texts.items()}
    of_vae = vae_dtype(vae, dtype, is_sdxl=family == "XL")
    matched = {"UNet": _fill(unet, unet_weights, dtype, path), "VAE": _fill(vae, vae_weights, of_vae, path)}
    matched |= {name: _fill(encoders[name], weights, dtype, path) for name, (*_, weights) in texts.items()}

    text_encoder, *second = encoders.values()
    _check_widths(unet, [*encoders.values()], path)
    if stated is not None:
        prediction = stated
    elif family == "2.x":
        prediction = measure_prediction(unet, text_encoder)
    else:
        prediction = Prediction("epsilon", f"as in all of {family}")
    # Of Stable Diffusion 2, the models for 768 pixels predict v, those for 512 the noise.
    wide = family == "2.x" and prediction.kind == "v_prediction"
    unet.register_to_config(sample_size=128 if family == "XL" else 96 if wide else 64)
    last_steps = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else {}
    return BaseParts(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=load_clip_tokenizer(pad_token="!" if family == "2.x" else "<|endoftext|>"),
        scheduler_config={**SCHEDULER, "prediction_type": prediction.kind, **last_steps},
        found=f"Stable Diffusion {family} in one file"
        f"{' (averaged weights)' if averaged else ''}, prediction known {prediction.source}",
        matched=matched,
        text_encoder_2=second[0] if second else None,
        tokenizer_2=load_clip_tokenizer(pad_token="!") if second else None,
        zero_empty_prompt=bool(second),
    )


def _texts(tensors: Mapping[str, Tensor], family: str) -> dict[str, tuple[Any, dict[str, Any], dict[str, Tensor]]]:
    """The family's text encoders: class, config's arguments and weights of each."""
    if family != "XL":
        is_open = any(name.startswith(OPEN_CLIP) for name in tensors)
        weights = _open_clip(tensors, OPEN_CLIP) if is_open else _clip(tensors, CLIP)
        shape = text_config(weights, activation="gelu" if family == "2.x" else "quick_gelu")
        return {"text encoder": (CLIPTextModel, shape, weights)}
    first, second = _clip(tensors, XL_CLIP), _open_clip(tensors, XL_OPEN_CLIP)
    projection = {"projection_dim": len(second["text_projection.weight"])}
    return {
        "text encoder": (CLIPTextModel, text_config(first, activation="quick_gelu"), first),
        "second text encoder": (
            CLIPTextModelWithProjection,
            text_config(second, activation="gelu") | projection,
            second,
        ),
    }


def _check_widths(unet: UNet2DConditionModel, encoders: Sequence[Any], path: Path) -> None:
    """Raises UserError where the UNet does not read what the text encoders give: parts of different models."""
    given, wanted = sum(encoder.config.hidden_size for encoder in encoders), unet.config["cross_attention_dim"]
    if given != wanted:
        raise _not_whole(path, f"has a UNet that reads text of width {wanted}, and text encoders of width {given}")


def check_added_inputs(unet: UNet2DConditionModel, pooled_width: int, name: str) -> None:
    """Raises UserError where the UNet adds something else to its time embedding than SDXL's pooled text and six sizes.

    SDXL's refiner reads an aesthetic score in place of two of them.
    """
    wanted = pooled_width + 6 * unet.config["addition_time_embed_dim"]
    given = unet.config["projection_class_embeddings_input_dim"]
    if given != wanted:
        raise UserError(
            f"{name} holds a UNet that reads {given} numbers beside the text, as SDXL's refiner does",
            allowed=f"SDXL's base, or a model tuned from it, which reads {wanted}",
            do="choose another --base",
        )


def load_clip_tokenizer(*, pad_token: str) -> CLIPTokenizer:
    """CLIP's own tokenizer. Stable Diffusion 1.x pads with the end of text, OpenCLIP's text with id 0, which is "!"."""
    return CLIPTokenizer.from_pretrained(CLIP_VOCABULARY, pad_token=pad_token)


@torch.inference_mode()
def measure_prediction(unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> Prediction:
    """Whether a UNet predicts noise or v: asked at the last timestep, with noise for a picture.

    There a picture is almost all noise, so a prediction of the noise is nearly what went in, while v is nearly the
    picture's negative, which has little to do with it. In float16 a copy in float32 is asked: CPUs have no fast kernel
    for convolutions in half precision, and would take minutes.
    """
    if unet.dtype == torch.float16:
        unet, text_encoder = (copy.deepcopy(part).float() for part in (unet, text_encoder))
    generator = torch.Generator().manual_seed(0)
    noise_BCHW = torch.randn(1, unet.config["in_channels"], 32, 32, generator=generator)
    text_BLD = text_encoder(input_ids=torch.tensor([[49406, 49407]])).last_hidden_state
    predicted_BCHW = unet(noise_BCHW.to(unet.dtype), 999, text_BLD, return_dict=False)[0].float()
    likeness = torch.cosine_similarity(predicted_BCHW.flatten(), noise_BCHW.flatten(), dim=0).item()
    return Prediction("epsilon" if likeness > 0.5 else "v_prediction", f"by trial (likeness to noise {likeness:.2f})")


def _stated_prediction(tensors: Mapping[str, Tensor], path: Path) -> Prediction | None:
    """What a config beside the file, the file's header or a key says."""
    beside = path.with_suffix(".yaml")
    if beside.is_file():
        text = beside.read_text(encoding="utf-8", errors="replace")  # what is looked for is ASCII in any encoding
        is_v = re.search(r"^ *parameterization: *[\"']?v[\"']? *$", text, re.MULTILINE) is not None
        return Prediction("v_prediction" if is_v else "epsilon", f"from {beside.name}")
    header = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}
    stated = header.get(read_metadata(path).get("modelspec.prediction_type", ""))
    if stated is not None:
        return Prediction(stated, "from the file's header")
    return Prediction("v_prediction", "from the key v_pred") if "v_pred" in tensors else None


def _take_averaged(tensors: dict[str, Tensor]) -> bool:
    """Puts the averaged weights of the UNet in place of the last ones, where the file has them."""
    averages = {
        name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in tensors if name.startswith(UNET)
    }
    if not all(average in tensors for average in averages.values()):
        return False
    for name, average in averages.items():
        tensors[name] = tensors.pop(average)
    return True


def _drop_unused(tensors: dict[str, Tensor], family: str) -> None:
    """Leaves out what no part has a place for, and of 2.x the layers of the text encoder that it does not read."""
    unused = {*unused_layers(tensors)} if family == "2.x" else set[str]()
    for name in list(tensors):
        if _BESIDE.fullmatch(name) or name in unused:
            del tensors[name]


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _clip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A text encoder of CLIP under CLIPTextModel's own names; some merges lack the `text_model.`."""
    return {
        name.removeprefix(prefix).removeprefix("text_model."): tensor for name, tensor in _part(tensors, prefix).items()
    }


def _open_clip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A text encoder of OpenCLIP under CLIPTextModel's own names, with its projection where it is used."""
    # diffusers asks the model for its width alone.
    sized = torch.nn.Module()
    sized.config = CLIPTextConfig(hidden_size=tensors[f"{prefix}token_embedding.weight"].shape[1])
    converted = convert_open_clip_checkpoint(sized, _part(tensors, prefix), prefix=prefix)
    return {name.removeprefix("text_model."): tensor for name, tensor in converted.items()}


def _check_all_used(tensors: Mapping[str, Tensor], weights: Iterable[Tensor], path: Path) -> None:
    """Raises UserError for keys of the file that went into no part. What was renamed still lies at the same place."""
    places = {tensor.data_ptr() for tensor in weights}
    # OpenCLIP's, taken apart into Q, K and V, or transposed.
    copied = (".in_proj_weight", ".in_proj_bias", f"{XL_OPEN_CLIP}text_projection")
    strangers = [
        name for name, tensor in tensors.items() if tensor.data_ptr() not in places and not name.endswith(copied)
    ]
    if strangers:
        raise _not_whole(path, f"has {len(strangers)} keys without a place, such as {strangers[0]}")


def _fill(module: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype, path: Path) -> int:
    """Gives an empty module its weights and returns how many; `weights` is emptied on the way."""
    # transformers before 5.6 has CLIPTextModel's weights under `text_model.`; the model with a projection always has.
    prefix = "text_model." if hasattr(module, "text_model") else ""
    wanted = {name: tensor.shape for name, tensor in module.state_dict().items()}
    given = {name if name in wanted else prefix + name: weights.pop(name).to(dtype) for name in list(weights)}
    wrong = sorted(
        name for name in wanted.keys() | given.keys() if name not in given or given[name].shape != wanted.get(name)
    )
    if wrong:
        matched = f"matched {len(wanted.keys() - set(wrong))}/{len(wanted)} tensors of {type(module).__name__}"
        raise _not_whole(path, f"{matched}; {len(wrong)} are missing, unknown or misshapen, such as {wrong[0]}")
    module.load_state_dict(given, assign=True)
    return len(given)


def _not_whole(path: Path, what: str) -> UserError:
    return UserError(
        f"{path.name} {what}",
        allowed="a whole Stable Diffusion 1.x, 2.x or XL in one file, and nothing else in it",
        do="give another --base, or the model that this one was made from",
    )


# Single keys that make another model of a whole Stable Diffusion, and what it is.
_MARKS = {
    f"{UNET}time_embed.cond_proj.": "a latent consistency model, whose UNet also reads the guidance",
    "edm_": "a model with EDM's noise levels, as CosXL and Playground 2.5 are",
    "embedding_manager.": "embeddings of textual inversion beside the model, which are read from files of their own",
    "control_model.": "a ControlNet beside the model",
    "lora_": "a LoRA beside the model",
}


def _refuse_other_kinds(tensors: Mapping[str, Tensor], path: Path) -> None:
    first = tensors.get(f"{UNET}input_blocks.0.0.weight")
    channels = 4 if first is None else first.shape[1]
    prefixes = (VAE, CLIP, OPEN_CLIP, XL_CLIP, XL_OPEN_CLIP, "conditioner.embedders.0.model.")
    has = {prefix: any(name.startswith(prefix) for name in tensors) for prefix in prefixes}
    has_text = has[CLIP] or has[OPEN_CLIP] or has[XL_CLIP]
    labels = any(name.startswith(f"{UNET}label_emb.") for name in tensors)
    joined = "\n".join(tensors)
    marks = ((kind, name) for mark, kind in _MARKS.items() for name in tensors if name.startswith(mark))
    of_mark, name_of_mark = next(marks, ("", ""))
    kinds = {
        "Stable Diffusion XL's refiner": has["conditioner.embedders.0.model."],
        "half of SDXL's two text encoders": has[XL_CLIP] != has[XL_OPEN_CLIP],
        f"{of_mark} ({name_of_mark})": bool(of_mark) and first is not None,
        "a LoRA": "lora" in joined,
        "motion modules": "motion_modules." in joined,
        "parts of a diffusers folder": first is None
        and re.search(r"^(down_blocks|encoder|text_model)\.", joined, re.M),
        "no UNet of Stable Diffusion": first is None,
        f"a model that reads {channels} channels (inpainting, depth or editing)": channels != 4,
        "the UNet of Stable Diffusion XL alone, without text encoders": labels and not has_text,
        "a model with class labels, or one that reads pictures (unCLIP)": labels and not has[XL_CLIP],
        "a UNet alone, without text encoder and autoencoder": not has[VAE] and not has_text,
        "no autoencoder": not has[VAE],
        "no text encoder": not has_text,
    }
    for kind, is_it in kinds.items():
        if is_it:
            raise _other_kind(path, kind)
    projection = tensors.get(f"{UNET}middle_block.1.proj_in.weight")
    if has[OPEN_CLIP] and projection is not None and projection.ndim != 2:
        raise _other_kind(path, "the text encoder of Stable Diffusion 2 and a UNet of 1.x")


def _other_kind(path: Path, kind: str) -> UserError:
    return UserError(
        f"{path.name} holds {kind}",
        allowed="text-to-image models of Stable Diffusion 1, 2 and XL, whole in one file or folder",
        do="choose another file with --base",
    )
