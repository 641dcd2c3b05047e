"""Stable Diffusion at tiny width, as a diffusers folder and under the official names of a single file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from cdvideo.base.single_file import load_clip_tokenizer

TEXT_WIDTH = 64
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


def make_unet(family: int, **options: Any) -> UNet2DConditionModel:
    """The UNet of Stable Diffusion 1 or 2, a tenth as wide."""
    shape: dict[str, Any] = {
        1: {"sample_size": 64, "block_out_channels": (32, 64, 128, 128), "attention_head_dim": 8},
        2: {
            "sample_size": 96,
            "block_out_channels": (64, 64, 128, 64),
            "attention_head_dim": [1, 1, 2, 1],
            "use_linear_projection": True,
        },
    }[family]
    torch.manual_seed(family)
    return UNet2DConditionModel(**{"cross_attention_dim": TEXT_WIDTH, **shape, **options})


def make_vae(widths: tuple[int, ...] = (32, 64, 128, 128)) -> AutoencoderKL:
    torch.manual_seed(3)
    return AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def make_text_encoder(family: int, layers: int = 3) -> CLIPTextModel:
    torch.manual_seed(4)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=1,
            hidden_act={1: "quick_gelu", 2: "gelu"}[family],
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=1,
        )
    )


def save_folder(folder: Path, family: int) -> Path:
    make_unet(family).save_pretrained(folder / "unet")
    make_vae().save_pretrained(folder / "vae")
    make_text_encoder(family).save_pretrained(folder / "text_encoder")
    load_clip_tokenizer(pad_token={1: "<|endoftext|>", 2: "!"}[family]).save_pretrained(folder / "tokenizer")
    prediction = {1: "epsilon", 2: "v_prediction"}[family]
    DDIMScheduler(**SCHEDULE, prediction_type=prediction).save_pretrained(folder / "scheduler")
    return folder


def official(family: int, unet: nn.Module, vae: nn.Module, text_encoder: nn.Module) -> dict[str, Tensor]:
    """All tensors under the names that CompVis' and Stability AI's files have, with what stands beside the weights."""
    text = {name.removeprefix("text_model."): tensor for name, tensor in text_encoder.state_dict().items()}
    tensors = {f"model.diffusion_model.{unet_name(name)}": tensor for name, tensor in unet.state_dict().items()}
    tensors |= {
        f"first_stage_model.{vae_name(name)}": as_conv(name, tensor) for name, tensor in vae.state_dict().items()
    }
    tensors |= {"betas": torch.ones(1000), "alphas_cumprod": torch.ones(1000), "model_ema.decay": torch.tensor(0.9)}
    tensors |= {"sqrt_one_minus_alphas_cumprod": torch.ones(1000), "posterior_mean_coef1": torch.ones(1000)}
    if family == 1:
        tensors |= {f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in text.items()}
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
        return tensors
    return tensors | open_clip(text)


def official_xl(unet: nn.Module, vae: nn.Module, first: nn.Module, second: nn.Module) -> dict[str, Tensor]:
    """All tensors under the names of sd_xl_base_1.0.safetensors, with what merges leave beside them."""
    tensors = {f"model.diffusion_model.{unet_name(name, xl=True)}": t for name, t in unet.state_dict().items()}
    tensors |= {f"first_stage_model.{vae_name(name)}": as_conv(name, t) for name, t in vae.state_dict().items()}
    clip, of_open_clip = (
        {name.removeprefix("text_model."): t for name, t in encoder.state_dict().items()} for encoder in (first, second)
    )
    prefix = "conditioner.embedders.0.transformer.text_model."
    tensors |= {f"{prefix}{name}": t for name, t in clip.items()}
    tensors |= {f"{prefix}embeddings.position_ids": torch.arange(77)[None], "denoiser.sigmas": torch.ones(1000)}
    return tensors | open_clip(of_open_clip, "conditioner.embedders.1.model.", unused=0)


def unet_name(name: str, *, xl: bool = False) -> str:
    name = re.sub(
        r"^down_blocks\.(\d)\.(resnets|attentions)\.(\d)",
        lambda m: f"input_blocks.{3 * int(m[1]) + int(m[3]) + 1}.{int(m[2] == 'attentions')}",
        name,
    )
    name = re.sub(
        r"^up_blocks\.(\d)\.(resnets|attentions)\.(\d)",
        lambda m: f"output_blocks.{3 * int(m[1]) + int(m[3])}.{int(m[2] == 'attentions')}",
        name,
    )
    name = re.sub(r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}", name)
    name = name.replace("mid_block.attentions.0", "middle_block.1")
    name = re.sub(
        r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{3 * int(m[1]) + 3}.0.op", name
    )
    name = re.sub(
        r"^up_blocks\.(\d)\.upsamplers\.0\.conv",
        lambda m: f"output_blocks.{3 * int(m[1]) + 2}.{1 if m[1] == '0' and not xl else 2}.conv",
        name,
    )
    for new, old in [
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"),
        ("add_embedding.linear_2", "label_emb.0.2"),
        ("conv_in.", "input_blocks.0.0."),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
        ("time_emb_proj", "emb_layers.1"),
        ("conv_shortcut", "skip_connection"),
    ]:
        name = name.replace(new, old)
    if re.match(r"(input_blocks|output_blocks)\.\d+\.0\.|middle_block\.[02]\.", name):
        for new, old in [("norm1", "in_layers.0"), ("conv1", "in_layers.2")]:
            name = name.replace(new, old)
        name = name.replace("norm2", "out_layers.0").replace("conv2", "out_layers.3")
    return name


def vae_name(name: str) -> str:
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    for new, old in [
        ("mid_block.attentions.0", "mid.attn_1"),
        ("group_norm", "norm"),
        ("to_out.0", "proj_out"),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
    ]:
        name = name.replace(new, old)
    return re.sub(r"\.to_([qkv])\.", r".\1.", name)


def as_conv(name: str, tensor: Tensor) -> Tensor:
    """The VAE's attention was written as convolutions of one pixel."""
    is_projection = re.search(r"attentions\.0\.to_.*weight", name)
    return tensor[:, :, None, None].contiguous() if is_projection else tensor


def open_clip(
    text: dict[str, Tensor], prefix: str = "cond_stage_model.model.", *, unused: int = 1
) -> dict[str, Tensor]:
    """OpenCLIP's names: Q, K and V in one, a projection, and a last layer that Stable Diffusion 2 does not use."""
    projection = text.get("text_projection.weight", torch.randn(TEXT_WIDTH, TEXT_WIDTH))
    layers = 1 + max(int(name.split(".")[2]) for name in text if name.startswith("encoder.layers."))
    tensors = {
        f"{prefix}positional_embedding": text["embeddings.position_embedding.weight"],
        f"{prefix}token_embedding.weight": text["embeddings.token_embedding.weight"],
        f"{prefix}ln_final.weight": text["final_layer_norm.weight"],
        f"{prefix}ln_final.bias": text["final_layer_norm.bias"],
        f"{prefix}text_projection": projection.T.contiguous(),
        f"{prefix}logit_scale": torch.tensor(1.0),
    }
    for layer in range(layers + unused):
        ours, theirs = f"encoder.layers.{min(layer, layers - 1)}", f"{prefix}transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            qkv = [text[f"{ours}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            tensors |= {
                f"{theirs}.attn.in_proj_{kind}": torch.cat(qkv),
                f"{theirs}.attn.out_proj.{kind}": text[f"{ours}.self_attn.out_proj.{kind}"],
                f"{theirs}.ln_1.{kind}": text[f"{ours}.layer_norm1.{kind}"],
                f"{theirs}.ln_2.{kind}": text[f"{ours}.layer_norm2.{kind}"],
                f"{theirs}.mlp.c_fc.{kind}": text[f"{ours}.mlp.fc1.{kind}"],
                f"{theirs}.mlp.c_proj.{kind}": text[f"{ours}.mlp.fc2.{kind}"],
            }
    return {name: tensor.clone() for name, tensor in tensors.items()}
