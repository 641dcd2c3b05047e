"""Adapters as real people's programs write them: each acts as its trainer's formula says, or is refused by its name."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from cdvideo.base.loader import Base, load_base
from cdvideo.concept.concept import Concept
from cdvideo.concept.file import load_concept, save_concept
from cdvideo.concept.merge import merge_concepts, weighted
from cdvideo.errors import UserError
from cdvideo.interchange.load import load_adapters
from cdvideo.interchange.needs import merged_bytes
from cdvideo.interchange.write import Export, write_kohya
from tests.interchange.parts import changes_of, load, random
from tests.interchange.test_lycoris import lycoris_file

PLACE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def pair(stem: str, down: str = "lora_A", up: str = "lora_B", *, out: int = 32, inside: int = 32) -> dict[str, Tensor]:
    return {f"{stem}.{down}.weight": random(2, inside), f"{stem}.{up}.weight": random(out, 2)}


def check(base: Base, concept: Concept, expected: dict[str, Tensor], **tolerance: float) -> None:
    changes = changes_of(base, concept)
    assert changes.keys() == expected.keys()
    for name, change in expected.items():
        close = {"rtol": 1e-4, "atol": 1e-5, **tolerance}
        torch.testing.assert_close(
            changes[name].float(), change, msg=lambda told, name=name: f"{name}: {told}", **close
        )


@pytest.mark.parametrize("form", ["flat", "by model"])
@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"r": 2, "lora_alpha": 8}, 4.0),
        ({"r": 2, "lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5),
        ({"r": 2, "lora_alpha": 2, "alpha_pattern": {"attn1.to_q": 6}}, 3.0),
        ({"r": 2, "lora_alpha": 2, "alpha_pattern": {"^mid_block\\..*to_q": 6}}, 3.0),
        ({"r": 2, "lora_alpha": 2, "alpha_pattern": {"to_k": 6}}, 1.0),
    ],
)
def test_peft_settings_in_the_header(
    tiny_base: Base, tmp_path: Path, form: str, settings: dict[str, Any], scale: float
) -> None:
    """`unet.save_lora_adapter` writes them without a model in front, and so its keys."""
    start = "" if form == "flat" else "unet."
    tensors = pair(f"{start}{PLACE}")
    told = {f"{start}{key}": value for key, value in settings.items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(told)})
    down, up = tensors.values()
    check(tiny_base, load(tiny_base, tmp_path / "a.safetensors"), {f"unet.{PLACE}": scale * up @ down})


def test_peft_without_its_config_is_warned_of(
    tiny_base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(pair(f"base_model.model.{PLACE}"), tmp_path / "adapter_model.safetensors")
    load(tiny_base, tmp_path / "adapter_model.safetensors")
    assert "has no adapter_config.json beside it" in caplog.text
    caplog.clear()
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 2, "r": 2}')
    load(tiny_base, tmp_path / "adapter_model.safetensors")
    assert not caplog.text


@pytest.mark.parametrize(
    "pattern", ["([a-z0-9_.]+)+!", "(a*)*b", ".*.*.*.*x", "(", "a{99999999999}", "["], ids=range(6)
)
def test_patterns_that_could_take_forever_are_refused(tiny_base: Base, tmp_path: Path, pattern: str) -> None:
    settings = json.dumps({"unet.alpha_pattern": {pattern: 2}})
    save_file(pair(f"unet.{PLACE}"), tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": settings})
    with pytest.raises(UserError, match="settings can not be read"):
        load(tiny_base, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "text", ["{", "[]", '"x"', "[" * 100_000, '{"unet.lora_alpha": "8"}', '{"unet.lora_alpha": NaN}']
)
def test_settings_that_are_none(tiny_base: Base, tmp_path: Path, text: str) -> None:
    save_file(pair(f"unet.{PLACE}"), tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": text})
    with pytest.raises(UserError, match="settings can not be read"):
        load(tiny_base, tmp_path / "a.safetensors")


def layers_of_lora_diffusion(base: Base, *, first_layout: bool, geglu: bool = True) -> Iterator[tuple[str, nn.Linear]]:
    """By hand, for the tiny UNet: downward, upward, middle; where the feed-forward layer stands in each."""
    blocks = [
        "down_blocks.0.attentions.0",
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1",
        "mid_block.attentions.0",
    ]
    for block in blocks:
        parts = [[f"attn{n}.to_{part}" for part in ("q", "k", "v", "out.0")] for n in (1, 2)]
        middle = ["ff.net.0.proj"] * geglu
        order = parts[0] + middle + parts[1] if first_layout else parts[0] + parts[1] + middle
        for part in order:
            name = f"{block}.transformer_blocks.0.{part}"
            yield f"unet.{name}", base.unet.get_submodule(name)  # type: ignore[misc]


def text_layers_of_lora_diffusion(base: Base) -> Iterator[tuple[str, nn.Linear]]:
    for number in range(2):
        for part in ("k", "v", "q", "out"):
            name = f"encoder.layers.{number}.self_attn.{part}_proj"
            yield f"text_encoder.text_model.{name}", base.text_encoder.get_submodule(name)  # type: ignore[misc]


def ups_and_downs(layers: Iterator[tuple[str, nn.Linear]]) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: (
            torch.randn(layer.out_features, 1, generator=generator) * 0.2,
            torch.randn(1, layer.in_features, generator=generator) * 0.2,
        )
        for name, layer in layers
    }


@pytest.mark.parametrize("first_layout", [True, False])
def test_lora_diffusion(tiny_base: Base, tmp_path: Path, first_layout: bool) -> None:
    """The first LoRA files, of cloneofsimo/lora: layers by their number, rows of words beside them."""
    models = {
        "unet": ups_and_downs(layers_of_lora_diffusion(tiny_base, first_layout=first_layout)),
        "text_encoder": ups_and_downs(text_layers_of_lora_diffusion(tiny_base)),
    }
    header = {"unet": '["CrossAttention","Attention","GEGLU"]', "text_encoder": '["CLIPAttention"]', "<s1>": "<embed>"}
    tensors = {"<s1>": random(32)}
    for model, pairs in models.items():
        for index, (up, down) in enumerate(pairs.values()):
            tensors |= {f"{model}:{index}:up": up, f"{model}:{index}:down": down}
            header[f"{model}:{index}:rank"] = "1"
    save_file(tensors, tmp_path / "lora.safetensors", metadata=header)
    concept = load(tiny_base, tmp_path / "lora.safetensors")
    assert torch.equal(concept.tokens["<s1>"], random(32)[None])
    check(tiny_base, concept, {n: up @ down for pairs in models.values() for n, (up, down) in pairs.items()})
    del tensors["unet:3:up"]
    save_file(tensors, tmp_path / "cut.safetensors", metadata=header)
    with pytest.raises(UserError, match="no whole pair unet:3"):
        load(tiny_base, tmp_path / "cut.safetensors")


@pytest.mark.parametrize("geglu", [True, False])
def test_lists_of_lora_diffusion(tiny_base: Base, tmp_path: Path, geglu: bool) -> None:
    """Its pickles: [up, down, up, ...], whose number and sizes say which layers they are of."""
    unet = ups_and_downs(layers_of_lora_diffusion(tiny_base, first_layout=True, geglu=geglu))
    text = ups_and_downs(text_layers_of_lora_diffusion(tiny_base))
    for pairs in (unet, text):
        torch.save([side for both in pairs.values() for side in both], tmp_path / "lora.pt")
        check(tiny_base, load(tiny_base, tmp_path / "lora.pt"), {name: up @ down for name, (up, down) in pairs.items()})
    torch.save([random(32, 2), random(2, 32)] * 3, tmp_path / "lora.pt")
    with pytest.raises(UserError, match="LoRA of cloneofsimo/lora for unet or text_encoder: its 3 pairs are not those"):
        load(tiny_base, tmp_path / "lora.pt")


FIRST = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "middle_block.1.transformer_blocks.0.attn1.to_q"
UPWARD = "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.2", "output_blocks.3.1.transformer_blocks.0.ff.net.2"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (f"unet._orig_mod.{PLACE}", f"unet.{PLACE}"),
        (f"unet.unet.{PLACE}", f"unet.{PLACE}"),
        (f"module.unet.{PLACE}", f"unet.{PLACE}"),
        (f"unet.base_model.model.{PLACE}", f"unet.{PLACE}"),
        (f"base_model.model.unet.{PLACE}", f"unet.{PLACE}"),
        (f"diffusion_model.{FIRST[1]}", f"unet.{FIRST[0]}"),
        ("lora_unet_" + FIRST[1].replace(".", "_"), f"unet.{FIRST[0]}"),
        ("lora_unet__orig_mod_" + PLACE.replace(".", "_"), f"unet.{PLACE}"),
        (f"text_encoders.clip_l.transformer.{TEXT.removeprefix('text_encoder.')}", TEXT),
        (f"clip_l.transformer.{TEXT.removeprefix('text_encoder.')}", TEXT),
        (f"text_encoder._orig_mod.{TEXT.removeprefix('text_encoder.')}", TEXT),
    ],
)
@pytest.mark.parametrize("sides", [("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up")])
def test_names_and_wrappings(tiny_base: Base, tmp_path: Path, key: str, name: str, sides: tuple[str, str]) -> None:
    """torch.compile's, DDP's, PEFT's and doubled prefixes; ComfyUI's names, in both layouts of the UNet."""
    tensors = pair(key, *sides)
    save_file(tensors, tmp_path / "a.safetensors")
    down, up = tensors.values()
    check(tiny_base, load(tiny_base, tmp_path / "a.safetensors"), {name: up @ down})


def test_names_of_the_first_layout_everywhere(tiny_base: Base, tmp_path: Path) -> None:
    tensors = pair(f"diffusion_model.{UPWARD[1]}", out=16, inside=64)
    down, up = tensors.values()
    save_file(tensors, tmp_path / "a.safetensors")
    check(tiny_base, load(tiny_base, tmp_path / "a.safetensors"), {f"unet.{UPWARD[0]}": up @ down})


def test_motion_directors_spatial_lora(tiny_base: Base, tmp_path: Path) -> None:
    start = "mid_block.attentions.0.transformer_blocks.0"
    named = {
        f"{start}.attn1.processor.to_q_lora": (f"unet.{start}.attn1.to_q", 32, 32),
        f"{start}.attn2.processor.to_out_lora": (f"unet.{start}.attn2.to_out.0", 32, 32),
        f"{start}.ff.net.0.proj_lora": (f"unet.{start}.ff.net.0.proj", 256, 32),
        f"{start}.ff.net.2_lora": (f"unet.{start}.ff.net.2", 32, 128),
    }
    tensors = {k: t for stem, (_, o, i) in named.items() for k, t in pair(stem, "down", "up", out=o, inside=i).items()}
    save_file(tensors, tmp_path / "spatial_unet.safetensors")
    expected = {
        name: tensors[f"{stem}.up.weight"] @ tensors[f"{stem}.down.weight"] for stem, (name, *_) in named.items()
    }
    check(tiny_base, load(tiny_base, tmp_path / "spatial_unet.safetensors"), expected)


def test_four_pairs_under_each_projection(tiny_base: Base, tmp_path: Path) -> None:
    """diffusers 0.15 saved four under each, and called the one of the projection's own name."""
    tensors, expected = {}, {}
    for own in ("q", "k", "v", "out"):
        name = f"text_encoder.text_model.encoder.layers.1.self_attn.{own}_proj"
        for index, other in enumerate(("q", "k", "v", "out")):
            made = {key: t + index for key, t in pair(f"{name}.to_{other}_lora", "down", "up").items()}
            tensors |= made
            if other == own:
                expected[name] = made[f"{name}.to_{own}_lora.up.weight"] @ made[f"{name}.to_{own}_lora.down.weight"]
    save_file(tensors, tmp_path / "a.safetensors")
    check(tiny_base, load(tiny_base, tmp_path / "a.safetensors"), expected)


def test_a_scalar_and_single_numbers_of_lycoris(tiny_base: Base, tmp_path: Path) -> None:
    stem = f"lora_unet_{PLACE.replace('.', '_')}"
    down, up = random(2, 32), random(32, 2)
    at, values = torch.tensor([[0, 5, 31], [1, 7, 31]]), torch.tensor([0.5, -1.0, 2.0])
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.0)}
    tensors |= {f"{stem}.scalar": torch.tensor(3.0), f"{stem}.bias_indices": at, f"{stem}.bias_values": values}
    save_file({**tensors, f"{stem}.bias_size": torch.tensor([32, 32])}, tmp_path / "a.safetensors")
    expected = up @ down
    expected[at[0], at[1]] += values
    check(tiny_base, load(tiny_base, tmp_path / "a.safetensors"), {f"unet.{PLACE}": 1.5 * expected})


@pytest.mark.parametrize("options", [{"bias": "lora_only"}, {"lora_bias": True}])
def test_biases_of_peft(tiny_base: Base, tmp_path: Path, tiny_base_folder: Path, options: dict[str, Any]) -> None:
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["attn1.to_out.0"], **options)
    peer = load_base(str(tiny_base_folder), device=torch.device("cpu")).unet
    before = {name: parameter.detach().clone() for name, parameter in peer.named_parameters()}
    tuned = get_peft_model(peer, config)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name or ("bias" in options and name.endswith("to_out.0.base_layer.bias")):
            parameter.data = random(*parameter.shape)
    tuned.save_pretrained(tmp_path)
    after = dict(tuned.merge_and_unload().named_parameters())  # type: ignore[operator]
    expected = {
        f"unet.{name.removesuffix('.weight')}": (after[name] - before[name]).detach()
        for name in before
        if (after[name] - before[name]).abs().max() > 1e-6
    }
    assert any(name.endswith(".bias") for name in expected)
    check(tiny_base, load(tiny_base, tmp_path), expected, rtol=1e-3, atol=1e-5)


FLOATS = (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (*FLOATS, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_type_of_number(tiny_base: Base, tmp_path: Path, dtype: torch.dtype) -> None:
    stem = f"lora_unet_{PLACE.replace('.', '_')}"
    tensors = pair(stem, "lora_down", "lora_up") | {f"{stem}.alpha": torch.tensor(1.0)}
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    down, up = (tensors[f"{stem}.lora_{side}.weight"].float() for side in ("down", "up"))
    check(tiny_base, load(tiny_base, tmp_path / "a.safetensors"), {f"unet.{PLACE}": 0.5 * up @ down})


def test_quantised_weights_are_refused(tiny_base: Base, tmp_path: Path) -> None:
    save_file({key: (9 * t).to(torch.int8) for key, t in pair(f"unet.{PLACE}").items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="is of int8: quantised"):
        load(tiny_base, tmp_path / "a.safetensors")


def test_alpha_0_is_the_rank(tiny_base: Base, tmp_path: Path) -> None:
    stem = f"lora_unet_{PLACE.replace('.', '_')}"
    tensors = pair(stem, "lora_down", "lora_up")
    down, up = tensors.values()
    save_file({**tensors, f"{stem}.alpha": torch.tensor(0.0)}, tmp_path / "a.safetensors")
    check(tiny_base, load(tiny_base, tmp_path / "a.safetensors"), {f"unet.{PLACE}": up @ down})


@pytest.mark.parametrize("how", ["pissa", "olora", "orthogonal", "eva", "gaussian", False])
@pytest.mark.parametrize("dora", [False, True])
def test_initialisations_of_peft(tiny_base: Base, tmp_path: Path, tiny_base_folder: Path, how: Any, dora: bool) -> None:
    """Those that take their first factors out of the base are read as PEFT's own loading does."""
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["attn2.to_k"], init_lora_weights=how, use_dora=dora)
    tuned = get_peft_model(load_base(str(tiny_base_folder), device=torch.device("cpu")).unet, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter += 0.02 * random(*parameter.shape)
    tuned.save_pretrained(tmp_path / "adapter")
    peer = PeftModel.from_pretrained(
        load_base(str(tiny_base_folder), device=torch.device("cpu")).unet, tmp_path / "adapter"
    )
    theirs = dict(peer.merge_and_unload().named_parameters())
    own = dict(tiny_base.unet.named_parameters())
    expected = {f"unet.{n.removesuffix('.weight')}": (theirs[n] - own[n]).detach() for n in own if "attn2.to_k" in n}
    check(tiny_base, load(tiny_base, tmp_path / "adapter"), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", ["pissa_niter_4", "corda", "loftq", "lora_ga"])
def test_initialisations_that_nothing_tells(tiny_base: Base, tmp_path: Path, how: str) -> None:
    """They are refused by name, unless the first factors were kept beside the adapter."""
    first, trained = pair(f"base_model.model.{PLACE}"), pair(f"base_model.model.{PLACE}")
    trained = {key: 2 * tensor for key, tensor in trained.items()}
    for folder, tensors in (("adapter", trained), ("adapter/first_init", first)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "adapter_model.safetensors")
        settings = {"r": 2, "lora_alpha": 4, "init_lora_weights": how}
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps(settings))
    (down, up), (first_down, first_up) = trained.values(), first.values()
    expected = {f"unet.{PLACE}": 2 * (up @ down - first_up @ first_down)}
    check(tiny_base, load(tiny_base, tmp_path / "adapter"), expected)
    (tmp_path / "alone").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "alone" / name).write_bytes((tmp_path / "adapter" / name).read_bytes())
    (tmp_path / "adapter" / "first_init").rename(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=rf"init_lora_weights='{how}', which changed the base[\s\S]*convert it with PEFT"
    ):
        load(tiny_base, tmp_path / "alone")


def test_peft_of_sdxls_text_encoder(tiny_base: Base, tiny_sdxl: Base, tmp_path: Path) -> None:
    """Its keys are those of Stable Diffusion 1's; its config tells what it is of."""
    name = TEXT.removeprefix("text_encoder.")
    tensors = pair(f"base_model.model.{name}", out=64, inside=64)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"r": 2, "lora_alpha": 2, "base_model_name_or_path": "/models/stable-diffusion-xl-base-1.0/text_encoder"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    down, up = tensors.values()
    check(tiny_sdxl, load(tiny_sdxl, tmp_path), {TEXT: up @ down})
    with pytest.raises(UserError, match="the file was made for SDXL"):
        load(tiny_base, tmp_path)
    second = tmp_path / "text_encoder_2"
    second.mkdir()
    tensors = pair(f"base_model.model.{name}", out=128, inside=128)
    save_file(tensors, second / "adapter_model.safetensors")
    down, up = tensors.values()
    check(tiny_sdxl, load(tiny_sdxl, second), {f"text_encoder_2.{name}": up @ down})


@pytest.mark.parametrize("form", ["loha", "lokr", "lokr both", "locon tucker", "loha tucker", "lokr tucker"])
def test_lycoris_stays_in_its_factors(tiny_base: Base, tmp_path: Path, form: str) -> None:
    """In memory, in a concept file, at other weights, and as a LoRA of the rank that it has."""
    expected = lycoris_file(tiny_base, tmp_path / "a.safetensors", form)
    concept = load(tiny_base, tmp_path / "a.safetensors")
    if form == "locon tucker":
        assert concept.metadata.adapter == "lora"
        return
    assert concept.metadata.adapter == "lycoris" and not any(name.endswith(".delta") for name in concept.weights)
    save_concept(concept, tmp_path / "concept.safetensors")
    back = load_concept(tmp_path / "concept.safetensors", base=tiny_base)
    check(tiny_base, back, expected)
    check(tiny_base, weighted(tiny_base, back, -0.5), {name: -0.5 * change for name, change in expected.items()})
    twice = merge_concepts(tiny_base, [back, load(tiny_base, tmp_path / "a.safetensors")])
    check(tiny_base, twice, {name: 2 * change for name, change in expected.items()}, rtol=1e-3, atol=1e-3)
    said: list[str] = []
    write_kohya(Export(tiny_base, concept, tmp_path / "out", "a", None, said.append))
    check(tiny_base, load(tiny_base, tmp_path / "out" / "a.safetensors"), expected, rtol=1e-3, atol=1e-4)
    error = float(said[0].partition("error ")[2].partition(" ")[0])
    assert error < 1e-5


def test_two_keys_for_one_place_are_refused(tiny_base: Base, tmp_path: Path) -> None:
    save_file(pair(f"unet.{PLACE}") | pair(f"unet._orig_mod.{PLACE}"), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"matched 2/4[\s\S]*no place for"):
        load(tiny_base, tmp_path / "a.safetensors")


@pytest.mark.parametrize("factor", [(torch.ones(32), torch.ones(32)), (torch.ones(0, 32), torch.ones(32, 0))])
def test_factors_of_other_forms(tiny_base: Base, tmp_path: Path, factor: tuple[Tensor, Tensor]) -> None:
    save_file(dict(zip(pair(f"unet.{PLACE}"), factor, strict=True)), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="no place for"):
        load(tiny_base, tmp_path / "a.safetensors")


def test_names_that_nobody_knows_are_not_the_bases_fault(tiny_base: Base, tmp_path: Path) -> None:
    """Dots replaced in diffusers' names, as somebody did by hand: no other base would take them."""
    save_file(pair(f"lora_unet_{PLACE.replace('.', '_')}", "lora_down", "lora_up"), tmp_path / "good.safetensors")
    load_adapters(tiny_base, [(tmp_path / "good.safetensors", 1.0)])
    odd = f"lora_unet_unet_{PLACE.replace('.', '_')}_lora_down.weight"
    save_file(
        pair(f"lora_unet_{PLACE.replace('.', '_')}", "lora_down", "lora_up") | {odd: random(2, 32)},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(UserError, match=rf"no place for {odd}[\s\S]*do: save it again"):
        load_adapters(tiny_base, [(tmp_path / "a.safetensors", 1.0)])


def test_nothing_is_said_of_what_is_well(tiny_base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file(pair(f"unet.{PLACE}"), tmp_path / "a.safetensors")
    with caplog.at_level(logging.WARNING):
        load(tiny_base, tmp_path / "a.safetensors")
    assert not caplog.records


def test_what_adapters_change_stands_twice_in_memory(tiny_base: Base, tmp_path: Path) -> None:
    """The reckoning knows of it before anything is loaded."""
    expected = lycoris_file(tiny_base, tmp_path / "a.safetensors", "lokr")
    save_concept(load(tiny_base, tmp_path / "a.safetensors"), tmp_path / "own.safetensors")
    tiny_base.unet.to("meta")
    sizes = {name: 4 * change.numel() for name, change in expected.items()}
    of_unet = sum(size for name, size in sizes.items() if name.startswith("unet."))
    for file in ("a", "own"):
        found = merged_bytes(tiny_base, [(tmp_path / f"{file}.safetensors", 1.0)])
        assert found == (of_unet, sum(sizes.values()) - of_unet)
    save_file({"sks": random(1, 32)}, tmp_path / "sks.safetensors")
    assert merged_bytes(tiny_base, [(tmp_path / "sks.safetensors", 1.0)]) == (0, 0)
