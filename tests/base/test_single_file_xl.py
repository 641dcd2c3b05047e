"""Stable Diffusion XL in one file: the same model as the folder; its full size on the meta device; others refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from cdvideo.base.loader import load_base
from cdvideo.base.single_file import CLIP_VOCABULARY, base_from_tensors
from cdvideo.errors import UserError
from cdvideo.sampling.image import sample_images
from tests.base.ldm_names import make_vae, official_xl
from tests.sdxl import save_folder

CPU = torch.device("cpu")

# As sd_xl_base_1.0.safetensors names them.
OFFICIAL = """
model.diffusion_model.time_embed.2.bias
model.diffusion_model.label_emb.0.0.weight
model.diffusion_model.label_emb.0.2.bias
model.diffusion_model.input_blocks.0.0.weight
model.diffusion_model.input_blocks.2.0.out_layers.3.weight
model.diffusion_model.input_blocks.3.0.op.weight
model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight
model.diffusion_model.input_blocks.8.1.transformer_blocks.2.ff.net.0.proj.weight
model.diffusion_model.middle_block.1.transformer_blocks.2.attn1.to_out.0.bias
model.diffusion_model.output_blocks.0.1.transformer_blocks.2.attn2.to_v.weight
model.diffusion_model.output_blocks.2.2.conv.weight
model.diffusion_model.output_blocks.5.2.conv.bias
model.diffusion_model.output_blocks.8.0.skip_connection.weight
model.diffusion_model.out.2.weight
first_stage_model.decoder.up.0.block.1.conv2.bias
first_stage_model.quant_conv.weight
conditioner.embedders.0.transformer.text_model.embeddings.position_ids
conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight
conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight
conditioner.embedders.1.model.positional_embedding
conditioner.embedders.1.model.token_embedding.weight
conditioner.embedders.1.model.text_projection
conditioner.embedders.1.model.logit_scale
conditioner.embedders.1.model.ln_final.weight
conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight
conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight
""".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With CLIP's own vocabulary, which files of this kind mean."""
    return save_folder(tmp_path_factory.mktemp("sdxl"), CLIP_VOCABULARY)


@pytest.fixture(scope="module")
def file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = load_base(str(folder), device=CPU)
    path = tmp_path_factory.mktemp("file") / "sd_xl.safetensors"
    tensors = official_xl(base.unet, base.vae, *base.text_encoders.values())
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    return path


def test_names_are_the_official_ones(file: Path) -> None:
    assert set(OFFICIAL) <= load_file(file).keys()


def test_a_file_is_the_model_that_the_folder_is(folder: Path, file: Path) -> None:
    said: list[str] = []
    one, other = load_base(str(file), device=CPU, report=said.append), load_base(str(folder), device=CPU)
    for left, right in zip(one.modules, other.modules, strict=True):
        ours, theirs = left.state_dict(), right.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert not left.training and not any(parameter.requires_grad for parameter in left.parameters())
    assert (one.resolution, one.zero_empty_prompt, one.vae.config.scaling_factor) == (1024, True, 0.13025)
    for key in ("transformer_layers_per_block", "attention_head_dim", "down_block_types"):
        assert tuple(one.unet.config[key]) == tuple(other.unet.config[key])
    assert one.unet.config["addition_time_embed_dim"] == 32
    keys = ["prediction_type", "beta_schedule", "beta_end", "timestep_spacing", "steps_offset"]
    assert all(one.scheduler_config[key] == other.scheduler_config[key] for key in keys)
    options: dict[str, Any] = {"seeds": [1], "steps": 2, "width": 64, "height": 64}
    picture, same = (sample_images(base, ["a photo of a dog!"], **options) for base in (one, other))
    assert (picture - same).abs().max() <= 1e-5 and picture.std() > 0.01
    counts = [f"{len(module.state_dict())}/{len(module.state_dict())}" for module in one.modules]
    matched = ", ".join(
        f"{part} {count}"
        for part, count in zip(("UNet", "VAE", "text encoder", "second text encoder"), counts, strict=True)
    )
    assert f"Stable Diffusion XL in one file, prediction known as in all of XL; matched {matched};" in said[0]


def full_size() -> dict[str, Tensor]:
    """stable-diffusion-xl-base-1.0, without its memory."""
    with init_empty_weights():
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        vae = make_vae((128, 256, 512, 512))
        first = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072))
        second = CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=32,
                num_attention_heads=20,
                projection_dim=1280,
                hidden_act="gelu",
            )
        )
    return official_xl(unet, vae.to("meta"), first, second)


def test_the_full_size_finds_all_its_places() -> None:
    tensors = full_size()
    counts = [
        len([name for name in tensors if name.startswith(prefix)])
        for prefix in ("model.diffusion_model.", "first_stage_model.", "conditioner.embedders.0.")
    ]
    assert counts == [1680, 248, 197]
    parts = base_from_tensors(tensors, Path("sd_xl_base_1.0.ckpt"), torch.float16)
    assert parts.matched == {"UNet": 1680, "VAE": 248, "text encoder": 196, "second text encoder": 517}
    assert parts.unet.config["transformer_layers_per_block"] == (1, 2, 10)
    assert parts.unet.config["attention_head_dim"] == [5, 10, 20]
    assert (parts.unet.config["addition_time_embed_dim"], parts.unet.config["cross_attention_dim"]) == (256, 2048)
    assert isinstance(parts.vae, AutoencoderKL) and parts.text_encoder_2 is not None
    assert parts.text_encoder_2.config.num_attention_heads == 20


def test_v_prediction_is_read_from_its_key(file: Path, tmp_path: Path) -> None:
    """As NoobAI-XL's v models have it."""
    path = tmp_path / "v.safetensors"
    save_file({**load_file(file), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, path)
    base = load_base(str(path), device=CPU)
    assert base.scheduler_config["prediction_type"] == "v_prediction"
    assert base.scheduler_config["rescale_betas_zero_snr"] is True


UNET = "model.diffusion_model."
OTHERS: dict[str, Any] = {
    "half of SDXL's two text encoders": lambda t: {k: v for k, v in t.items() if ".embedders.1." not in k},
    "XL's refiner": lambda t: {k.replace("embedders.1.", "embedders.0."): v for k, v in t.items()},
    "1 keys without a place, such as conditioner.embedders.1.model.stranger": lambda t: {
        **t,
        "conditioner.embedders.1.model.stranger": torch.ones(1),
    },
    "lacks 'model.diffusion_model.label_emb.0.0.weight'": lambda t: {
        k: v for k, v in t.items() if k != f"{UNET}label_emb.0.0.weight"
    },
    "tensors of CLIPTextModelWithProjection": lambda t: {
        k: v for k, v in t.items() if not k.endswith("1.model.ln_final.bias")
    },
    "no autoencoder": lambda t: {k: v for k, v in t.items() if not k.startswith("first_stage_model.")},
}


@pytest.mark.parametrize("said", OTHERS)
def test_other_files_are_refused_by_name(file: Path, tmp_path: Path, said: str) -> None:
    path = tmp_path / "file.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in OTHERS[said](load_file(file)).items()}, path)
    with pytest.raises(UserError, match=rf"file\.safetensors [\s\S]*{said}"):
        load_base(str(path), device=CPU)
