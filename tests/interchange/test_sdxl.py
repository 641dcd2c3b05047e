"""Adapters of SDXL both ways: kohya's and diffusers' names, rows for two encoders; diffusers reads what we write."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cdvideo.base.loader import Base, load_base
from cdvideo.concept.adapters import delta_name, parameter_changes, text_changes, text_models
from cdvideo.concept.concept import Concept
from cdvideo.errors import UserError
from cdvideo.interchange.inspect import describe
from cdvideo.interchange.load import load_adapters
from cdvideo.interchange.lora import adaptable_layers
from cdvideo.interchange.sdxl import kohya_name, made_for, sgm_name
from cdvideo.interchange.write import (
    Export,
    write_cdvideo,
    write_custom_diffusion,
    write_diffusers,
    write_kohya,
    write_textual_inversion,
)
from cdvideo.sampling.denoise import draw_noise
from cdvideo.sampling.image import sample_images
from tests.base.ldm_names import unet_name
from tests.interchange.parts import learned
from tests.sdxl import WIDTHS, make_unet, peer_parts

CPU = torch.device("cpu")
PROMPT = "a photo of the sks dog surfing"
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

# As kohya's scripts write them for SDXL (networks/lora.py).
OFFICIAL = """
lora_unet_input_blocks_4_1_proj_in
lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q
lora_unet_input_blocks_8_1_transformer_blocks_2_attn2_to_out_0
lora_unet_middle_block_1_transformer_blocks_2_ff_net_0_proj
lora_unet_output_blocks_0_1_transformer_blocks_0_ff_net_2
lora_unet_output_blocks_5_1_proj_out
lora_te1_text_model_encoder_layers_0_mlp_fc1
lora_te1_text_model_encoder_layers_2_self_attn_q_proj
lora_te2_text_model_encoder_layers_0_self_attn_out_proj
lora_te2_text_model_encoder_layers_2_mlp_fc2
""".split()


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.1


def trained_layers(base: Base) -> dict[str, nn.Module]:
    """What kohya's scripts train in SDXL: all layers of the attentions, and those of both text encoders."""
    layers = {name: layer for name, layer in adaptable_layers(base).items() if ".attentions." in name}
    for prefix, encoder in text_models(base).items():
        layers |= {prefix + n: m for n, m in encoder.named_modules() if n.endswith(TEXT_LAYERS)}
    return layers


def write_lora(base: Base, path: Path, naming: Callable[[str], str]) -> dict[str, Tensor]:
    """A LoRA of kohya's of all layers it trains; returns what it is to change."""
    tensors, expected = {}, {}
    for number, (name, layer) in enumerate(trained_layers(base).items()):
        assert isinstance(layer, nn.Linear)
        rank, alpha = 1 + number % 3, float(1 + number % 2)
        down, up = random(rank, layer.in_features), random(layer.out_features, rank)
        stem = naming(name)
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        expected[f"{name}.delta"] = alpha / rank * up @ down
    save_file(tensors, path)
    return expected


def changes_of(base: Base, concept: Concept) -> dict[str, Tensor]:
    changes = {delta_name(name): change for name, change in parameter_changes(base.unet, concept).items()}
    return changes | text_changes(base, concept)


def with_text(base: Base, concept: Concept) -> Concept:
    """The LoRA changes both text encoders too."""
    factors = {}
    for prefix, encoder in text_models(base).items():
        for name, layer in encoder.named_modules():
            if name.endswith(TEXT_LAYERS) and isinstance(layer, nn.Linear):
                factors[f"{prefix}{name}.lora_A.weight"] = random(2, layer.in_features)
                factors[f"{prefix}{name}.lora_B.weight"] = random(layer.out_features, 2)
    return dataclasses.replace(concept, weights={**concept.weights, **factors})


@pytest.fixture
def draw(tiny_sdxl: Base, monkeypatch: pytest.MonkeyPatch) -> Callable[[Concept | None], Tensor]:
    monkeypatch.setattr("cdvideo.sampling.image.decode_latents", lambda _vae, latents_BCHW, chunk: latents_BCHW)

    def draw(concept: Concept | None) -> Tensor:
        options: dict[str, Any] = {"guidance": 4.0, "steps": 2, "width": 64, "height": 64}
        return sample_images(tiny_sdxl, [PROMPT], seeds=[5], concept=concept, **options)

    return draw


@torch.no_grad()
def draw_with(pipeline: StableDiffusionXLPipeline) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"guidance_scale": 4.0, "num_inference_steps": 2, "width": 64, "height": 64}
    return pipeline(PROMPT, latents=draw_noise([5], (4, 8, 8)), output_type="latent", **options).images


@pytest.fixture
def pipeline(sdxl_folder: Path) -> StableDiffusionXLPipeline:
    base = load_base(str(sdxl_folder), device=CPU)
    return StableDiffusionXLPipeline(**peer_parts(base), add_watermarker=False)


def test_layers_have_the_names_of_the_first_layout() -> None:
    """Each of the UNet's layers, against diffusers' conversion in the other direction and the test's own table."""
    unet = make_unet()
    weights = unet.state_dict()
    layers = {name: name.rpartition(".")[0] for name in weights}
    for name, layer in layers.items():
        assert sgm_name(layer) == unet_name(name, xl=True).rpartition(".")[0]
    file = {f"model.diffusion_model.{sgm_name(layers[n])}.{n.rpartition('.')[2]}": t for n, t in weights.items()}
    back = convert_ldm_unet_checkpoint(file, unet.config)
    assert back.keys() == weights.keys()
    assert all(back[name].data_ptr() == tensor.data_ptr() for name, tensor in weights.items())


def diffusers_naming(name: str) -> str:
    stem = "lora_" + name.replace("text_encoder.", "te1.").replace("text_encoder_2.", "te2.")
    return stem.replace(".", "_")


@pytest.mark.parametrize("naming", [kohya_name, diffusers_naming])
def test_kohya_with_every_layer_it_trains(
    tiny_sdxl: Base, tmp_path: Path, draw: Callable[..., Tensor], naming: Callable[[str], str]
) -> None:
    expected = write_lora(tiny_sdxl, tmp_path / "a.safetensors", naming)
    if naming is kohya_name:
        assert {f"{name}.alpha" for name in OFFICIAL} <= load_file(tmp_path / "a.safetensors").keys()
    said: list[str] = []
    concept = load_adapters(tiny_sdxl, [(tmp_path / "a.safetensors", 1.0)], report=said.append)
    count = 3 * len(expected)
    assert f"matched {count}/{count}" in said[0]
    changes = changes_of(tiny_sdxl, concept)
    assert changes.keys() == expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(changes[name], change, rtol=1e-4, atol=1e-5)
    assert (draw(concept) - draw(None)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["lora", "kv"])
@pytest.mark.parametrize("writer", [write_kohya, write_diffusers])
def test_diffusers_draws_what_we_draw(
    tiny_sdxl: Base,
    tmp_path: Path,
    draw: Callable[..., Tensor],
    pipeline: StableDiffusionXLPipeline,
    writer: Callable[[Export], None],
    kind: str,
) -> None:
    """The LoRA of UNet and both text encoders, or K and V; and the token's two rows in both."""
    concept = learned(tiny_sdxl, {"kind": "kv"})
    if kind == "lora":
        lora = {"kind": "lora", "rank": 3, "alpha": 5.0, "targets": ("to_k", "to_out.0")}
        concept = with_text(tiny_sdxl, learned(tiny_sdxl, lora))
    writer(Export(tiny_sdxl, concept, tmp_path, "pytorch_lora_weights", None, lambda _line: None))
    plain = draw_with(pipeline)
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    rows = load_file(tmp_path / "sks.safetensors")
    for key, encoder, tokenizer in (
        ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
        ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
    ):
        pipeline.load_textual_inversion(rows[key], token="sks", text_encoder=encoder, tokenizer=tokenizer)
    theirs, ours = draw_with(pipeline), draw(concept)
    print(f"max abs difference {(ours - theirs).abs().max():.2e}, effect {(theirs - plain).abs().max():.2e}")
    assert (theirs - plain).abs().max() > 1e-2
    assert (ours - theirs).abs().max() <= 1e-3


@pytest.mark.parametrize("writer", [write_kohya, write_diffusers, write_cdvideo])
@pytest.mark.parametrize("adapter", [{"kind": "lora", "rank": 2}, {"kind": "kv"}])
def test_round_trips(
    tiny_sdxl: Base, tmp_path: Path, writer: Callable[[Export], None], adapter: dict[str, Any]
) -> None:
    concept = learned(tiny_sdxl, adapter)
    if adapter["kind"] == "lora":
        concept = with_text(tiny_sdxl, concept)
    writer(Export(tiny_sdxl, concept, tmp_path, "sks-dog", None, lambda _line: None))
    again = load_adapters(tiny_sdxl, [(tmp_path, 1.0)])
    assert torch.equal(again.tokens["sks"], concept.tokens["sks"])
    before, after = changes_of(tiny_sdxl, concept), changes_of(tiny_sdxl, again)
    assert before.keys() == after.keys()
    for name, change in before.items():
        torch.testing.assert_close(after[name].float(), change.float(), rtol=1e-4, atol=1e-5)


def test_textual_inversion_both_ways(tiny_sdxl: Base, tiny_base: Base, tmp_path: Path) -> None:
    concept = learned(tiny_sdxl, {"kind": "token"}, rows=3)
    write_textual_inversion(Export(tiny_sdxl, concept, tmp_path, "x", None, lambda _line: None))
    path = tmp_path / "sks.safetensors"
    assert {name: tuple(rows.shape) for name, rows in load_file(path).items()} == {
        "clip_l": (3, WIDTHS[0]),
        "clip_g": (3, WIDTHS[1]),
    }
    assert torch.equal(load_adapters(tiny_sdxl, [(path, 1.0)]).tokens["sks"], concept.tokens["sks"])
    assert f"reads text of {sum(WIDTHS)} channels" in "\n".join(describe(path))
    with pytest.raises(UserError, match="made for SDXL"):
        load_adapters(tiny_base, [(path, 1.0)])
    save_file({"clip_l": torch.ones(1, WIDTHS[0])}, path)
    with pytest.raises(UserError, match="rows for both text encoders"):
        load_adapters(tiny_sdxl, [(path, 1.0)])
    save_file({"sks": torch.ones(1, WIDTHS[0])}, path)
    with pytest.raises(UserError, match=f"has {WIDTHS[0]} channels[\\s\\S]*are SDXL"):
        load_adapters(tiny_sdxl, [(path, 1.0)])


def test_loras_of_other_bases_are_refused_by_name(tiny_sdxl: Base, tiny_base: Base, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    one = {f"{stem}.lora_down.weight": random(4, 768), f"{stem}.lora_up.weight": random(320, 4)}
    save_file(one, path)
    with pytest.raises(UserError, match="matched 0/2 [\\s\\S]*the file was made for Stable Diffusion 1"):
        load_adapters(tiny_sdxl, [(path, 1.0)])
    write_lora(tiny_sdxl, path, kohya_name)
    with pytest.raises(UserError, match="the file was made for SDXL"):
        load_adapters(tiny_base, [(path, 1.0)])
    peft = {"unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.lora_A.weight": torch.ones(4, 1024)}
    assert made_for(peft) == "Stable Diffusion 2"
    assert made_for({key.replace("to_v", "to_q"): tensor for key, tensor in peft.items()}) is None


TEXT_LAYER = "text_model.encoder.layers.0.self_attn.q_proj"
TEXT_ALONE = {
    "kohya": (f"lora_te_{TEXT_LAYER.replace('.', '_')}.lora_down.weight", "lora_up.weight"),
    "LyCORIS": (f"lora_te_{TEXT_LAYER.replace('.', '_')}.lokr_w1", "lokr_w2"),
    "diffusers": (f"text_encoder.{TEXT_LAYER}.lora_A.weight", "lora_B.weight"),
}


@pytest.mark.parametrize("kind", TEXT_ALONE)
def test_text_weights_of_stable_diffusion_1_fit_in_size_and_are_refused(
    tiny_sdxl: Base, tmp_path: Path, kind: str
) -> None:
    """SDXL's first text encoder is Stable Diffusion 1's, layer by layer; only the names tell them apart."""
    first, second = TEXT_ALONE[kind]
    width = WIDTHS[0]
    pair = {first: random(2, width), f"{first.partition('q_proj.')[0]}q_proj.{second}": random(width, 2)}
    if kind == "LyCORIS":  # a Kronecker product with one number
        pair = dict(zip(pair, (random(width, width), random(1, 1)), strict=True))
    path = tmp_path / "text.safetensors"
    save_file(pair, path)
    with pytest.raises(UserError, match=r"matched 0/2 [\s\S]*the file was made for Stable Diffusion 1 or 2"):
        load_adapters(tiny_sdxl, [(path, 1.0)])
    if kind in ("kohya", "LyCORIS"):  # and under SDXL's own name it is welcome
        save_file({key.replace("lora_te_", "lora_te1_"): tensor for key, tensor in pair.items()}, path)
        concept = load_adapters(tiny_sdxl, [(path, 1.0)])
        assert changes_of(tiny_sdxl, concept).keys() == {f"text_encoder.{TEXT_LAYER}.delta"}


def test_text_weights_of_sdxl_are_refused_by_one_encoder(tiny_base: Base, tmp_path: Path) -> None:
    stem = f"lora_te1_{TEXT_LAYER.replace('.', '_')}"
    save_file({f"{stem}.lora_down.weight": random(2, 32), f"{stem}.lora_up.weight": random(32, 2)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=rf"matched 0/2 [\s\S]*no place for {stem}[\s\S]*the file was made for SDXL"):
        load_adapters(tiny_base, [(tmp_path / "a.pt", 1.0)])


def test_an_unknown_key_is_named(tiny_sdxl: Base, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    write_lora(tiny_sdxl, path, kohya_name)
    save_file({**load_file(path), "lora_te2_text_model_stranger.alpha": torch.ones(1)}, path)
    with pytest.raises(UserError, match="no place for lora_te2_text_model_stranger.alpha"):
        load_adapters(tiny_sdxl, [(path, 1.0)])


def test_custom_diffusion_is_not_for_sdxl(tiny_sdxl: Base, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the concept is of SDXL"):
        write_custom_diffusion(Export(tiny_sdxl, learned(tiny_sdxl, {"kind": "kv"}), tmp_path, "x", None, print))
