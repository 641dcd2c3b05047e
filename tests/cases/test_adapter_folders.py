"""Folders as training scripts leave them: the adapter alone is read, once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.concept.file import find_concept
from cdvideo.errors import UserError
from cdvideo.interchange.config import ConvertConfig
from cdvideo.interchange.load import load_adapters
from cdvideo.interchange.main import main
from cdvideo.motion.files import load_motion
from cdvideo.motion.lora import fold_motion_lora
from cdvideo.sampling.image import sample_images
from tests.interchange.parts import changes_of, load, random
from tests.motion.animatediff_names import make_adapter, official, official_lora

PLACE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
KOHYA = f"lora_unet_{PLACE.replace('.', '_')}"
DOWN, UP = random(2, 32), random(32, 2)


def kohya(factor: float = 1.0) -> dict[str, Tensor]:
    return {
        f"{KOHYA}.lora_down.weight": DOWN,
        f"{KOHYA}.lora_up.weight": factor * UP,
        f"{KOHYA}.alpha": torch.tensor(2.0),
    }


def diffusers(start: str = "unet.") -> dict[str, Tensor]:
    return {f"{start}{PLACE}.lora_A.weight": DOWN, f"{start}{PLACE}.lora_B.weight": UP}


def change(base: Base, path: Path) -> Tensor:
    (found,) = changes_of(base, load(base, path)).values()
    return found


@pytest.mark.parametrize(
    ("names", "last"),
    [
        (("dog-000002", "dog-000004", "dog"), "dog"),
        (("dog-000002", "dog-000010", "dog-000004"), "dog-000010"),
        (("dog-step00000500", "dog-step00001000"), "dog-step00001000"),
        (("dog-1", "dog-2", "dog"), "dog"),
        (("learned-steps-500", "learned-steps-1000", "learned"), "learned"),
    ],
)
def test_the_last_state_alone_acts(tiny_base: Base, tmp_path: Path, names: tuple[str, ...], last: str) -> None:
    for name in names:
        save_file(kohya(1.0 if name == last else 5.0), tmp_path / f"{name}.safetensors")
    said: list[str] = []
    concept = load_adapters(tiny_base, [(tmp_path, 1.0)], report=said.append)
    torch.testing.assert_close(*changes_of(tiny_base, concept).values(), UP @ DOWN)
    assert "(earlier states)" in said[0] and f"{last}.safetensors" not in said[0]


def test_states_of_the_training_are_passed_over(tiny_base: Base, tmp_path: Path) -> None:
    save_file(diffusers(), tmp_path / "pytorch_lora_weights.safetensors")
    for name in ("optimizer.bin", "scheduler.bin", "scaler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"state": {}, "param_groups": [{"lr": 1e-4}]}, tmp_path / name)
    save_file({"conv_in.weight": random(4, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "._dog.safetensors").write_bytes(b"\0" * 9)
    torch.testing.assert_close(change(tiny_base, tmp_path), UP @ DOWN)
    with pytest.raises(UserError, match=r"the state of an optimizer[\s\S]*do: name the weights beside it"):
        load(tiny_base, tmp_path / "optimizer.bin")


def test_steps_of_a_textual_inversion(tiny_base: Base, tmp_path: Path) -> None:
    for name, row in (("learned_embeds", random(32)), ("learned_embeds-steps-500", random(32) * 2)):
        save_file({"<cat-toy>": row}, tmp_path / f"{name}.safetensors")
    assert torch.equal(load(tiny_base, tmp_path).tokens["<cat-toy>"], random(1, 32) * 0 + random(32))


@pytest.mark.parametrize("forms", ["names", "pickle", "peft"])
def test_one_adapter_in_two_forms_acts_once(tiny_base: Base, tmp_path: Path, forms: str) -> None:
    save_file(diffusers(), tmp_path / "pytorch_lora_weights.safetensors")
    if forms == "names":
        save_file(
            {key: tensor.half() for key, tensor in kohya().items()}, tmp_path / "pytorch_lora_weights_kohya.safetensors"
        )
    elif forms == "pickle":
        torch.save({key: 3 * tensor for key, tensor in diffusers().items()}, tmp_path / "pytorch_lora_weights.bin")
    else:
        save_file(diffusers("base_model.model."), tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 2}')
    said: list[str] = []
    concept = load_adapters(tiny_base, [(tmp_path, 1.0)], report=said.append)
    torch.testing.assert_close(*changes_of(tiny_base, concept).values(), UP @ DOWN)
    assert any("in another form" in line for line in said)


def test_two_adapters_of_the_same_layers_are_not_summed(tiny_base: Base, tmp_path: Path) -> None:
    save_file(kohya(), tmp_path / "cat.safetensors")
    save_file(kohya(2.0), tmp_path / "dog.safetensors")
    with pytest.raises(UserError, match=r"cat\.safetensors and dog\.safetensors both change[\s\S]*do: name the file"):
        load(tiny_base, tmp_path)
    files = [(tmp_path / f"{name}.safetensors", 1.0) for name in ("cat", "dog")]
    summed = load_adapters(tiny_base, files)  # which is no matter where it is asked for
    torch.testing.assert_close(*changes_of(tiny_base, summed).values(), 3 * UP @ DOWN)
    save_file({"sks": random(1, 32)}, tmp_path / "cat.safetensors")
    save_file({"sks": random(2, 32)}, tmp_path / "dog.safetensors")
    with pytest.raises(UserError, match="both change the word sks"):
        load(tiny_base, tmp_path)
    with pytest.raises(UserError, match="--to textual-inversion --token WORD"):
        load_adapters(tiny_base, files)


@pytest.mark.parametrize("around", ["", "checkpoint-1000"])
def test_a_folder_for_each_model(tiny_base: Base, tmp_path: Path, around: str) -> None:
    """As PEFT's scripts leave them; in the last of several checkpoints."""
    for step, factor in (("checkpoint-500", 7.0), (around, 1.0)):
        for model, key in (("unet", PLACE), ("text_encoder", TEXT.removeprefix("text_encoder."))):
            folder = tmp_path / step / model if around else tmp_path / model
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {
                f"base_model.model.{key}.lora_A.weight": DOWN,
                f"base_model.model.{key}.lora_B.weight": factor * UP,
            }
            save_file(tensors, folder / "adapter_model.safetensors")
            (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    changes = changes_of(tiny_base, load(tiny_base, tmp_path))
    assert changes.keys() == {f"unet.{PLACE}", TEXT}
    for found in changes.values():
        torch.testing.assert_close(found, 2 * UP @ DOWN)


def test_what_folders_without_an_adapter_hold(tiny_base: Base, tiny_base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    save_file(kohya(), tmp_path / "inner" / "dog.safetensors")
    with pytest.raises(UserError, match=r"no file of weights; folders in it do: inner[\s\S]*do: name .*inner$"):
        load(tiny_base, tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds a base[\s\S]*do: give it as --base$"):
        load(tiny_base, tmp_path)
    with pytest.raises(UserError, match="there is no concept file"):
        load(tiny_base, tmp_path / "missing.safetensors")


def test_a_refused_conversion_leaves_no_folder(tiny_base_folder: Path, tmp_path: Path) -> None:
    save_file({"sks": random(1, 32)}, tmp_path / "sks.safetensors")
    out = tmp_path / "out"
    with pytest.raises(UserError, match="a token alone"):
        main(
            [
                str(tmp_path / "sks.safetensors"),
                "--to",
                "kohya",
                "--base",
                str(tiny_base_folder),
                f"out={out}",
                "--quiet",
            ]
        )
    assert not out.exists()
    out.mkdir()
    with pytest.raises(UserError, match="a token alone"):
        main(
            [
                str(tmp_path / "sks.safetensors"),
                "--to",
                "kohya",
                "--base",
                str(tiny_base_folder),
                f"out={out}",
                "--quiet",
            ]
        )
    assert out.is_dir()


def test_a_file_that_is_called_by_a_number() -> None:
    assert ConvertConfig(file="5,a:0.5", inspect=True).files == ((Path("5"), 1.0), (Path("a"), 0.5))


@pytest.mark.parametrize("header", ["{", "[]", "[" * 100_000, '{"format_version": 2}'])
def test_one_broken_concept_stops_no_film(tmp_path: Path, caplog: pytest.LogCaptureFixture, header: str) -> None:
    (tmp_path / "run").mkdir()
    save_file({"tokens.sks": random(1, 32)}, tmp_path / "run" / "concept.safetensors", metadata={"concept": header})
    assert find_concept("a blue house", tmp_path, base_hash="x") is None
    assert "passed over" in caplog.text


CPU = torch.device("cpu")


def motion_director(widths: int = 32) -> dict[str, tuple[str, int, int]]:
    """Its names, and those of the layers here."""
    official_stem = "down_blocks.0.motion_modules.0.temporal_transformer"
    theirs, ours = f"{official_stem}.transformer_blocks.0", "down_blocks.0.motion_modules.0.transformer_blocks.0"
    return {
        f"{theirs}.attention_blocks.0.processor.to_q_lora": (f"{ours}.attn1.to_q", widths, widths),
        f"{theirs}.attention_blocks.1.to_out.processor.0_lora": (f"{ours}.attn2.to_out.0", widths, widths),
        f"{theirs}.ff.net.0.processor.proj_lora": (f"{ours}.ff.net.0.proj", 8 * widths, widths),
        f"{theirs}.ff.net.processor.2_lora": (f"{ours}.ff.net.2", widths, 4 * widths),
        f"{official_stem}.processor.proj_in_lora": ("down_blocks.0.motion_modules.0.proj_in", widths, widths),
    }


def test_motion_directors_temporal_lora(tmp_path: Path) -> None:
    save_file(
        {key: t.contiguous().clone() for key, t in official(make_adapter("v2")).items()}, tmp_path / "mm.safetensors"
    )
    motion, tensors = load_motion(tmp_path / "mm.safetensors", device=CPU), {}
    before = {name: tensor.clone() for name, tensor in motion.state_dict().items()}
    for stem, (_, out, inside) in motion_director().items():
        tensors |= {f"{stem}.up.weight": random(out, 4), f"{stem}.down.weight": random(4, inside)}
    save_file(tensors, tmp_path / "temporal.safetensors")
    fold_motion_lora(motion, tmp_path / "temporal.safetensors", strength=0.5)
    for stem, (name, *_) in motion_director().items():
        expected = before[f"{name}.weight"] + 0.5 * tensors[f"{stem}.up.weight"] @ tensors[f"{stem}.down.weight"]
        torch.testing.assert_close(motion.state_dict()[f"{name}.weight"], expected)
    changed = {name for name, tensor in motion.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name, *_ in motion_director().values()}


def test_a_folder_with_a_motion_lora(tmp_path: Path) -> None:
    adapter = make_adapter("v2")
    save_file({key: t.contiguous().clone() for key, t in official(adapter).items()}, tmp_path / "mm.safetensors")
    lora = official_lora(adapter)
    folder = tmp_path / "zoom"
    folder.mkdir()
    with pytest.raises(UserError, match="no file of weights"):
        fold_motion_lora(load_motion(tmp_path / "mm.safetensors", device=CPU), folder)
    save_file(lora, folder / "diffusion_pytorch_model.safetensors")
    torch.save(lora, folder / "other.ckpt")
    motions = [load_motion(tmp_path / "mm.safetensors", device=CPU) for _ in range(2)]
    for motion, path in zip(motions, (folder, folder / "diffusion_pytorch_model.safetensors"), strict=True):
        fold_motion_lora(motion, path)
    assert all(map(torch.equal, motions[0].state_dict().values(), motions[1].state_dict().values()))
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "pan.safetensors")
    with pytest.raises(UserError, match=r"other\.ckpt, pan\.safetensors[\s\S]*do: name the file: --motion-lora"):
        fold_motion_lora(motions[0], folder)
    with pytest.raises(UserError, match="there is no .*missing"):
        load_motion(tmp_path / "missing.ckpt", device=CPU)


@torch.no_grad()
def test_lycoris_in_a_folder_draws_as_the_file_does(tiny_base: Base, tmp_path: Path) -> None:
    tensors = {f"{KOHYA}.lokr_w1": random(4, 4), f"{KOHYA}.lokr_w2": random(8, 8)}
    for name in ("dog-000002", "dog"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    pictures = [
        sample_images(tiny_base, ["a dog"], seeds=[1], concept=load(tiny_base, path), steps=2)
        for path in (tmp_path, tmp_path / "dog.safetensors")
    ]
    assert torch.equal(*pictures)
