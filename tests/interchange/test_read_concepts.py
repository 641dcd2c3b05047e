"""Tokens and Custom Diffusion under their writers' names, and several files at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from safetensors.torch import load_file, save_file

from cdvideo.base.loader import Base
from cdvideo.errors import UserError
from cdvideo.interchange.load import load_adapters
from tests.interchange.parts import (
    PROMPT,
    Draw,
    changes_of,
    draw_with,
    kohya_file,
    load,
    random,
    save_row,
)


@pytest.mark.parametrize("form", ["diffusers", "safetensors", "tensor", "web ui", "first", "web ui safetensors"])
def test_textual_inversion(
    tiny_base: Base, tmp_path: Path, draw: Draw, pipeline: StableDiffusionPipeline, form: str
) -> None:
    rows_KD = save_row(tmp_path / "sks.xyz", form)  # told by what is in it, whatever its name
    concept = load(tiny_base, tmp_path / "sks.xyz")
    assert concept.metadata.adapter == "token" and torch.equal(concept.tokens["sks"], rows_KD)
    pipeline.load_textual_inversion({"sks": rows_KD})
    assert (draw(concept) - draw(None)).abs().max() > 1e-2
    assert (draw(concept) - draw_with(pipeline)).abs().max() <= 1e-3


@pytest.mark.parametrize(("safe", "q_out"), [(True, False), (False, False), (True, True)])
def test_custom_diffusion_of_diffusers(
    tiny_base: Base, tmp_path: Path, draw: Draw, pipeline: StableDiffusionPipeline, safe: bool, q_out: bool
) -> None:
    """As train_custom_diffusion.py leaves it, with `<new1>.bin` beside, which it fills with safetensors if `safe`."""
    unet = pipeline.unet
    processors = {}
    for name in unet.attn_processors:
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.weight.shape[0]
        processors[name] = (
            CustomDiffusionAttnProcessor(True, q_out, hidden_size=width, cross_attention_dim=32)
            if name.endswith("attn2.processor")
            else CustomDiffusionAttnProcessor(False, False, hidden_size=width, cross_attention_dim=None)
        )
    unet.set_attn_processor(processors)
    unet.save_attn_procs(tmp_path, safe_serialization=safe)
    row_D = random(32, scale=1.0)
    (save_file if safe else torch.save)({"<new1>": row_D}, tmp_path / "<new1>.bin")
    (weights_file,) = tmp_path.glob("pytorch_custom_diffusion_weights.*")
    said: list[str] = []
    concept = load_adapters(tiny_base, [(weights_file, 1.0)], report=said.append)
    count = len([name for name in tiny_base.unet.attn_processors if "attn2" in name]) * (5 if q_out else 2)
    assert [line.partition("matched ")[2] for line in said] == [f"{count}/{count} tensors", "1/1 tensors"]
    assert concept.tokens.keys() == {"<new1>"}
    assert concept.metadata.adapter == ("unet" if q_out else "kv")
    pipeline.load_textual_inversion({"<new1>": row_D})
    prompt = PROMPT.replace("sks", "<new1>")
    assert (draw(concept, prompt) - draw(None, prompt)).abs().max() > 1e-2
    assert (draw(concept, prompt) - draw_with(pipeline, prompt)).abs().max() <= 1e-3


@pytest.mark.parametrize("compressed", [False, True])
def test_the_authors_delta(tiny_base: Base, tmp_path: Path, draw: Draw, compressed: bool) -> None:
    weights: dict[str, Any] = {}
    expected = {}
    for name, parameter in tiny_base.unet.named_parameters():
        if "attn2.to_k" in name or "attn2.to_v" in name:
            u, v = random(len(parameter), 3), random(3, parameter.shape[1])
            expected[f"unet.{name}".replace(".weight", ".delta")] = u @ v
            weights[name] = {"u": u, "v": v} if compressed else parameter.detach() + u @ v
    torch.save({"unet": weights, "modifier_token": {"<new1>": random(32)}}, tmp_path / "delta.bin")
    concept = load(tiny_base, tmp_path / "delta.bin")
    assert concept.metadata.adapter == "kv" and concept.tokens["<new1>"].shape == (1, 32)
    assert concept.weights.keys() == expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(concept.weights[name], change, rtol=1e-4, atol=1e-6)
    assert (draw(concept) - draw(None)).abs().max() > 1e-2


def test_a_word_of_the_base_is_warned_of(tiny_base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"dog": random(1, 32)}, tmp_path / "a.safetensors")
    load(tiny_base, tmp_path / "a.safetensors")
    assert "calls its token 'dog'" in caplog.text


def test_several_with_weights(tiny_base: Base, tmp_path: Path) -> None:
    expected = kohya_file(tiny_base, tmp_path / "a.safetensors")
    save_row(tmp_path / "sks.pt", "diffusers")
    half = {key: tensor for key, tensor in load_file(tmp_path / "a.safetensors").items() if "lora_unet_mid" in key}
    save_file(half, tmp_path / "b.safetensors")
    files = [(tmp_path / "a.safetensors", 0.5), (tmp_path / "sks.pt", 1.0), (tmp_path / "b.safetensors", -2.0)]
    concept = load_adapters(tiny_base, files)
    assert concept.tokens.keys() == {"sks"} and concept.metadata.adapter == "lora"
    for name, change in changes_of(tiny_base, concept).items():
        factor = 0.5 - 2.0 if name.startswith("unet.mid") else 0.5
        torch.testing.assert_close(change, factor * expected[name][1], rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="token alone"):
        load_adapters(tiny_base, [(tmp_path / "sks.pt", 0.5)])


def test_files_of_torch_s_first_form(tiny_base: Base, tmp_path: Path) -> None:
    torch.save({"sks": random(1, 32)}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    assert (tmp_path / "a.bin").read_bytes()[:1] == b"\x80"
    assert load(tiny_base, tmp_path / "a.bin").tokens.keys() == {"sks"}


def test_a_length_that_looks_like_a_pickle(tiny_base: Base, tmp_path: Path) -> None:
    """Safetensors begin with the length of their header; 128, 0x80, is how pickles begin."""
    for spaces in range(256):
        save_file({"sks": random(1, 32)}, tmp_path / "a.safetensors", metadata={"told": " " * spaces})
        if (tmp_path / "a.safetensors").read_bytes()[0] == 0x80:
            break
    assert (tmp_path / "a.safetensors").read_bytes()[:1] == b"\x80"
    assert load(tiny_base, tmp_path / "a.safetensors").tokens.keys() == {"sks"}
