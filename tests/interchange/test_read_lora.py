"""LoRA files under the names their own writers give them: every key has its place, and acts as the formula says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

from cdvideo.base.loader import Base
from cdvideo.interchange.adapter import read_adapter
from cdvideo.interchange.files import read_foreign
from cdvideo.interchange.load import load_adapters
from cdvideo.interchange.lora import adaptable_layers
from cdvideo.interchange.names import kohya_name
from tests.interchange.parts import (
    Draw,
    changes_of,
    draw_with,
    kohya_file,
    load,
    random,
)


def test_kohya_with_every_layer_it_trains(tiny_base: Base, tmp_path: Path, draw: Draw) -> None:
    expected = kohya_file(tiny_base, tmp_path / "a.safetensors")
    said: list[str] = []
    concept = load_adapters(tiny_base, [(tmp_path / "a.safetensors", 1.0)], report=said.append)
    count = 3 * len(expected)
    assert said == [f"kohya LoRA {tmp_path / 'a.safetensors'}: matched {count}/{count} tensors"]
    changes = changes_of(tiny_base, concept)
    assert changes.keys() == expected.keys() and any(name.startswith("text_encoder.") for name in changes)
    for name, (stem, change) in expected.items():
        torch.testing.assert_close(changes[name], change, rtol=1e-4, atol=1e-5, msg=stem)

    plain, tuned = draw(None), draw(concept)
    with torch.no_grad():  # the reference: written into the weights
        for name, layer in adaptable_layers(tiny_base).items():
            if name in expected:
                layer.weight += expected[name][1]
    assert (tuned - plain).abs().max() > 1e-2
    torch.testing.assert_close(draw(None), tuned, rtol=1e-3, atol=1e-4)


def test_locon_in_three_parts_folds(tiny_base: Base, tmp_path: Path) -> None:
    conv = tiny_base.unet.down_blocks[0].resnets[0].conv1
    down = nn.Conv2d(conv.in_channels, 4, 1, bias=False)
    mid, up = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, conv.out_channels, 1, bias=False)
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    parts = {"lora_down.weight": down.weight, "lora_mid.weight": mid.weight, "lora_up.weight": up.weight}
    tensors = {f"{stem}.{part}": weight.detach() for part, weight in parts.items()}
    save_file({**tensors, f"{stem}.alpha": torch.tensor(2.0)}, tmp_path / "a.safetensors")
    (change,) = changes_of(tiny_base, load(tiny_base, tmp_path / "a.safetensors")).values()
    pixels_BCHW = torch.randn(2, conv.in_channels, 8, 8)
    expected = 2.0 / 4 * up(mid(down(pixels_BCHW)))
    torch.testing.assert_close(nn.functional.conv2d(pixels_BCHW, change, padding=1), expected, rtol=1e-4, atol=1e-5)


def test_lycoris_magnitudes_of_the_outputs(tiny_base: Base, tmp_path: Path) -> None:
    """DoRA (arXiv 2402.09353, eq. 5) as LyCORIS keeps it, beside a LoRA: that is what peft calls DoRA."""
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    weight = tiny_base.unet.get_submodule(path).weight.detach()
    stem = kohya_name(f"unet.{path}")
    factors = {"lora_down.weight": random(2, weight.shape[1]), "lora_up.weight": random(len(weight), 2)}
    magnitude = random(len(weight), 1).abs()
    tensors = {f"{stem}.{part}": tensor.half() for part, tensor in factors.items()}
    save_file({**tensors, f"{stem}.dora_scale": magnitude.clone()}, tmp_path / "out.safetensors")
    (change,) = changes_of(tiny_base, load(tiny_base, tmp_path / "out.safetensors")).values()
    merged = weight + factors["lora_up.weight"] @ factors["lora_down.weight"]
    expected = magnitude * merged / merged.norm(dim=1, keepdim=True)
    torch.testing.assert_close(weight + change, expected, rtol=2e-3, atol=2e-3)


def test_what_diffusers_saves_acts_as_it_does_there(
    tiny_base: Base, tmp_path: Path, draw: Draw, pipeline: StableDiffusionPipeline
) -> None:
    """`save_lora_weights` with the metadata that holds alpha, of UNet and text encoder."""
    settings = {
        "unet": LoraConfig(r=3, lora_alpha=7, target_modules=["to_q", "to_v", "conv1"], alpha_pattern={"conv1": 2}),
        "text_encoder": LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "fc1"], use_rslora=True),
    }
    save_tuned(pipeline, settings, tmp_path, with_metadata=True)
    concept = load(tiny_base, tmp_path / "pytorch_lora_weights.safetensors")
    ours, theirs, plain = draw(concept), draw_with(pipeline), draw(None)
    assert (ours - plain).abs().max() > 1e-2
    assert (ours - theirs).abs().max() <= 1e-3


def save_tuned(pipeline: Any, settings: dict[str, LoraConfig], folder: Path, *, with_metadata: bool) -> None:
    """Puts adapters with random weights into the pipeline and saves them as diffusers does."""
    factors = {}
    for model, config in settings.items():
        inject_adapter_in_model(config, getattr(pipeline, model))  # what the models' own add_adapter calls
        for name, parameter in getattr(pipeline, model).named_parameters():
            if "lora_" in name:
                parameter.data = random(*parameter.shape)
        factors[f"{model}_lora_layers"] = get_peft_model_state_dict(getattr(pipeline, model))
    metadata = {f"{model}_lora_adapter_metadata": config.to_dict() for model, config in settings.items()}
    pipeline.save_lora_weights(folder, **factors, **(metadata if with_metadata else {}))


OLD_NAMES = {
    "newest": ("unet.{path}.{layer}.lora_A.weight", "unet.{path}.{layer}.lora_B.weight"),
    "new": ("unet.{path}.{layer}.lora.down.weight", "unet.{path}.{layer}.lora.up.weight"),
    "old": ("unet.{path}.processor.{short}_lora.down.weight", "unet.{path}.processor.{short}_lora.up.weight"),
    "oldest": ("{path}.processor.{short}_lora.down.weight", "{path}.processor.{short}_lora.up.weight"),
}


@pytest.mark.parametrize("era", OLD_NAMES)
def test_diffusers_names_of_all_times(
    tiny_base: Base, tmp_path: Path, draw: Draw, pipeline: StableDiffusionPipeline, era: str
) -> None:
    down_key, up_key = OLD_NAMES[era]
    tensors = {}
    for path in (name.removesuffix(".processor") for name in tiny_base.unet.attn_processors):
        for layer in ("to_q", "to_k", "to_v", "to_out.0"):
            weight = tiny_base.unet.get_submodule(f"{path}.{layer}").weight
            names = {"path": path, "layer": layer, "short": layer.removesuffix(".0")}
            tensors[down_key.format(**names)] = random(4, weight.shape[1])
            tensors[up_key.format(**names)] = random(len(weight), 4)
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    concept = load(tiny_base, tmp_path / "pytorch_lora_weights.safetensors")
    assert len(concept.weights) == len(tensors)
    named = {key if key.startswith("unet.") else f"unet.{key}": tensor for key, tensor in tensors.items()}
    pipeline.load_lora_weights(named)
    assert (draw(concept) - draw(None)).abs().max() > 1e-2
    assert (draw(concept) - draw_with(pipeline)).abs().max() <= 1e-3


def test_old_names_of_the_text_encoder(tiny_base: Base, tmp_path: Path) -> None:
    layer = "text_encoder.text_model.encoder.layers.0.self_attn"
    tensors = {f"{layer}.to_q_lora.down.weight": random(2, 32), f"{layer}.to_q_lora.up.weight": random(32, 2)}
    tensors |= {f"{layer}.out_proj.lora_linear_layer.down.weight": random(2, 32)}
    tensors |= {f"{layer}.out_proj.lora_linear_layer.up.weight": random(32, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert changes_of(tiny_base, load(tiny_base, tmp_path / "a.safetensors")).keys() == {
        f"{layer}.q_proj",
        f"{layer}.out_proj",
    }


def test_what_peft_saves(tiny_base: Base, tmp_path: Path, pipeline: StableDiffusionPipeline, draw: Draw) -> None:
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["to_k", "ff.net.2"], rank_pattern={"to_k": 2})
    tuned = get_peft_model(pipeline.unet, config)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = random(*parameter.shape)
    tuned.save_pretrained(tmp_path)
    concept = load(tiny_base, tmp_path)
    assert (draw(concept) - draw(None)).abs().max() > 1e-2
    assert (draw(concept) - draw_with(pipeline)).abs().max() <= 1e-3


def test_alpha_of_peft_by_pattern(tiny_base: Base, tmp_path: Path) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    settings = {"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn2.to_k": 6}, "unet.r": 2}
    factors = {f"unet.{name}.lora_A.weight": random(2, 32), f"unet.{name}.lora_B.weight": random(32, 2)}
    save_file(factors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(settings)})
    kind, read, adapter = read_adapter(read_foreign(tmp_path / "a.safetensors"), tiny_base)
    assert kind == "lora" and adapter == {"rank": 2, "alpha": 6.0, "dora": False} and read.keys() == factors.keys()


def domain_adapter(base: Base) -> dict[str, Tensor]:
    """Under the names of v3_sd15_adapter.ckpt: q, k, v and out of every attention, without an alpha."""
    tensors = {}
    for name in base.unet.attn_processors:
        for layer in ("to_q", "to_k", "to_v", "to_out"):
            path = f"{name.removesuffix('.processor')}.{layer}{'.0' * (layer == 'to_out')}"
            weight = base.unet.get_submodule(path).weight
            tensors[f"{name}.{layer}_lora.down.weight"] = random(4, weight.shape[1])
            tensors[f"{name}.{layer}_lora.up.weight"] = random(len(weight), 4)
    return tensors


@pytest.mark.parametrize("wrapping", ["plain", "state_dict", "module"])
def test_the_domain_adapter_of_animatediff_v3(tiny_base: Base, tmp_path: Path, draw: Draw, wrapping: str) -> None:
    tensors = domain_adapter(tiny_base)
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight" in tensors
    start = "module." if wrapping == "module" else ""
    content: dict[str, Any] = {start + name: tensor for name, tensor in tensors.items()}
    if wrapping != "plain":
        content = {"state_dict": content, "global_step": 5, "animatediff_config": {"motion": None}}
    torch.save(content, tmp_path / "v3_sd15_adapter.ckpt")
    said: list[str] = []
    concept = load_adapters(tiny_base, [(tmp_path / "v3_sd15_adapter.ckpt", 1.0)], report=said.append)
    assert f"matched {len(tensors)}/{len(tensors)} tensors" in said[0]
    changes = changes_of(tiny_base, concept)
    assert len(changes) == len(tensors) // 2
    for name, tensor in tensors.items():  # as AnimateDiff's own loader adds it: W + up down
        if ".down." in name:
            layer = name.replace("processor.", "").replace("_lora.down.weight", "").replace("to_out", "to_out.0")
            expected = tensors[name.replace(".down.", ".up.")] @ tensor
            torch.testing.assert_close(changes[f"unet.{layer}"], expected, rtol=1e-4, atol=1e-5)
    assert (draw(concept) - draw(None)).abs().max() > 1e-2
