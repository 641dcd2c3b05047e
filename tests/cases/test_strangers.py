"""What is no adapter for these bases is told what it is, with a way out; no file takes more than it holds."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cdvideo.base.checkpoint import read_content
from cdvideo.base.loader import Base
from cdvideo.errors import UserError
from cdvideo.interchange.files import READABLE
from cdvideo.interchange.inspect import describe
from tests.interchange.parts import load, random

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 64
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"
BYTES = {
    "a web page": b"\n<!DOCTYPE html><html><head></head></html>",
    "a Git LFS pointer": LFS,
    "a PNG picture": PNG,
    "a JPEG picture": b"\xff\xd8\xff\xe0" + b"\0" * 64,
    "a gzip archive": b"\x1f\x8b\x08" + b"\0" * 64,
    "a film or a HEIC": b"\0\0\0\x18ftypheic" + b"\0" * 64,
    "a JSON text": b'{"error": "not found"}',
    "a GGUF file": b"GGUF" + b"\0" * 64,
    "a text": b"see the other file\n",
}


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".ckpt"])
@pytest.mark.parametrize("what", BYTES)
def test_by_its_first_bytes(tiny_base: Base, tmp_path: Path, what: str, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(BYTES[what])
    with pytest.raises(UserError, match=f"can not be read: it is {what}") as refused:
        load(tiny_base, path)
    assert "fetch it again" not in refused.value.do and refused.value.do not in refused.value.allowed


PAIR = ("lora_A.weight", "lora_B.weight")


def lora(stem: str) -> dict[str, Any]:
    return {f"{stem}.{end}": random(2, 8) for end in PAIR}


KINDS: dict[str, dict[str, Any]] = {
    "a LoRA for a transformer, Flux": lora("transformer.single_transformer_blocks.0.attn.to_q"),
    "a LoRA for a transformer, Flux or": {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": random(2, 8),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": random(2, 8),
    },
    "a LoRA for a transformer, SD3": lora("transformer.transformer_blocks.0.attn.add_k_proj.x"),
    r"a LoRA for a transformer \(": lora("transformer.transformer_blocks.0.attn.to_q"),
    "a LoRA for a transformer, Wan": lora("diffusion_model.blocks.0.cross_attn.k"),
    "a LoRA for T5": lora("base_model.model.decoder.block.0.layer.0.SelfAttention.q"),
    "a LoRA for a language model": lora("base_model.model.model.layers.0.self_attn.q_proj"),
    "a LoRA for a film model": lora("unet.down_blocks.0.temp_attentions.0.transformer_blocks.0.attn1.to_q"),
    "a LoRA for a model that is no UNet": lora("base_model.model.bert.pooler.dense"),
    "a hypernetwork": {"768": [{"linear.0.weight": random(4, 4)}], "320": [{"linear.0.weight": random(4, 4)}]},
    "a whole text encoder": {"text_model.embeddings.token_embedding.weight": random(9, 8)},
    "a VAE": {"first_stage_model.encoder.down.0.block.0.conv1.weight": random(2, 2, 3, 3)},
    "a whole UNet": {"conv_in.weight": random(2, 2, 3, 3), "down_blocks.0.resnets.0.conv1.weight": random(2, 2, 3, 3)},
    "an IP-Adapter": {"image_proj.norm.weight": random(4)},
    "a ControlNet": {"controlnet_cond_embedding.conv_in.weight": random(2, 2, 3, 3)},
    "the state of a learning-rate scheduler": {"last_epoch": 5, "base_lrs": [0.1], "x": random(1)},
    "a list of 2 entries": [1, "two"],  # type: ignore[dict-item]
    "a int in place": 5,  # type: ignore[dict-item]
    "a str in place": "hello",  # type: ignore[dict-item]
    "a NoneType in place": None,  # type: ignore[dict-item]
}


@pytest.mark.parametrize("what", KINDS)
def test_by_its_keys(tiny_base: Base, tmp_path: Path, what: str) -> None:
    torch.save(KINDS[what], tmp_path / "a.pt")
    for read in (lambda: load(tiny_base, tmp_path / "a.pt"), lambda: describe(tmp_path / "a.pt")):
        with pytest.raises(UserError, match=what) as refused:
            read()
        assert "--base that the file was made for" not in refused.value.do
        assert refused.value.allowed == READABLE and refused.value.do not in READABLE


def endless_list() -> Any:
    content: list[Any] = []
    content.append(content)
    return content


def endless_state() -> Any:
    content: dict[str, Any] = {}
    content["state_dict"] = content
    return content


def billions() -> Any:
    content: Any = [torch.ones(1)]
    for _ in range(12):
        content = [content] * 10
    return {"x": content}


BOMBS: dict[str, Callable[[], Any]] = {
    "a list in itself": endless_list,
    "a state_dict in itself": endless_state,
    "lists of lists": billions,
    "one number 4e8 times": lambda: {"sks": torch.ones(1).expand(4 * 10**8)},
    "one number 1e15 times": lambda: {"sks": torch.ones(1).as_strided((10**15,), (0,))},
    "a sparse tensor": lambda: {"sks": torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (10**9,))},
    "a tensor without numbers": lambda: {"sks": torch.empty(10**9, device="meta")},
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_no_pickle_takes_more_than_it_holds(tmp_path: Path, bomb: str) -> None:
    torch.save(BOMBS[bomb](), tmp_path / "a.pt")
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(UserError, match="can not be read"):
        read_content(tmp_path / "a.pt")
    assert time.perf_counter() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500e3


def test_inspecting_tells_what_its_owner_asks(tmp_path: Path) -> None:
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    lokr = {f"{stem}.lokr_w1": random(4, 4), f"{stem}.lokr_w2_a": random(8, 2), f"{stem}.lokr_w2_b": random(2, 8)}
    header = {"ss_training_comment": "trigger word is sks", "ss_sd_model_name": "v1-5.safetensors"}
    save_file({**lokr, f"{stem}.alpha": torch.tensor(2.0)}, tmp_path / "a.safetensors", metadata=header)
    said = "\n".join(describe(tmp_path / "a.safetensors"))
    assert "LoKr of 1 layers" in said and "alpha: 2.0 in 1 layers" in said and "trigger word is sks" in said
    assert "reads text" not in said, "a factor's width is not the text's"
    path = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    save_file(
        {f"{path}.lora_A.weight": random(2, 768), f"{path}.lora_B.weight": random(8, 2)},
        tmp_path / "adapter_model.safetensors",
    )
    assert "alpha: unknown" in "\n".join(describe(tmp_path / "adapter_model.safetensors"))
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 16, "base_model_name_or_path": "me/sd15"}')
    said = "\n".join(describe(tmp_path / "adapter_model.safetensors"))
    assert "alpha: 16" in said and "base: me/sd15" in said and "reads text of 768 channels" in said
