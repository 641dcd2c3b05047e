from __future__ import annotations

import functools
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from cdvideo.base.latents import decode_latents
from cdvideo.base.loader import TINY_BASE, load_base, weights_hash
from cdvideo.errors import UserError
from tests import sdxl
from tests.base.ldm_names import save_folder

CPU = torch.device("cpu")


@pytest.fixture
def libraries_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What diffusers and transformers say; they keep it from the root logger."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield caplog
    for logger in loggers:
        logger.removeHandler(caplog.handler)


def test_a_folder_loads_frozen_in_eval_mode(tiny_base_folder: Path) -> None:
    base = load_base(str(tiny_base_folder), device=CPU, dtype=torch.bfloat16)
    assert base.resolution == 64 and base.path == tiny_base_folder
    assert base.scheduler_config["prediction_type"] == "v_prediction"
    for module in (base.unet, base.vae, base.text_encoder):
        assert not module.training
        assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in module.parameters())
    assert base.to(CPU, torch.float32).unet.dtype == torch.float32 and base.dtype == torch.float32


def test_loading_says_nothing(libraries_log: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    base = load_base("tiny", device=CPU, dtype=torch.bfloat16)
    base.to(CPU, torch.float32)
    assert {p.dtype for m in (base.unet, base.vae, base.text_encoder) for p in m.parameters()} == {torch.float32}
    assert (libraries_log.text, *capfd.readouterr()) == ("", "", "")


def test_what_libraries_warn_of_still_comes_through(
    tiny_base_folder: Path, tmp_path: Path, libraries_log: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base_folder, copy)
    config = copy / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "stray": 1}))
    load_base(str(copy), device=CPU)
    assert "'stray': 1" in libraries_log.text


def test_the_hash_tells_weights_apart(tiny_base_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base_folder, copy)
    before = weights_hash(copy)
    assert before == weights_hash(tiny_base_folder) and len(before) == 16
    (copy / "scheduler" / "scheduler_config.json").touch()
    assert weights_hash(copy) == before
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.bias"][0] += 1
    save_file(weights, file, metadata={"format": "pt"})
    assert weights_hash(copy) != before


@pytest.mark.parametrize("name", ["no/such/folder", "./nothing-here", "nowhere"])
def test_an_unknown_base_is_told(name: str) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_base(name, device=CPU)


def test_a_missing_part_is_named(tiny_base_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base_folder, copy)
    shutil.rmtree(copy / "vae")
    with pytest.raises(UserError, match="has no folder 'vae'"):
        load_base(str(copy), device=CPU)


def test_the_sampler_s_file_of_stable_diffusion_1_5_which_names_no_prediction(
    tiny_base_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base_folder, copy)
    told = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_start": 0.00085}
    told |= {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "set_alpha_to_one": False}
    told |= {"skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False}
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(told))
    base = load_base(str(copy), device=CPU)
    assert base.scheduler_config["prediction_type"] == "epsilon"


def test_a_model_for_inpainting_is_told(tiny_base_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base_folder, copy)
    config = copy / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "in_channels": 9}))
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.weight"] = torch.cat([tensors["conv_in.weight"]] * 3, dim=1)[:, :9].contiguous()
    save_file(tensors, weights)
    with pytest.raises(UserError, match=r"reads 9 channels, its VAE has 4[\s\S]*inpainting"):
        load_base(str(copy), device=CPU)


def test_a_hub_that_can_not_be_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **_: object) -> str:
        raise OSError(f"no network to fetch {name}\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"'some/model' can not be had from the hub \(no network to fetch some/model\)"):
        load_base("some/model", device=CPU)


def test_pickled_weights_are_refused(tiny_base_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base_folder, copy)
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(UserError, match="no .safetensors"):
        load_base(str(copy), device=CPU)


def test_tiny_lies_in_the_package() -> None:
    assert TINY_BASE.parent.name == "base" and TINY_BASE.name == "tiny"


# stable-diffusion-v1-5 on the hub, and what other repositories have beside.
LOADED = """
model_index.json
scheduler/scheduler_config.json
text_encoder/config.json
text_encoder/model.safetensors
tokenizer/merges.txt
tokenizer/special_tokens_map.json
tokenizer/tokenizer_config.json
tokenizer/vocab.json
unet/config.json
unet/diffusion_pytorch_model.safetensors
vae/config.json
vae/diffusion_pytorch_model.safetensors
""".split()
NOT_LOADED = """
.gitattributes
README.md
feature_extractor/preprocessor_config.json
safety_checker/config.json
safety_checker/model.safetensors
text_encoder/flax_model.msgpack
text_encoder/model.fp16.safetensors
text_encoder/model.onnx
text_encoder/openvino_model.bin
text_encoder/openvino_model.xml
text_encoder/pytorch_model.bin
text_encoder/pytorch_model.fp16.bin
unet/diffusion_pytorch_model.bin
unet/diffusion_pytorch_model.fp16.safetensors
unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors
unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors
unet/diffusion_pytorch_model.non_ema.safetensors
unet/model.onnx
unet/model.onnx_data
v1-5-pruned-emaonly.safetensors
v1-5-pruned.ckpt
vae/diffusion_pytorch_model.fp16.bin
vae/diffusion_pytorch_model.fp16.safetensors
vae_decoder/model.onnx
""".split()
SHARDS = [f"unet/diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
SHARDS += ["unet/diffusion_pytorch_model.safetensors.index.json"]


def test_of_the_hub_only_what_is_loaded_is_fetched(
    tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, list[str]] = {}

    def answer(name: str, *, allow_patterns: list[str]) -> str:
        """As the hub: of all the files only those that match; here they are the tiny base's."""
        asked[name] = list(filter_repo_objects([*LOADED, *NOT_LOADED, *SHARDS], allow_patterns=allow_patterns))
        for file in asked[name]:
            if (tiny_base_folder / file).is_file():
                (tmp_path / file).parent.mkdir(exist_ok=True)
                shutil.copy(tiny_base_folder / file, tmp_path / file)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    monkeypatch.chdir(tmp_path)
    base = load_base("stable-diffusion-v1-5/stable-diffusion-v1-5", device=CPU)
    assert sorted(asked["stable-diffusion-v1-5/stable-diffusion-v1-5"]) == sorted([*LOADED, *SHARDS])
    assert base.hash == weights_hash(tiny_base_folder), "enough to load it whole"


def test_variants_beside_the_weights_do_not_matter(tiny_base_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base_folder, copy)
    before = weights_hash(copy)
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert weights_hash(copy) == before
    shutil.copy(file, file.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    assert weights_hash(copy) == before


def test_sdxl_loads_with_both_text_encoders(sdxl_folder: Path) -> None:
    said: list[str] = []
    base = load_base(str(sdxl_folder), device=CPU, dtype=torch.bfloat16, report=said.append)
    assert base.is_sdxl and base.zero_empty_prompt and base.resolution == 1024
    assert base.tokenizer_2 is not None and base.tokenizer_2.pad_token == "!"
    assert len(base.modules) == 4 and list(base.text_encoders) == ["text_encoder", "text_encoder_2"]
    for module in base.modules:
        assert not module.training
        assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in module.parameters())
    count = len(base.text_encoders["text_encoder_2"].state_dict())
    assert "SDXL, a folder" in said[0] and f"second text encoder {count}/{count}" in said[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sdxls_vae_is_kept_from_overflow(sdxl_folder: Path, dtype: torch.dtype) -> None:
    """The VAE alone leaves float16, where its config asks for it; loaded so, and moved so."""
    base = load_base(str(sdxl_folder), device=CPU, dtype=dtype)
    safe = torch.float32 if dtype == torch.float16 else dtype
    assert (base.vae.dtype, base.unet.dtype, base.dtype) == (safe, dtype, dtype)
    assert base.to(CPU, torch.float16).vae.dtype == torch.float32
    for parameter in base.vae.decoder.conv_in.parameters():
        parameter.data *= 3e5  # beyond 65,504, and brought back by the next GroupNorm
    pixels_BCHW = decode_latents(base.vae, torch.ones(1, 4, 4, 4))
    assert pixels_BCHW.isfinite().all()
    base.vae.register_to_config(force_upcast=False)  # as sdxl-vae-fp16-fix has it
    assert base.to(CPU, torch.float16).vae.dtype == torch.float16


def test_sdxls_vae_is_never_rounded_to_float16(sdxl_folder: Path) -> None:
    whole, half = (load_base(str(sdxl_folder), device=CPU, dtype=dtype) for dtype in (torch.float32, torch.float16))
    assert torch.equal(half.vae.decoder.conv_in.weight, whole.vae.decoder.conv_in.weight)


def test_the_attention_s_first_names_are_known(tmp_path: Path) -> None:
    """As the VAE in the folder of Stable Diffusion 1.5 has them."""
    folder = save_folder(tmp_path / "sd1", 1)
    expected = load_base(str(folder), device=CPU).vae.state_dict()
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights = load_file(file)
    old = {functools.reduce(lambda n, r: n.replace(*r), names.items(), name): t for name, t in weights.items()}
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in old
    save_file({name: tensor.clone() for name, tensor in old.items()}, file)
    found = load_base(str(folder), device=CPU).vae.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda w: {**w, "stranger": torch.ones(1)}, r"the UNet in .*: 1 unexpected \(such as stranger\)"),
        (lambda w: {k: v for k, v in w.items() if k != "conv_in.bias"}, r"1 missing \(such as conv_in.bias\)"),
        (lambda w: {**w, "conv_in.bias": torch.ones(3)}, r"1 mismatched \(such as conv_in.bias\)"),
    ],
)
def test_a_folder_whose_weights_do_not_fit_is_told(
    tiny_base_folder: Path, tmp_path: Path, damage: Any, said: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base_folder, copy)
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(damage(load_file(file)), file)
    with pytest.raises(UserError, match=said):
        load_base(str(copy), device=CPU)


def test_stable_diffusion_1_keeps_its_vae_in_half_precision(tiny_base_folder: Path) -> None:
    assert load_base(str(tiny_base_folder), device=CPU, dtype=torch.float16).vae.dtype == torch.float16


def test_the_hash_counts_the_second_text_encoder(sdxl_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(sdxl_folder, copy)
    before = weights_hash(copy)
    file = copy / "text_encoder_2" / "model.safetensors"
    weights = load_file(file)
    weights["text_projection.weight"][0] += 1
    save_file(weights, file, metadata={"format": "pt"})
    assert weights_hash(copy) != before == weights_hash(sdxl_folder)


def test_sdxl_without_its_second_text_encoder_is_told(sdxl_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(sdxl_folder, copy)
    shutil.rmtree(copy / "text_encoder_2")
    with pytest.raises(UserError, match="has no folder 'text_encoder_2'"):
        load_base(str(copy), device=CPU)


def test_a_unet_that_reads_other_sizes_is_told(sdxl_folder: Path, tmp_path: Path) -> None:
    """As SDXL's refiner: five numbers beside the pooled text."""
    copy = tmp_path / "copy"
    shutil.copytree(sdxl_folder, copy)
    sdxl.make_unet(projection_class_embeddings_input_dim=96 + 5 * 32).save_pretrained(copy / "unet")
    with pytest.raises(UserError, match="reads 256 numbers beside the text, as SDXL's refiner"):
        load_base(str(copy), device=CPU)
