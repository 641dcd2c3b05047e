"""Files under the names that their own writers give them: all keys find their place, and act as the formulas say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from cdvideo.base.loader import Base
from cdvideo.concept.adapters import delta_name, parameter_changes, text_changes, text_models
from cdvideo.errors import UserError
from cdvideo.interchange.custom_diffusion import read_custom_diffusion
from cdvideo.interchange.files import CUSTOM_DIFFUSION, KOHYA, Foreign, read_foreign
from cdvideo.interchange.load import load_adapters
from cdvideo.interchange.lora import adaptable_layers, kohya_name, read_lora
from tests.interchange.parts import PROMPT, draw_with

Draw = Callable[..., Tensor]

# What kohya's scripts (networks/lora.py) look into, by the names of the classes, and what they call the layers there.
KOHYA_UNET = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
KOHYA_TEXT = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")


def load(base: Base, *paths: Path) -> Any:
    return load_adapters(base, [(path, 1.0) for path in paths])


def random(*shape: int, scale: float = 0.2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale


def kohya_layers(base: Base, unet_classes: tuple[str, ...] = KOHYA_UNET) -> dict[str, tuple[str, nn.Module]]:
    """By kohya's names: the layer's name in a concept file, and the layer."""
    found: dict[str, tuple[str, nn.Module]] = {}
    for start, prefix, model, classes in (
        ("lora_unet", "unet.", base.unet, unet_classes),
        ("lora_te", *next(iter(text_models(base).items())), KOHYA_TEXT),
    ):
        for path, block in model.named_modules():
            if type(block).__name__ in classes:
                for child, layer in block.named_modules():
                    if isinstance(layer, (nn.Linear, nn.Conv2d)):
                        name = f"{prefix}{path}.{child}"
                        official = name.split(".", 1)[1].replace(".", "_")
                        found[f"{start}_{official}"] = (name, layer)
    return found


def kohya_file(base: Base, path: Path) -> dict[str, tuple[str, Tensor]]:
    """Writes a LoCon of all of kohya's layers, of many ranks and alphas; returns what it is to change."""
    tensors, expected = {}, {}
    for number, (stem, (name, layer)) in enumerate(kohya_layers(base).items()):
        rank, alpha = 1 + number % 3, float(1 + number % 4)
        if isinstance(layer, nn.Conv2d):
            down = random(rank, layer.in_channels, *layer.kernel_size)
            up = random(layer.out_channels, rank, 1, 1)
            change = torch.einsum("or,rihw->oihw", up[..., 0, 0], down)
        else:
            down, up = random(rank, layer.in_features), random(layer.out_features, rank)
            change = up @ down
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        expected[name] = (stem, alpha / rank * change)
    save_file(tensors, path)
    return expected


def changes_of(base: Base, concept: Any) -> dict[str, Tensor]:
    changes = {delta_name(name): change for name, change in parameter_changes(base.unet, concept).items()}
    changes |= text_changes(base, concept)
    return {name.removesuffix(".delta"): change for name, change in changes.items()}


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


def test_the_keys_of_stable_diffusion_1_5() -> None:
    """Stable Diffusion 1.5: 192 layers in the UNet and 72 in the text encoder, as in the files that people own."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        text_encoder = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12))
    base = Base("sd15", Path(), "", unet, None, text_encoder, None, {}, 512, torch.device("meta"), torch.float32)  # type: ignore[arg-type]
    official = kohya_layers(base, ("Transformer2DModel",))
    assert sum(name.startswith("lora_unet_") for name in official) == 192
    assert sum(name.startswith("lora_te_text_model_encoder_layers_") for name in official) == 72
    assert {kohya_name(name) for name in adaptable_layers(base)} >= official.keys()
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0" in official
    assert "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj" in official
    assert len({kohya_name(name) for name in adaptable_layers(base)}) == len(adaptable_layers(base))

    tensors = {}
    for stem, (_, layer) in official.items():
        tensors[f"{stem}.lora_down.weight"] = torch.ones(1, *layer.weight.shape[1:])
        tensors[f"{stem}.lora_up.weight"] = torch.ones(len(layer.weight), 1, *[1] * (layer.weight.ndim - 2))
        tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    factors, settings = read_lora(Foreign(Path("a.safetensors"), KOHYA, tensors, {}), base)
    assert len(factors) == 2 * len(official) and settings == {"rank": 1, "alpha": 1.0, "dora": False}

    attentions = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    whole = {
        f"{name}.{part}_custom_diffusion.weight": torch.empty(
            unet.get_submodule(name.removesuffix("processor") + part).weight.shape, device="meta"
        )
        for name in attentions
        for part in ("to_k", "to_v")
    }
    assert len(read_custom_diffusion(Foreign(Path("a.bin"), CUSTOM_DIFFUSION, whole, {}), base)) == 32


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
    """DoRA (arXiv 2402.09353, eq. 5) as LyCORIS keeps it; its older form, of the inputs, is another formula."""
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
    save_file({**tensors, f"{stem}.dora_scale": random(1, weight.shape[1])}, tmp_path / "in.safetensors")
    with pytest.raises(UserError, match=f"no place for {stem}"):
        load(tiny_base, tmp_path / "in.safetensors")


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
        getattr(pipeline, model).add_adapter(config)
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


def save_row(path: Path, form: str) -> Tensor:
    """Rows of a token as different tools write them."""
    rows_KD = random(2, 32, scale=1.0)
    if form == "diffusers":
        torch.save({"sks": rows_KD}, path)
    elif form == "safetensors":
        save_file({"sks": rows_KD}, path)
    elif form == "tensor":
        torch.save(rows_KD, path)
    elif form == "web ui":
        content = {"string_to_token": {"*": 265}, "string_to_param": {"*": nn.Parameter(rows_KD)}, "name": "sks"}
        torch.save({**content, "step": 500, "sd_checkpoint": "abc", "sd_checkpoint_name": "v1-5"}, path)
    elif form == "first":
        torch.save({"string_to_token": {"*": 265}, "string_to_param": nn.ParameterDict({"*": rows_KD})}, path)
    elif form == "web ui safetensors":
        save_file({"emb_params": rows_KD}, path)
    return rows_KD


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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}, "SDXL"),
        ({"lora_te2_text_model_x.alpha": torch.ones(1)}, "SDXL"),
        ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.ones(1, 1)}, "SDXL"),
        ({"lora_unet_conv_in.hada_w1_a": torch.ones(1, 1)}, "LoHa"),
        ({"model.diffusion_model.out.0.weight": torch.ones(1)}, "whole image model"),
        ({"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": torch.ones(1)}, "motion"),
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
    with pytest.raises(UserError, match="run code"):
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


def test_a_length_that_looks_like_a_pickle(tiny_base: Base, tmp_path: Path) -> None:
    """Safetensors begin with the length of their header; 128, 0x80, is how pickles begin."""
    for spaces in range(256):
        save_file({"sks": random(1, 32)}, tmp_path / "a.safetensors", metadata={"told": " " * spaces})
        if (tmp_path / "a.safetensors").read_bytes()[0] == 0x80:
            break
    assert (tmp_path / "a.safetensors").read_bytes()[:1] == b"\x80"
    assert load(tiny_base, tmp_path / "a.safetensors").tokens.keys() == {"sks"}


def test_files_of_torch_s_first_form(tiny_base: Base, tmp_path: Path) -> None:
    torch.save({"sks": random(1, 32)}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    assert (tmp_path / "a.bin").read_bytes()[:1] == b"\x80"
    assert load(tiny_base, tmp_path / "a.bin").tokens.keys() == {"sks"}


def test_alpha_of_peft_by_pattern(tiny_base: Base, tmp_path: Path) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    settings = {"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn2.to_k": 6}, "unet.r": 2}
    factors = {f"unet.{name}.lora_A.weight": random(2, 32), f"unet.{name}.lora_B.weight": random(32, 2)}
    save_file(factors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(settings)})
    read, adapter = read_lora(read_foreign(tmp_path / "a.safetensors"), tiny_base)
    assert adapter == {"rank": 2, "alpha": 6.0, "dora": False} and read.keys() == factors.keys()
