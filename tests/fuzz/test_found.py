"""What fuzzing has found, each with what is right."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from cdvideo.base.checkpoint import read_tensors
from cdvideo.base.loader import Base, find_base
from cdvideo.base.text import tokenize
from cdvideo.concept.config import ConceptConfig
from cdvideo.concept.drift_file import load_drift
from cdvideo.concept.file import load_concept, save_concept
from cdvideo.concept.state import TrainState
from cdvideo.config import as_path, load_config
from cdvideo.errors import UserError
from cdvideo.interchange.inspect import describe
from cdvideo.interchange.load import load_adapters
from cdvideo.media.clips import iter_clip
from cdvideo.media.images import read_pictures
from cdvideo.motion.config import MotionConfig
from cdvideo.motion.files import load_motion
from cdvideo.sampling.config import AnimateConfig
from tests.fuzz.hostile import put
from tests.fuzz.test_media import _claiming, frame
from tests.interchange.parts import ADAPTERS, learned, random
from tests.motion.animatediff_names import make_adapter, official

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: !!int ''", "line 1, column 8"),
        ("steps: !!bool maybe", "not of the kind 'bool'"),
        ("steps: !!timestamp soon", "not of the kind 'timestamp'"),
        ("steps: !!map [1]", "expected a mapping node"),
        ("steps: " + "[" * 60 + "]" * 60, "nested more than 50 times"),
        ("#" * 100_001, "too large"),
    ],
)
def test_yaml_tells_where_a_value_is_impossible(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config(ConceptConfig, file=put(tmp_path / "a.yaml", text))


@pytest.mark.parametrize("text", ["a" * 300, "a\0b", "~nobody-of-this-name/x"])
def test_texts_that_no_path_can_be(text: str) -> None:
    for read in (as_path, find_base):
        with pytest.raises(UserError, match="can not be used as a path"):
            read(text)
    with pytest.raises(UserError, match="1 fault in the settings:\n    start.video: .* can not be used as a path"):
        load_config(AnimateConfig, overrides=["prompt=a dog", f"start.video={text}"])
    with pytest.raises(UserError, match="1 fault in the settings:\n    .* can not be used as a path"):
        load_config(AnimateConfig, overrides=["prompt=a dog", f"concept={text}"])


def test_paths_stay_as_they_are(tmp_path: Path) -> None:
    assert as_path(f"{tmp_path}/nothing/there") == tmp_path / "nothing" / "there"
    assert as_path("~/x") == Path.home() / "x" and as_path("é.pt") == Path("é.pt")


def test_prompts_that_no_tokenizer_takes(tiny_base: Base) -> None:
    for prompt, do in (("a dog \udce9", "UTF-8"), ("dog " * 6_000, "shorten")):
        with pytest.raises(UserError, match=do):
            tokenize(tiny_base.tokenizer, [prompt])
        with pytest.raises(UserError, match="prompt="):
            load_config(AnimateConfig, overrides=[f"prompt={prompt}"])


def small_state() -> TrainState:
    weight = torch.ones(2, 2, requires_grad=True)
    state = TrainState({"weight": weight}, torch.optim.AdamW([weight]), torch.amp.GradScaler("cpu"), {"lr": "1"})
    weight.sum().backward()
    state.optimizer.step()
    return state


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("parameter.weight", None),
        ("parameter.weight", torch.ones(3)),
        ("optimizer.0.step", None),
        ("optimizer.0.exp_avg", torch.ones(3)),
        ("optimizer.7.step", torch.ones(())),
        ("stranger", torch.ones(1)),
    ],
)
def test_a_state_is_taken_whole_or_not_at_all(tmp_path: Path, name: str, tensor: torch.Tensor | None) -> None:
    small_state().save(tmp_path / "whole.safetensors", 3)
    from safetensors import safe_open

    with safe_open(tmp_path / "whole.safetensors", framework="pt") as file:
        keys, header = file.keys(), file.metadata()
        tensors = {key: file.get_tensor(key) for key in keys}
    changed = {key: each for key, each in {**tensors, name: tensor}.items() if each is not None}
    save_file(changed, tmp_path / "state.safetensors", metadata=header)
    state = small_state()
    before = state.parameters["weight"].detach().clone()
    with pytest.raises(UserError, match="a whole state"):
        state.load(tmp_path / "state.safetensors")
    assert torch.equal(state.parameters["weight"], before)
    assert small_state().load(tmp_path / "whole.safetensors") == 3


@pytest.mark.parametrize(
    "about", [None, [], {"concepts": {}}, {"text_steps": [0], "attention_steps": [0], "concepts": 3}]
)
def test_a_drift_file_of_another_form(tmp_path: Path, about: Any) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "drift.safetensors", metadata={"drift": json.dumps(about)})
    with pytest.raises(UserError, match="can not be read as a record of drift"):
        load_drift(tmp_path / "drift.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"block_out_channels": []}, "0 blocks"),
        ({"motion_norm_num_groups": None}, "motion_norm_num_groups"),
        ({"motion_norm_num_groups": 5}, "in 5 groups"),
        ({"motion_max_seq_length": 10**9}, "motion_max_seq_length=1000000000"),
        ({"motion_max_seq_length": 60_000, "motion_transformer_layers_per_block": 8}, "MB of position tables"),
        ({"motion_layers_per_block": 60_000}, "layers with"),
        ({"motion_layers_per_block": "2"}, "motion_layers_per_block"),
        ({"motion_transformer_layers_per_mid_block": None}, "motion_transformer_layers_per_mid_block"),
        ({"_sampler": "lcm"}, "sampler=lcm without steps and guidance"),
        ({"_beta_end": 2.0}, "beta_end=2.0"),
    ],
)
def test_motion_configs_are_checked_before_anything_is_built(tmp_path: Path, change: Any, said: str) -> None:
    make_adapter("v2", widths=(32, 32)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    put(tmp_path / "config.json", json.dumps({**config, **change}))
    with pytest.raises(UserError, match=said):
        load_motion(tmp_path, device=CPU)


def test_the_widest_motion_modules_there_are_stay_allowed() -> None:
    for widths in ((320, 640, 1280, 1280), (320, 640, 1280)):
        assert MotionConfig(block_out_channels=widths, motion_max_seq_length=1024).block_out_channels == widths


@pytest.mark.parametrize("block", ["10", "99", "1000000000", "1" + "0" * 4999])
def test_motion_files_that_count_high(tmp_path: Path, block: str) -> None:
    weights = official(make_adapter("v1", widths=(32, 32, 32, 32)))
    name = next(iter(weights))
    save_file(
        {**weights, name.replace("down_blocks.0", f"down_blocks.{block}"): weights[name].clone()},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(UserError, match="such as down_blocks|without a norm|a name of 50.. characters|in 4 blocks of"):
        load_motion(tmp_path / "a.safetensors", device=CPU)


def test_a_zip_with_a_damaged_directory(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    raw = buffer.getvalue()
    put(tmp_path / "a.pt", raw.replace(b"PK\x01\x02", b"PK\x09\x09"))
    assert zipfile.is_zipfile(tmp_path / "a.pt")
    with pytest.raises(UserError, match="damaged"):
        read_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("suffix", ["png", "gif", "webp"])
def test_few_bytes_that_claim_a_large_picture(tmp_path: Path, suffix: str) -> None:
    buffer = io.BytesIO()
    frame().save(buffer, suffix)
    put(tmp_path / f"a.{suffix}", _claiming(buffer.getvalue(), 10_000, 10_000))
    with pytest.raises(UserError, match="10000 x 10000 pixels in . kB: it is damaged, or nearly empty"):
        read_pictures(tmp_path)
    with pytest.raises(UserError):
        next(iter_clip(tmp_path / f"a.{suffix}"))


def test_progressive_pictures_are_held_whole_and_so_bounded(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    frame().save(buffer, "JPEG", progressive=True)
    put(tmp_path / "a.jpg", _claiming(buffer.getvalue(), 9_000, 9_000) + bytes(500_000))
    with pytest.raises(UserError, match="progressive JPEG, more than 64 million"):
        read_pictures(tmp_path)


def test_a_large_plain_picture_is_still_read(tmp_path: Path) -> None:
    Image.effect_noise((7_000, 4_000), 30).save(tmp_path / "a.jpg", quality=10)
    (picture,) = read_pictures(tmp_path, short_side=512)
    assert picture.image.size == (896, 512)


def test_frames_in_a_folder_are_as_bounded_as_those_of_films(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    frame().save(buffer, "JPEG")
    put(tmp_path / "0.jpg", _claiming(buffer.getvalue(), 10_000, 22_000) + bytes(2_000_000))
    with pytest.raises(UserError, match="more than 67 million"):
        next(iter_clip(tmp_path))


@pytest.mark.parametrize("part", ["A", "B"])
def test_concept_files_with_half_a_pair(tmp_path: Path, tiny_base: Base, part: str) -> None:
    concept = learned(tiny_base, ADAPTERS["lora"])
    name = next(name for name in concept.weights if name.endswith(f"lora_{part}.weight"))
    for value in (None, torch.ones(()), concept.weights[name][:0], concept.weights[name].transpose(0, 1).contiguous()):
        weights = {**concept.weights, name: value} if value is not None else dict(concept.weights)
        if value is None:
            del weights[name]
        save_concept(type(concept)(concept.tokens, weights, concept.metadata), tmp_path / "a.safetensors")
        with pytest.raises(UserError, match="no place for"):
            load_concept(tmp_path / "a.safetensors", base=tiny_base)


def test_concept_files_of_a_lora_without_alpha(tmp_path: Path, tiny_base: Base) -> None:
    concept = learned(tiny_base, ADAPTERS["lora"])
    del concept.metadata.adapter_settings["alpha"]
    save_concept(concept, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="adapter_settings in its metadata are of another type"):
        load_concept(tmp_path / "a.safetensors", base=tiny_base)


ROW = random(2, 32)
STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
PAIR = {f"{STEM}.lora_down.weight": random(2, 32), f"{STEM}.lora_up.weight": random(32, 2)}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({**PAIR, f"{STEM}.alpha": torch.zeros(0)}, "alpha holds 0 numbers"),
        ({**PAIR, f"{STEM}.alpha": torch.ones(3)}, "alpha holds 3 numbers"),
        (dict.fromkeys(PAIR, None), "no tensor|none of the files"),
        ({"unet": nn.Parameter(ROW), "modifier_token": {"<new1>": ROW}}, "no whole delta"),
        ({"unet": {}, "modifier_token": [ROW]}, "no whole delta|no tensor"),
        ({"unet": {"a": {"u": ROW, "v": ROW}}}, "no whole delta"),
        ({"clip_l": torch.ones(()), "clip_g": torch.ones(())}, "made for SDXL"),
    ],
)
def test_adapters_with_wrong_things_in_them(tmp_path: Path, tiny_base: Base, content: Any, said: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=said):
        describe(tmp_path / "a.pt")
        load_adapters(tiny_base, [(tmp_path / "a.pt", 1.0)])


def test_a_lora_of_strength_0_changes_nothing(tmp_path: Path, tiny_base: Base) -> None:
    stem = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file(
        {f"{stem}.lora_A.weight": random(2, 32), f"{stem}.lora_B.weight": random(32, 2)},
        tmp_path / "adapter_model.safetensors",
    )
    put(tmp_path / "adapter_config.json", json.dumps({"lora_alpha": 0, "r": 2, "peft_type": "LORA"}))
    with pytest.raises(UserError, match="changes nothing"):
        load_adapters(tiny_base, [(tmp_path, 1.0)])
