"""Files of LyCORIS: every form in every layer that it trains acts as LyCORIS' own forward pass does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cdvideo.base.loader import Base
from cdvideo.concept.adapters import text_models
from cdvideo.errors import UserError
from cdvideo.interchange.inspect import describe
from cdvideo.interchange.load import load_adapters
from tests.interchange.parts import Draw, changes_of, kohya_layers, load, random

Made = tuple[dict[str, Tensor], Tensor]  # the parts of a layer, and the change that they stand for
RANK, ALPHA = 3, 2.0


def locon(weight: Tensor, *, tucker: bool = False) -> Made:
    """A convolution of the rank's channels, then 1x1; or 1x1, k x k within the rank, 1x1."""
    outputs, inputs, *size = weight.shape
    up, down = random(outputs, RANK, *[1] * len(size)), random(RANK, inputs, *size)
    if not tucker:
        change = torch.einsum("or,ri...->oi...", up.flatten(1), down)
        return {"lora_up.weight": up, "lora_down.weight": down}, ALPHA / RANK * change
    mid, down = random(RANK, RANK, *size), random(RANK, inputs, 1, 1)
    # What the three convolutions answer to one pixel in one channel is the kernel, mirrored.
    pixel = torch.zeros(inputs, inputs, 2 * size[0] - 1, 2 * size[1] - 1)
    pixel[range(inputs), range(inputs), size[0] - 1, size[1] - 1] = 1
    answer = F.conv2d(F.conv2d(F.conv2d(pixel, down), mid), up)
    parts = {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": mid}
    return parts, ALPHA / RANK * answer.transpose(0, 1).flip(2, 3)


def loha(weight: Tensor, *, tucker: bool = False) -> Made:
    outputs, inputs, *size = weight.shape
    parts, factors = {}, []
    for number in (1, 2):
        if tucker:
            core, a, b = random(RANK, RANK, *size), random(RANK, outputs, scale=0.5), random(RANK, inputs, scale=0.3)
            parts |= {f"hada_t{number}": core * number}
            factors.append(torch.tensordot(a.T, torch.tensordot(b.T, core * number, ([1], [1])), ([1], [1])))
        else:
            a, b = random(outputs, RANK, scale=0.5), random(RANK, weight[0].numel(), scale=0.3) * number
            factors.append((a @ b).view(weight.shape))
        parts |= {f"hada_w{number}_a": a, f"hada_w{number}_b": b}
    return parts, ALPHA / RANK * factors[0] * factors[1]


def lokr(weight: Tensor, *, tucker: bool = False, whole: bool = False, both: bool = False) -> Made:
    """outputs = 2 x, inputs = 2 y."""
    outputs, inputs, *size = weight.shape
    outer, inner = (2, 2), (outputs // 2, inputs // 2)
    if both:
        w1_a, w1_b = random(outer[0], RANK), random(RANK, outer[1])
        parts, w1 = {"lokr_w1_a": w1_a, "lokr_w1_b": w1_b}, w1_a @ w1_b
    else:
        w1 = random(*outer)
        parts = {"lokr_w1": w1}
    if whole:
        w2 = random(*inner, *size)
        parts["lokr_w2"] = w2
    elif tucker:
        core, a, b = random(RANK, RANK, *size), random(RANK, inner[0]), random(RANK, inner[1])
        parts |= {"lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b}
        w2 = torch.tensordot(a.T, torch.tensordot(b.T, core, ([1], [1])), ([1], [1]))
    else:
        a, b = random(inner[0], RANK), random(RANK, inner[1], *size)
        parts |= {"lokr_w2_a": a, "lokr_w2_b": b.flatten(1)}
        w2 = torch.einsum("or,ri...->oi...", a, b)
    # The Kronecker product: output 2 o + p, input 2 i + q has w1[o, i] times w2[p, q].
    change = torch.einsum("oi,pq...->opiq...", w1, w2).reshape(weight.shape)
    return parts, change * (1 if whole and not both else ALPHA / RANK)


def full(weight: Tensor) -> Made:
    change = random(*weight.shape)
    return {"diff": change}, change


FORMS: dict[str, Callable[[Tensor], Made]] = {
    "locon": locon,
    "loha": loha,
    "lokr": lokr,
    "lokr whole": lambda weight: lokr(weight, whole=True),
    "lokr both": lambda weight: lokr(weight, both=True),
    "full": full,
}
OF_CONVOLUTIONS: dict[str, Callable[[Tensor], Made]] = {
    "locon tucker": lambda weight: locon(weight, tucker=True),
    "loha tucker": lambda weight: loha(weight, tucker=True),
    "lokr tucker": lambda weight: lokr(weight, tucker=True),
}


def lycoris_file(base: Base, path: Path, form: str) -> dict[str, Tensor]:
    """Writes the form in all of LyCORIS' layers, LoCon where it has none; returns the changes by layer."""
    tensors, expected = {}, {}
    for stem, (name, layer) in kohya_layers(base).items():
        is_even = not any(side % 2 for side in layer.weight.shape[:2])
        fits = is_even and (form in FORMS or layer.weight.ndim == 4)
        parts, expected[name] = ({**FORMS, **OF_CONVOLUTIONS}[form] if fits else locon)(layer.weight.detach())
        tensors |= {f"{stem}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        if "diff" not in parts:
            tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, path)
    return expected


@pytest.mark.parametrize("form", [form for form in (*FORMS, *OF_CONVOLUTIONS) if not form.startswith("locon")])
def test_every_form_in_every_layer(tiny_base: Base, tmp_path: Path, draw: Draw, form: str) -> None:
    path = tmp_path / "a.safetensors"
    expected = lycoris_file(tiny_base, path, form)
    count = len(load_file(path))
    said: list[str] = []
    concept = load_adapters(tiny_base, [(path, 1.0)], report=said.append)
    assert said == [f"LyCORIS {path}: matched {count}/{count} tensors"]
    changes = changes_of(tiny_base, concept)
    assert changes.keys() == expected.keys() and any(name.startswith("text_encoder.") for name in changes)
    for name, change in expected.items():
        torch.testing.assert_close(changes[name], change, rtol=1e-4, atol=1e-5, msg=name)

    plain, tuned = draw(None), draw(concept)
    layers = dict(kohya_layers(tiny_base).values())
    with torch.no_grad():  # the reference: written into the weights
        for name, change in expected.items():
            layers[name].weight += change
    assert (tuned - plain).abs().max() > 1e-2
    torch.testing.assert_close(draw(None), tuned, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", ["locon tucker", "locon"])
def test_convolutions_of_a_lora_are_its_own(tiny_base: Base, tmp_path: Path, form: str) -> None:
    """LoCon alone stays the low-rank change that it is."""
    expected = lycoris_file(tiny_base, tmp_path / "a.safetensors", form)
    concept = load(tiny_base, tmp_path / "a.safetensors")
    assert concept.metadata.adapter == "lora"
    for name, change in changes_of(tiny_base, concept).items():
        torch.testing.assert_close(change, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("form", ["locon", "loha", "lokr"])
@pytest.mark.parametrize("of", ["inputs", "outputs"])
@pytest.mark.parametrize(
    "path", ["down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2", "mid_block.resnets.0.conv1"]
)
def test_magnitudes(tiny_base: Base, tmp_path: Path, form: str, of: str, path: str) -> None:
    """DoRA (arXiv 2402.09353, eq. 5): the merged weight is divided by its norms and gets the learned ones."""
    weight = tiny_base.unet.get_submodule(path).weight.detach()
    parts, change = FORMS[form](weight)
    axis = {"outputs": 0, "inputs": 1}[of]
    sizes = [side if number == axis else 1 for number, side in enumerate(weight.shape)]
    magnitude = random(*sizes).abs() + 0.1
    stem = f"lora_unet_{path.replace('.', '_')}"
    parts = {**parts, "dora_scale": magnitude, "alpha": torch.tensor(ALPHA)}
    save_file({f"{stem}.{part}": tensor.contiguous() for part, tensor in parts.items()}, tmp_path / "a.safetensors")
    (found,) = changes_of(tiny_base, load(tiny_base, tmp_path / "a.safetensors")).values()
    norms = (weight + change).transpose(0, axis).flatten(1).norm(dim=1).view(sizes)
    expected = magnitude * (weight + change) / norms
    torch.testing.assert_close(weight + found, expected, rtol=1e-4, atol=1e-4)


def test_biases_and_norms(tiny_base: Base, tmp_path: Path) -> None:
    """What LyCORIS trains in its full preset, and with train_norm."""
    unet, (prefix,) = tiny_base.unet, text_models(tiny_base)
    norm, conv = unet.down_blocks[0].resnets[0].norm1, unet.conv_out
    tensors = {
        "lora_unet_down_blocks_0_resnets_0_norm1.w_norm": random(*norm.weight.shape),
        "lora_unet_down_blocks_0_resnets_0_norm1.b_norm": random(*norm.bias.shape),
        "lora_unet_conv_out.diff": random(*conv.weight.shape),
        "lora_unet_conv_out.diff_b": random(*conv.bias.shape),
        "lora_te_text_model_final_layer_norm.w_norm": random(32),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    concept = load(tiny_base, tmp_path / "a.safetensors")
    names = [
        "unet.down_blocks.0.resnets.0.norm1.delta",
        "unet.down_blocks.0.resnets.0.norm1.bias.delta",
        "unet.conv_out.delta",
        "unet.conv_out.bias.delta",
        f"{prefix}final_layer_norm.delta",
    ]
    assert concept.weights.keys() == set(names) and concept.metadata.adapter == "unet"
    assert all(torch.equal(concept.weights[name], tensor) for name, tensor in zip(names, tensors.values(), strict=True))


def test_k_and_v_alone_are_compiled_into_prompts(tiny_base: Base, tmp_path: Path) -> None:
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    parts, change = lokr(tiny_base.unet.get_submodule(path).weight.detach())
    stem = f"lora_unet_{path.replace('.', '_')}"
    save_file({f"{stem}.{part}": tensor for part, tensor in parts.items()}, tmp_path / "a.safetensors")
    concept = load(tiny_base, tmp_path / "a.safetensors")
    assert concept.metadata.adapter == "kv"
    torch.testing.assert_close(concept.weights[f"unet.{path}.delta"], change / (ALPHA / RANK))  # no alpha: unscaled


def test_inspecting_counts_the_forms(tiny_base: Base, tmp_path: Path) -> None:
    lycoris_file(tiny_base, tmp_path / "a.safetensors", "lokr tucker")
    said = describe(tmp_path / "a.safetensors")
    convolutions = [
        layer
        for _, layer in kohya_layers(tiny_base).values()
        if isinstance(layer, nn.Conv2d) and not any(side % 2 for side in layer.weight.shape[:2])
    ]
    others = len(kohya_layers(tiny_base)) - len(convolutions)
    assert ": LyCORIS, " in said[0]
    assert said[1] == f"  LoCon of {others} layers, LoKr of {len(convolutions)} layers"


def test_what_has_no_place_is_named(tiny_base: Base, tmp_path: Path) -> None:
    lycoris_file(tiny_base, tmp_path / "a.safetensors", "loha")
    whole = load_file(tmp_path / "a.safetensors")
    stem = next(key for key in whole if key.endswith("hada_w1_a")).partition(".")[0]
    names, base = "save it again", "use the --base"  # by whether a name is unknown, or a size is another
    for damage, said, do in (
        ({**whole, "lora_unet_nowhere.hada_w1_a": torch.ones(1, 1)}, "lora_unet_nowhere.hada_w1_a", names),
        ({**whole, f"{stem}.hada_w3_a": torch.ones(1, 1)}, f"{stem}.hada_w3_a", names),
        ({key: tensor for key, tensor in whole.items() if key != f"{stem}.hada_w2_b"}, stem, base),
        ({**whole, f"{stem}.hada_w1_b": torch.ones(RANK, 7)}, stem, base),
        ({**whole, f"{stem}.dora_scale": torch.ones(7, 1)}, stem, base),
    ):
        save_file(damage, tmp_path / "odd.safetensors")
        with pytest.raises(
            UserError, match=rf"matched \d+/{len(damage)} tensors[\s\S]*no place for {said}[\s\S]*do: {do}"
        ):
            load(tiny_base, tmp_path / "odd.safetensors")
