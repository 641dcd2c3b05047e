"""What is no adapter, damaged, unsafe, for another base or without effect is refused, and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.errors import UserError
from tests.interchange.parts import (
    kohya_file,
    load,
    random,
)


def test_one_unknown_key_is_refused_by_its_name(tiny_base: Base, tmp_path: Path) -> None:
    kohya_file(tiny_base, tmp_path / "a.safetensors")
    whole = load_file(tmp_path / "a.safetensors")
    for odd in ("lora_unet_no_such_layer.lora_down.weight", "lora_unet_mid_block_resnets_0_conv1.diff"):
        save_file({**whole, odd: torch.ones(1)}, tmp_path / "odd.safetensors")
        with pytest.raises(UserError, match=rf"matched {len(whole)}/{len(whole) + 1} tensors.*no place for {odd}"):
            load(tiny_base, tmp_path / "odd.safetensors")
    first = next(key for key in whole if key.endswith("lora_up.weight"))
    save_file({key: tensor for key, tensor in whole.items() if key != first}, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=first.partition(".")[0]):
        load(tiny_base, tmp_path / "part.safetensors")


def test_files_for_another_base_are_refused(tiny_base: Base, tmp_path: Path) -> None:
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    kohya = {f"{stem}.lora_down.weight": random(2, 64), f"{stem}.lora_up.weight": random(32, 2)}
    save_file(kohya, tmp_path / "kohya.safetensors")
    name = "mid_block.attentions.0.transformer_blocks.0.attn2"
    save_file({f"{name}.processor.to_k_custom_diffusion.weight": random(32, 64)}, tmp_path / "cd.safetensors")
    torch.save({"unet": {f"{name}.to_k.weight": random(32, 64)}, "modifier_token": {}}, tmp_path / "delta.bin")
    save_file({"sks": random(1, 768)}, tmp_path / "row.safetensors")
    for file, said in (
        ("kohya.safetensors", f"matched 0/2.*no place for {stem}"),
        ("cd.safetensors", f"matched 0/1.*no place for {name}"),
        ("delta.bin", f"matched 0/1.*no place for {name}"),
        ("row.safetensors", "768 channels"),
    ):
        with pytest.raises(UserError, match=f"(?s){said}.*--base"):
            load(tiny_base, tmp_path / file)


MOTION = "down_blocks.0.motion_modules.0.temporal_transformer"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}, "SDXL"),
        ({"lora_te2_text_model_x.alpha": torch.ones(1)}, "SDXL"),
        ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.ones(1, 1)}, "SDXL"),
        ({"base_model.model.conv_in.hada_w1_a": torch.ones(1, 1)}, "a LoHa or LoKr in other names than kohya's"),
        ({"lora_unet_conv_in.oft_blocks": torch.ones(1, 1)}, "OFT"),
        ({"lora_unet_conv_in.on_input": torch.ones(1), "lora_unet_conv_in.weight": torch.ones(1)}, "IA"),
        ({"lora_unet_conv_in.a1.weight": torch.ones(1, 1)}, "GLoRA"),
        ({"model.diffusion_model.out.0.weight": torch.ones(1)}, "whole image model"),
        ({f"{MOTION}.norm.weight": torch.ones(1)}, "is motion modules of AnimateDiff[\\s\\S]*give it as --motion$"),
        (
            {f"{MOTION}.transformer_blocks.0.attention_blocks.0.processor.to_q_lora.up.weight": torch.ones(1, 1)},
            "a motion LoRA of AnimateDiff[\\s\\S]*give it as --motion-lora$",
        ),
        ({"conv_in.change": torch.ones(1, 1)}, "none of the files"),
        ({"sks": torch.ones(76, 768)}, "none of the files"),
        ({"conv_in.weight": torch.ones(1)}, "none of the files that can be read: it holds conv_in.weight"),
        ({}, "it holds nothing"),
    ],
)
def test_what_can_not_be_read_is_told_what_it_is(
    tiny_base: Base, tmp_path: Path, content: dict[str, Tensor], said: str
) -> None:
    save_file(content, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=said):
        load(tiny_base, tmp_path / "a.safetensors")


def test_a_text_encoder_of_its_own_is_refused(tiny_base: Base, tmp_path: Path) -> None:
    torch.save({"unet": {}, "modifier_token": {}, "text_encoder": {"x": torch.ones(1)}}, tmp_path / "delta.bin")
    with pytest.raises(UserError, match="text_encoder"):
        load(tiny_base, tmp_path / "delta.bin")
    torch.save({"unet": {}, "modifier_token": {"<a>": [torch.ones(768), torch.ones(1280)]}}, tmp_path / "delta.bin")
    with pytest.raises(UserError, match="SDXL"):
        load(tiny_base, tmp_path / "delta.bin")


def test_an_adapter_without_effect_is_refused(tiny_base: Base, tmp_path: Path) -> None:
    kohya_file(tiny_base, tmp_path / "a.safetensors")
    idle = {
        key: torch.zeros_like(tensor) if key.endswith("lora_up.weight") else tensor
        for key, tensor in load_file(tmp_path / "a.safetensors").items()
    }
    save_file(idle, tmp_path / "lora.safetensors")
    save_file({"sks": torch.zeros(1, 32)}, tmp_path / "row.safetensors")
    name = "mid_block.attentions.0.transformer_blocks.0.attn2"
    own = tiny_base.unet.get_submodule(name).to_k.weight.detach().clone()
    save_file({f"{name}.processor.to_k_custom_diffusion.weight": own}, tmp_path / "cd.safetensors")
    for file in ("lora", "row", "cd"):
        with pytest.raises(UserError, match="changes nothing"):
            load(tiny_base, tmp_path / f"{file}.safetensors")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_no_pickle_runs_code(tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"sks": torch.ones(1, 32), "other": Evil()}, tmp_path / "evil.bin")
    with pytest.raises(UserError, match="without running code"):
        load(tiny_base, tmp_path / "evil.bin")
    assert not (tmp_path / "ran").exists()


def test_damaged_files_and_values_are_refused(tiny_base: Base, tmp_path: Path) -> None:
    torch.save({"sks": torch.ones(1, 32)}, tmp_path / "whole.bin")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "whole.bin").read_bytes()[:-200])
    (tmp_path / "text.safetensors").write_text("hello")
    save_file({"sks": torch.full((1, 32), torch.nan)}, tmp_path / "nan.safetensors")
    for file, said in (("cut.bin", "damaged"), ("text.safetensors", "damaged"), ("nan.safetensors", "not finite")):
        with pytest.raises(UserError, match=said):
            load(tiny_base, tmp_path / file)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file of weights"):
        load(tiny_base, tmp_path / "empty")
