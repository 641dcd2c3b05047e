"""Every kind of file with all the keys that it has for Stable Diffusion 1.5, at a tenth of the width.

Each is read whole, changes the UNet and the text as its formula says, and is refused, by the name of a key, for another
base or with one key too many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor

from cdvideo.base.loader import Base, load_base
from cdvideo.concept.adapters import text_models, tuned
from cdvideo.errors import UserError
from cdvideo.interchange.load import load_adapters
from tests.base.ldm_names import TEXT_WIDTH, make_text_encoder, save_folder
from tests.interchange.parts import changes_of, kohya_layers, random
from tests.interchange.test_lycoris import locon, loha, lokr

RANK, ALPHA = 3, 2.0
TRANSFORMERS = ("Transformer2DModel",)  # where kohya's LoRA looks unless it is asked for convolutions
TOKEN = "sks"


@dataclass
class Official:
    """A file's content, what it is to add to layers (by their names in a concept file), and the rows of its token."""

    content: Any
    changes: dict[str, Tensor] = field(default_factory=dict)
    rows_KD: Tensor | None = None


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = save_folder(tmp_path_factory.mktemp("sd15"), 1)
    make_text_encoder(1, layers=12).save_pretrained(folder / "text_encoder")
    return load_base(str(folder), device=torch.device("cpu"))


def kohya(base: Base, made: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]], classes: tuple[str, ...]) -> Official:
    content, changes = {}, {}
    for stem, (name, layer) in kohya_layers(base, classes).items():
        is_odd = any(side % 2 for side in layer.weight.shape[:2])
        parts, changes[name] = (locon if is_odd else made)(layer.weight.detach())
        content |= {f"{stem}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        content[f"{stem}.alpha"] = torch.tensor(ALPHA)
    return Official(content, changes)


def diffusers_lora(base: Base) -> Official:
    """Names and shapes are PEFT's own, for the layers that diffusers' training scripts choose."""
    content, changes = {}, {}
    targets = {"unet": ["to_q", "to_k", "to_v", "to_out.0"], "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"]}
    for part, model in (("unet", base.unet), ("text_encoder", base.text_encoder)):
        with init_empty_weights():
            copy = type(model)(model.config) if part == "text_encoder" else type(model).from_config(model.config)
        inject_adapter_in_model(LoraConfig(r=RANK, target_modules=targets[part]), copy, low_cpu_mem_usage=True)
        # transformers 5 took `text_model` out of the paths; files keep it.
        (prefix,) = text_models(base) if part == "text_encoder" else ["unet."]
        for name, parameter in copy.named_parameters():
            if "lora_" in name:
                content[prefix + name.replace(".default", "")] = random(*parameter.shape)
    for key, down in content.items():
        if ".lora_A." in key:
            up = content[key.replace(".lora_A.", ".lora_B.")]
            changes[key.removesuffix(".lora_A.weight")] = up @ down  # without settings alpha is the rank
    return Official(content, changes)


def domain_adapter(base: Base) -> Official:
    """v3_sd15_adapter.ckpt."""
    content, changes = {}, {}
    for processor in base.unet.attn_processors:
        for layer in ("to_q", "to_k", "to_v", "to_out"):
            path = f"{processor.removesuffix('.processor')}.{layer}{'.0' * (layer == 'to_out')}"
            weight = base.unet.get_submodule(path).weight
            down, up = random(RANK, weight.shape[1]), random(len(weight), RANK)
            content |= {f"{processor}.{layer}_lora.down.weight": down, f"{processor}.{layer}_lora.up.weight": up}
            changes[f"unet.{path}"] = up @ down
    return Official({"state_dict": content}, changes)


def cross_attentions(base: Base) -> list[str]:
    """K and V of each, as the paths of their layers."""
    names = [name.removesuffix(".processor") for name in base.unet.attn_processors if ".attn2." in name]
    return [f"{name}.{part}" for name in names for part in ("to_k", "to_v")]


def custom_diffusion(base: Base) -> Official:
    """pytorch_custom_diffusion_weights.bin, as diffusers' script and ClassDiffusion's write it."""
    content: dict[str, Any] = {name: {} for name in base.unet.attn_processors if ".attn1." in name}
    changes = {}
    for path in cross_attentions(base):
        weight = base.unet.get_submodule(path).weight.detach()
        attention, _, part = path.rpartition(".")
        changes[f"unet.{path}"] = random(*weight.shape)
        content[f"{attention}.processor.{part}_custom_diffusion.weight"] = weight + changes[f"unet.{path}"]
    return Official(content, changes)


def delta(base: Base, *, compressed: bool) -> Official:
    """delta.bin of the authors of Custom Diffusion."""
    weights: dict[str, Any] = {}
    changes, row_D = {}, random(TEXT_WIDTH, scale=1.0)
    for path in cross_attentions(base):
        weight = base.unet.get_submodule(path).weight.detach()
        u, v = random(len(weight), RANK), random(RANK, weight.shape[1])
        changes[f"unet.{path}"] = u @ v
        weights[f"{path}.weight"] = {"u": u, "v": v} if compressed else weight + u @ v
    return Official({"unet": weights, "modifier_token": {TOKEN: row_D}}, changes, row_D[None])


def textual_inversion(base: Base, *, web_ui: bool) -> Official:
    rows_KD = random(2, TEXT_WIDTH, scale=1.0)
    if web_ui:
        content = {"string_to_token": {"*": 265}, "string_to_param": {"*": rows_KD}, "name": TOKEN, "step": 500}
        return Official({**content, "sd_checkpoint": "cc6cb27103", "sd_checkpoint_name": "v1-5"}, rows_KD=rows_KD)
    return Official({TOKEN: rows_KD}, rows_KD=rows_KD)


FORMATS: dict[str, Callable[[Base], Official]] = {
    "kohya LoRA": lambda base: kohya(base, locon, TRANSFORMERS),
    "LoCon": lambda base: kohya(base, locon, (*TRANSFORMERS, "ResnetBlock2D", "Downsample2D", "Upsample2D")),
    "LoHa": lambda base: kohya(base, loha, TRANSFORMERS),
    "LoKr": lambda base: kohya(base, lokr, (*TRANSFORMERS, "ResnetBlock2D", "Downsample2D", "Upsample2D")),
    "diffusers LoRA": diffusers_lora,
    "domain adapter": domain_adapter,
    "Custom Diffusion": custom_diffusion,
    "delta": lambda base: delta(base, compressed=False),
    "compressed delta": lambda base: delta(base, compressed=True),
    "textual inversion": lambda base: textual_inversion(base, web_ui=False),
    "textual inversion of a web UI": lambda base: textual_inversion(base, web_ui=True),
}
# Layers that each changes in Stable Diffusion 1.5. Convolutions of LoCon: 22 resnets of three layers, 14 of them with a
# shortcut, and three samplers each way.
CONVOLUTIONS = 22 * 3 + 14 + 3 + 3
LAYERS = {"kohya LoRA": 192 + 72, "LoHa": 192 + 72, "diffusers LoRA": 128 + 48, "domain adapter": 128}
LAYERS |= {"LoCon": 192 + 72 + CONVOLUTIONS, "LoKr": 192 + 72 + CONVOLUTIONS}
LAYERS |= {"Custom Diffusion": 32, "delta": 32, "compressed delta": 32}


def count(content: Any) -> int:
    """Tensors in a file, at any depth."""
    return 1 if isinstance(content, Tensor) else sum(map(count, content.values())) if isinstance(content, dict) else 0


def write(content: Any, folder: Path) -> Path:
    """As safetensors where that can hold it."""
    flat = all(isinstance(value, Tensor) for value in content.values())
    path = folder / ("file.safetensors" if flat else "file.bin")
    save_file(content, path) if flat else torch.save(content, path)
    return path


def test_the_base_has_the_keys_of_stable_diffusion_1_5(sd15: Base) -> None:
    with init_empty_weights():
        unet = UNet2DConditionModel(cross_attention_dim=768)
    assert sd15.unet.state_dict().keys() == unet.state_dict().keys() and len(unet.state_dict()) == 686


@torch.no_grad()
@pytest.mark.parametrize("kind", FORMATS)
def test_the_whole_file_acts_as_its_formula_says(sd15: Base, tmp_path: Path, kind: str) -> None:
    official = FORMATS[kind](sd15)
    said: list[str] = []
    concept = load_adapters(sd15, [(write(official.content, tmp_path), 1.0)], report=said.append)
    tensors = count(official.content)
    assert len(said) == 1 and f"matched {tensors}/{tensors} tensors" in said[0]
    changes = changes_of(sd15, concept)
    assert len(changes) == len(official.changes) == LAYERS.get(kind, 0)
    for name, change in official.changes.items():
        torch.testing.assert_close(changes[name], change, rtol=1e-4, atol=1e-5, msg=name)
    if official.rows_KD is None:
        assert not concept.tokens
    else:
        assert torch.equal(concept.tokens[TOKEN], official.rows_KD)
    if official.changes:
        latents_BCHW, text_BLD = random(1, 4, 8, 8, scale=1.0), random(1, 5, TEXT_WIDTH, scale=1.0)
        plain = sd15.unet(latents_BCHW, 500, text_BLD).sample
        with tuned(sd15.unet, concept):
            changed = sd15.unet(latents_BCHW, 500, text_BLD).sample
        assert (changed - plain).abs().max() > 1e-3
        assert torch.equal(sd15.unet(latents_BCHW, 500, text_BLD).sample, plain), "and leaves the base as it was"


def test_files_for_another_base(sd15: Base, tiny_base: Base, tmp_path: Path) -> None:
    for kind, make in FORMATS.items():
        official = make(sd15)
        path = write(official.content, tmp_path)
        with pytest.raises(UserError, match=r"(?s)matched \d+/\d+.*--base") as refused:
            load_adapters(tiny_base, [(path, 1.0)])
        if official.changes:
            assert "no place for" in str(refused.value), kind


# What one key too many looks like in each, and where it goes; rows of tokens have no keys to be unknown.
STRANGERS = {
    "kohya LoRA": "lora_unet_mid_block_attentions_0_proj_sideways.lora_down.weight",
    "LoCon": "lora_unet_mid_block_attentions_0_proj_sideways.lora_down.weight",
    "LoHa": "lora_unet_mid_block_attentions_0_proj_sideways.hada_w1_a",
    "LoKr": "lora_unet_mid_block_attentions_0_proj_sideways.lokr_w1",
    "diffusers LoRA": "unet.mid_block.attentions.0.proj_sideways.lora_A.weight",
    "domain adapter": "mid_block.attentions.0.transformer_blocks.0.attn3.processor.to_q_lora.down.weight",
    "Custom Diffusion": "mid_block.attentions.0.transformer_blocks.0.attn3.processor.to_k_custom_diffusion.weight",
    "delta": "mid_block.attentions.0.transformer_blocks.0.attn3.to_k.weight",
    "compressed delta": "mid_block.attentions.0.transformer_blocks.0.attn3.to_k.weight",
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_one_unknown_key_is_named(sd15: Base, tmp_path: Path, kind: str) -> None:
    content = FORMATS[kind](sd15).content
    inner = content.get("state_dict", content.get("unet", content))
    inner[STRANGERS[kind]] = torch.ones(3, 3)
    with pytest.raises(UserError, match=rf"no place for {STRANGERS[kind]}"):
        load_adapters(sd15, [(write(content, tmp_path), 1.0)])
