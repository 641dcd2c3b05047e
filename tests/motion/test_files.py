"""Motion folders: ours in diffusers, diffusers' in ours, and the damaged ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import MotionAdapter
from safetensors.torch import load_file, save_file

from cdvideo.base.loader import TINY_BASE, weights_hash
from cdvideo.errors import UserError
from cdvideo.motion.config import MotionConfig
from cdvideo.motion.files import load_motion, save_motion
from cdvideo.motion.modules import MotionModules

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_motion(**options: Any) -> MotionModules:
    torch.manual_seed(0)
    config = MotionConfig(
        block_out_channels=(16, 32),
        motion_layers_per_block=(1, 2),
        motion_num_attention_heads=4,
        motion_norm_num_groups=8,
        **options,
    )
    motion = MotionModules(config)
    for parameter in motion.parameters():
        torch.nn.init.normal_(parameter)
    return motion


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_save_then_load_is_bit_equal(tmp_path: Path) -> None:
    motion = make_motion(norm_mode="diffusers", trained_for="0123456789abcdef")
    save_motion(motion, tmp_path / "motion")
    loaded = load_motion(tmp_path / "motion", device=CPU)
    assert loaded.config == motion.config
    assert_same_weights(loaded, motion)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert len({file.stat().st_mode for file in (tmp_path / "motion").iterdir()}) == 1


def test_loading_reports_the_match(tmp_path: Path) -> None:
    save_motion(make_motion(), tmp_path)
    said: list[str] = []
    load_motion(tmp_path, device=CPU, report=said.append)
    count = len(load_file(tmp_path / WEIGHTS))
    assert said == [
        f"motion {tmp_path}: motion modules, matched {count}/{count}, up to 32 frames, betas as the base has them, "
        "GroupNorm over each frame"
    ]


def test_embedded_motion_modules_name_the_embedded_base() -> None:
    assert load_motion(TINY_BASE / "motion", device=CPU).config.trained_for == weights_hash(TINY_BASE)


def test_diffusers_loads_ours_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    motion = make_motion(norm_mode="diffusers", trained_for="0123456789abcdef", use_motion_mid_block=False)
    save_motion(motion, tmp_path)
    adapter, report = MotionAdapter.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_weights(adapter, motion)
    assert adapter.config["motion_layers_per_block"] == [1, 2]
    assert "not expected" not in caplog.text


def test_ours_loads_diffusers(tmp_path: Path) -> None:
    adapter = MotionAdapter(
        block_out_channels=(16, 32),
        motion_num_attention_heads=(2, 4),
        motion_norm_num_groups=8,
        motion_max_seq_length=24,
    )
    adapter.save_pretrained(tmp_path)
    loaded = load_motion(tmp_path, device=CPU)
    assert_same_weights(loaded, adapter)
    assert loaded.max_frames == 24
    assert loaded.config.norm_mode == "original", "a folder that says nothing holds an AnimateDiff checkpoint"
    assert load_motion(tmp_path, device=CPU, norm_mode="diffusers").config.norm_mode == "diffusers"


def test_loads_variants_and_dtype(tmp_path: Path) -> None:
    motion = make_motion()
    save_motion(motion.half(), tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    loaded = load_motion(tmp_path, device=CPU, dtype=torch.float32)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(
        loaded.up_blocks[0].motion_modules[0].proj_in.weight,
        motion.up_blocks[0].motion_modules[0].proj_in.weight.float(),
    )


def test_a_file_without_position_tables_gets_the_computed_ones(tmp_path: Path) -> None:
    motion = make_motion()
    save_motion(motion, tmp_path)
    weights = {name: tensor for name, tensor in load_file(tmp_path / WEIGHTS).items() if not name.endswith("pe")}
    save_file(weights, tmp_path / WEIGHTS)
    assert_same_weights(load_motion(tmp_path, device=CPU), motion)


def _drop_key(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["mid_block.motion_modules.0.proj_out.bias"]
    save_file(weights, folder / WEIGHTS)


def _add_key(folder: Path) -> None:
    save_file({**load_file(folder / WEIGHTS), "stranger": torch.zeros(1)}, folder / WEIGHTS)


def _change_shape(folder: Path) -> None:
    name = "up_blocks.0.motion_modules.0.proj_in.weight"
    save_file({**load_file(folder / WEIGHTS), name: torch.zeros(3, 3)}, folder / WEIGHTS)


def _truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])


def _remove_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def _remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _another_class(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))


def _broken_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_a_list, "can not read config.json"),
        (_drop_key, r"matched \d+/\d+, 1 missing, 0 unknown"),
        (_add_key, r"0 missing, 1 unknown.*stranger"),
        (_change_shape, r"1 missing, 1 unknown.*proj_in"),
        (_truncate, "can not be read"),
        (_remove_weights, "without weights"),
        (_remove_config, "can not read config.json"),
        (_another_class, "UNet2DConditionModel"),
        (_broken_json, "can not read config.json"),
    ],
)
def test_damaged_folders_say_what_is_wrong(tmp_path: Path, damage: Any, said: str) -> None:
    save_motion(make_motion(), tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=said):
        load_motion(tmp_path, device=CPU)


def test_config_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(UserError, match="3 temporal attention heads over 16 channels"):
        MotionConfig(block_out_channels=(16, 32), motion_norm_num_groups=8, motion_num_attention_heads=3)


def test_config_refuses_wrong_number_of_blocks() -> None:
    with pytest.raises(UserError, match="for 2 blocks"):
        MotionConfig(block_out_channels=(16, 32), motion_norm_num_groups=8, motion_layers_per_block=(1, 1, 1))
