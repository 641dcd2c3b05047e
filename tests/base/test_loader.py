from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cdvideo.base.latents import decode_latents
from cdvideo.base.loader import TINY_BASE, load_base, weights_hash
from cdvideo.errors import UserError
from tests import sdxl

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


def test_pickled_weights_are_refused(tiny_base_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base_folder, copy)
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(UserError, match="no .safetensors"):
        load_base(str(copy), device=CPU)


def test_tiny_lies_in_the_package() -> None:
    assert TINY_BASE.parent.name == "base" and TINY_BASE.name == "tiny"


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
