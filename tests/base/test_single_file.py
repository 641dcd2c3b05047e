"""Stable Diffusion 1.x and 2.x in one file: the same model as the folder, nothing left over, others refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from cdvideo.base.ldm import unet_config, vae_config
from cdvideo.base.loader import Base, load_base, weights_hash
from cdvideo.base.single_file import load_clip_tokenizer, measure_prediction, read_single_file
from cdvideo.errors import UserError
from cdvideo.sampling.image import sample_images
from tests.base.ldm_names import make_text_encoder, make_unet, make_vae, official, save_folder

CPU = torch.device("cpu")

# As v1-5-pruned.safetensors and v2-1_768-ema-pruned.safetensors name them.
OFFICIAL = {
    1: """
model.diffusion_model.time_embed.0.weight
model.diffusion_model.input_blocks.0.0.weight
model.diffusion_model.input_blocks.1.0.in_layers.0.weight
model.diffusion_model.input_blocks.1.0.in_layers.2.weight
model.diffusion_model.input_blocks.1.0.emb_layers.1.bias
model.diffusion_model.input_blocks.1.0.out_layers.0.bias
model.diffusion_model.input_blocks.1.0.out_layers.3.weight
model.diffusion_model.input_blocks.1.1.norm.weight
model.diffusion_model.input_blocks.1.1.proj_in.weight
model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight
model.diffusion_model.input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight
model.diffusion_model.input_blocks.3.0.op.weight
model.diffusion_model.input_blocks.4.0.skip_connection.weight
model.diffusion_model.input_blocks.11.0.out_layers.3.bias
model.diffusion_model.middle_block.0.in_layers.0.weight
model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_out.0.bias
model.diffusion_model.middle_block.2.out_layers.3.weight
model.diffusion_model.output_blocks.2.1.conv.weight
model.diffusion_model.output_blocks.5.2.conv.bias
model.diffusion_model.output_blocks.11.1.proj_out.weight
model.diffusion_model.out.0.weight
model.diffusion_model.out.2.bias
first_stage_model.encoder.conv_in.weight
first_stage_model.encoder.down.0.block.0.norm1.weight
first_stage_model.encoder.down.0.downsample.conv.weight
first_stage_model.encoder.down.2.block.0.nin_shortcut.weight
first_stage_model.encoder.mid.block_1.conv1.weight
first_stage_model.encoder.mid.attn_1.norm.weight
first_stage_model.encoder.mid.attn_1.q.weight
first_stage_model.encoder.mid.attn_1.proj_out.bias
first_stage_model.encoder.norm_out.weight
first_stage_model.decoder.up.3.upsample.conv.weight
first_stage_model.decoder.up.0.block.2.conv2.bias
first_stage_model.decoder.conv_out.weight
first_stage_model.quant_conv.weight
first_stage_model.post_quant_conv.bias
cond_stage_model.transformer.text_model.embeddings.token_embedding.weight
cond_stage_model.transformer.text_model.embeddings.position_ids
cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight
cond_stage_model.transformer.text_model.final_layer_norm.bias
""".split(),
    2: """
model.diffusion_model.input_blocks.1.1.proj_in.weight
cond_stage_model.model.positional_embedding
cond_stage_model.model.token_embedding.weight
cond_stage_model.model.text_projection
cond_stage_model.model.logit_scale
cond_stage_model.model.ln_final.weight
cond_stage_model.model.transformer.resblocks.0.ln_1.weight
cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight
cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias
cond_stage_model.model.transformer.resblocks.0.attn.out_proj.weight
cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight
cond_stage_model.model.transformer.resblocks.0.mlp.c_proj.bias
""".split(),
}


def make_tensors(family: int) -> dict[str, Tensor]:
    tensors = official(family, make_unet(family), make_vae(), make_text_encoder(family))
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.fixture(scope="module", params=[1, 2])
def family(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def folder(family: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp(f"sd{family}"), family)


@pytest.fixture(scope="module")
def file(family: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(f"file{family}") / f"sd{family}.safetensors"
    save_file(make_tensors(family), path)
    return path


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for the tests that change it: Stable Diffusion 1."""
    path = tmp_path_factory.mktemp("small") / "sd1.safetensors"
    save_file(make_tensors(1), path)
    return path


def assert_same_weights(a: Base, b: Base) -> None:
    for left, right in ((a.unet, b.unet), (a.vae, b.vae), (a.text_encoder, b.text_encoder)):
        ours, theirs = left.state_dict(), right.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_names_are_the_official_ones(family: int) -> None:
    assert set(OFFICIAL[family]) <= make_tensors(family).keys()


def test_a_file_is_the_model_that_the_folder_is(family: int, folder: Path, file: Path) -> None:
    one, other = load_base(str(file), device=CPU), load_base(str(folder), device=CPU)
    assert_same_weights(one, other)
    assert (one.resolution, one.path, one.hash) == (other.resolution, file, weights_hash(file))
    shared = one.scheduler_config.keys() & other.scheduler_config.keys()
    assert {"prediction_type", "beta_schedule", "steps_offset", "clip_sample", "set_alpha_to_one"} <= shared
    assert all(one.scheduler_config[key] == other.scheduler_config[key] for key in shared)
    for module in (one.unet, one.vae, one.text_encoder):
        assert not module.training and not any(parameter.requires_grad for parameter in module.parameters())
    options: dict[str, Any] = {"seeds": [1], "steps": 2, "width": 64, "height": 64, "negative_prompt": "fog"}
    picture, same = (sample_images(base, ["a photo of a dog!"], **options) for base in (one, other))
    # Equal weights at other places of memory: the CPU's matrix kernels may add in another order.
    assert (picture - same).abs().max() <= 1e-5
    assert picture.std() > 0.01


def test_the_report_says_what_was_found(family: int, file: Path, folder: Path) -> None:
    said: list[str] = []
    load_base(str(file), device=CPU, report=said.append)
    load_base(str(folder), device=CPU, report=said.append)
    prediction, known = {1: ("epsilon", "as in all of 1.x"), 2: ("v_prediction", "by trial")}[family]
    assert f"Stable Diffusion {family}.x in one file, prediction known {known}" in said[0]
    assert "a folder in diffusers' layout" in said[1]
    for line, path in zip(said, (file, folder), strict=True):
        assert "matched UNet 686/686, VAE 248/248, text encoder 52/52" in line
        assert f"predicts {prediction}, betas scaled_linear, hash {weights_hash(path)}" in line


def test_full_size_configs() -> None:
    """Stable Diffusion 1.5, from nothing but the names and shapes of its weights."""
    with init_empty_weights():
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        vae = make_vae((128, 256, 512, 512))
    tensors = official(1, unet, vae, make_text_encoder(1))
    found = unet_config(tensors)
    assert found["block_out_channels"] == (320, 640, 1280, 1280)
    assert all(unet.config[key] == value for key, value in found.items())
    assert all(vae.config[key] == value for key, value in vae_config(tensors).items())
    assert len([name for name in tensors if name.startswith("model.diffusion_model.")]) == 686
    assert len([name for name in tensors if name.startswith("first_stage_model.")]) == 248


def test_full_size_configs_of_the_second() -> None:
    """Stable Diffusion 2.1."""
    heads = [5, 10, 20, 20]
    with init_empty_weights():
        unet = UNet2DConditionModel(cross_attention_dim=1024, attention_head_dim=heads, use_linear_projection=True)
    found = unet_config(official(2, unet, make_vae(), make_text_encoder(2)))
    assert (found["attention_head_dim"], found["use_linear_projection"], found["cross_attention_dim"]) == (
        heads,
        True,
        1024,
    )


def test_ckpt_half_precision_and_averaged_weights(small_file: Path, tmp_path: Path) -> None:
    tensors = load_file(small_file)
    averaged = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1
        for name, tensor in tensors.items()
        if name.startswith("model.diffusion_model.")
    }
    path = tmp_path / "sd-v1-4-full-ema.ckpt"
    torch.save({"global_step": 1, "state_dict": {**tensors, **averaged}}, path)
    parts = read_single_file(path, dtype=torch.bfloat16)
    assert "averaged weights" in parts.found
    expected = (tensors["model.diffusion_model.out.2.bias"] + 1).bfloat16()
    assert torch.equal(parts.unet.conv_out.bias, expected)
    assert {p.dtype for p in parts.unet.parameters()} == {torch.bfloat16}


def test_text_encoders_without_text_model_in_their_names(small_file: Path, tmp_path: Path) -> None:
    tensors = {name.replace(".text_model.", "."): tensor for name, tensor in load_file(small_file).items()}
    save_file(tensors, tmp_path / "merge.safetensors")
    assert_same_weights(
        load_base(str(tmp_path / "merge.safetensors"), device=CPU), load_base(str(small_file), device=CPU)
    )


def _write_yaml(path: Path) -> None:
    path.with_suffix(".yaml").write_text("model:\n  params:\n    parameterization: v\n")


@pytest.mark.parametrize(
    ("extra", "metadata", "beside", "source", "zero_snr"),
    [
        ({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, None, False, "from the key v_pred", True),
        ({}, {"modelspec.prediction_type": "v"}, False, "from the file's header", False),
        ({}, {"modelspec.prediction_type": "epsilon"}, True, r"from sd\.yaml", False),
    ],
)
def test_what_the_file_says_of_its_prediction(
    small_file: Path, tmp_path: Path, extra: Any, metadata: Any, beside: bool, source: str, zero_snr: bool
) -> None:
    path = tmp_path / "sd.safetensors"
    save_file({**load_file(small_file), **extra}, path, metadata=metadata)
    if beside:
        _write_yaml(path)
    parts = read_single_file(path)
    assert parts.scheduler_config["prediction_type"] == "v_prediction"
    assert parts.scheduler_config.get("rescale_betas_zero_snr", False) is zero_snr
    assert source.replace("\\", "") in parts.found


@pytest.mark.parametrize(("target", "kind"), [("noise", "epsilon"), ("v", "v_prediction")])
def test_the_prediction_of_a_trained_unet_is_told(target: str, kind: str) -> None:
    """Trained for a moment at the last timestep, where 0.5 % of the variance is picture."""
    torch.manual_seed(0)
    unet = make_unet(1, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    text_encoder = make_text_encoder(2)
    text_BLD = text_encoder(input_ids=torch.tensor([[49406, 49407]])).last_hidden_state.detach()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    for _ in range(60):
        noise_BCHW, pictures_BCHW = torch.randn(4, 4, 16, 16), torch.randn(4, 4, 1, 1).expand(-1, -1, 16, 16)
        noisy_BCHW = 0.0683 * pictures_BCHW + 0.9977 * noise_BCHW
        wanted = noise_BCHW if target == "noise" else 0.0683 * noise_BCHW - 0.9977 * pictures_BCHW
        predicted = unet(noisy_BCHW, 999, text_BLD.expand(4, -1, -1), return_dict=False)[0]
        optimizer.zero_grad()
        (predicted - wanted).square().mean().backward()
        optimizer.step()
    found = measure_prediction(unet, text_encoder)
    print(found)
    assert found.kind == kind


def test_the_vocabulary_is_clips_own() -> None:
    """Ids that anyone can look up: sks is one token, 48136."""
    tokenizer = load_clip_tokenizer(pad_token="<|endoftext|>")
    assert tokenizer("a photo of a sks dog").input_ids == [49406, 320, 1125, 539, 320, 48136, 1929, 49407]
    assert (len(tokenizer), tokenizer.model_max_length, tokenizer.pad_token_id) == (49408, 77, 49407)
    assert load_clip_tokenizer(pad_token="!").pad_token_id == 0


def _drop(name: str) -> Any:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if not key.startswith(name)}


def _add(name: str, shape: tuple[int, ...] = (1,)) -> Any:
    return lambda tensors: {**tensors, name: torch.ones(shape)}


INPUT = "model.diffusion_model.input_blocks"
OTHERS: dict[str, Any] = {
    "half of SDXL's two text encoders": _add("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"),
    "Stable Diffusion XL's refiner": _add("conditioner.embedders.0.model.ln_final.bias"),
    "9 channels": _add(f"{INPUT}.0.0.weight", (32, 9, 3, 3)),
    "class labels": _add("model.diffusion_model.label_emb.0.0.weight"),
    "no autoencoder": _drop("first_stage_model."),
    "no text encoder": _drop("cond_stage_model."),
    "a LoRA": lambda _: {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(1)},
    "motion modules": lambda _: {"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": torch.ones(1)},
    "parts of a diffusers folder": lambda _: make_unet(1).state_dict(),
    "no UNet": lambda _: {"something": torch.ones(1)},
    "1 keys without a place, such as stranger": _add("stranger"),
    "1 keys without a place, such as model.diffusion_model.stranger": _add("model.diffusion_model.stranger"),
    "unknown or misshapen, such as down_blocks.0.resnets.0.stranger": _add(f"{INPUT}.1.0.stranger"),
    "lacks 'model.diffusion_model.out.2.bias'": _drop("model.diffusion_model.out.2.bias"),
    "685/686 tensors of UNet2DConditionModel": _drop("model.diffusion_model.out.0.bias"),
    "247/248 tensors of AutoencoderKL": _add("first_stage_model.quant_conv.weight", (3, 3)),
    "51/52 tensors of CLIPTextModel": _drop("cond_stage_model.transformer.text_model.final_layer_norm.bias"),
}


@pytest.mark.parametrize("said", OTHERS)
def test_other_files_are_refused_by_name(small_file: Path, tmp_path: Path, said: str) -> None:
    path = tmp_path / "file.safetensors"
    tensors = OTHERS[said](load_file(small_file))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with pytest.raises(UserError, match=rf"file\.safetensors [\s\S]*{said}"):
        load_base(str(path), device=CPU)
