"""AnimateDiff's files, written with the official names: told apart, loaded whole; and others refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from safetensors.torch import save_file
from torch import Tensor

from cdvideo.errors import UserError
from cdvideo.motion.files import load_motion, save_motion
from cdvideo.motion.lora import fold_motion_lora
from cdvideo.motion.modules import position_table
from cdvideo.motion.video_unet import VideoUNet
from tests.motion.animatediff_names import WIDTHS, make_adapter, official, official_lora

CPU = torch.device("cpu")
# As mm_sd_v15_v2.ckpt names them: what a motion module has, and modules of each kind of block.
OFFICIAL = """
down_blocks.0.motion_modules.0.temporal_transformer.norm.weight
down_blocks.0.motion_modules.0.temporal_transformer.norm.bias
down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight
down_blocks.0.motion_modules.0.temporal_transformer.proj_in.bias
down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.to_q.weight
down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.to_k.weight
down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.to_v.weight
down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.to_out.0.weight
down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.to_out.0.bias
down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.pos_encoder.pe
down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.1.to_q.weight
down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.1.pos_encoder.pe
down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.norms.0.weight
down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.norms.1.bias
down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.ff.net.0.proj.weight
down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.ff.net.2.bias
down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.ff_norm.weight
down_blocks.0.motion_modules.0.temporal_transformer.proj_out.weight
down_blocks.3.motion_modules.1.temporal_transformer.proj_out.bias
up_blocks.3.motion_modules.2.temporal_transformer.proj_out.bias
mid_block.motion_modules.0.temporal_transformer.norm.weight
""".split()


def assert_equals(motion: torch.nn.Module, adapter: MotionAdapter) -> None:
    ours, theirs = motion.state_dict(), adapter.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def image_unet() -> UNet2DConditionModel:
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=WIDTHS, cross_attention_dim=24, attention_head_dim=8, layers_per_block=2
    )
    return unet.eval().requires_grad_(False)


def test_names_are_the_official_ones() -> None:
    names = official(make_adapter("v2"))
    assert set(OFFICIAL) <= names.keys()
    full = MotionAdapter(use_motion_mid_block=True)
    assert len(names) == len(full.state_dict()) + 21, "two position tables in each of 21 motion modules"


WRAPPED = {
    "plain.safetensors": lambda weights: weights,
    "plain.ckpt": lambda weights: weights,
    "wrapped.ckpt": lambda weights: {"state_dict": weights, "global_step": 5, "animatediff_config": {"a": 1}},
    "trained.ckpt": lambda weights: {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in weights.items()}},
    "half.safetensors": lambda weights: {name: tensor.half() for name, tensor in weights.items()},
}


def write(path: Path, content: dict[str, Any]) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("file", WRAPPED)
def test_every_wrapping_loads_whole(tmp_path: Path, file: str) -> None:
    adapter = make_adapter("v2")
    path = write(tmp_path / file, WRAPPED[file](official(adapter)))
    dtype = torch.float16 if file.startswith("half") else torch.float32
    said: list[str] = []
    motion = load_motion(path, device=CPU, dtype=dtype, report=said.append)
    assert_equals(motion, adapter.to(dtype))
    count = len(adapter.state_dict())
    assert said == [
        f"motion {path}: AnimateDiff v2, matched {count}/{count}, up to 32 frames, betas linear, "
        "GroupNorm over each frame"
    ]
    assert not any(parameter.requires_grad for parameter in motion.parameters())


@pytest.mark.parametrize(
    ("version", "file", "said", "frames", "joint", "spacing"),
    [
        ("v1", "mm_sd_v14.ckpt", "AnimateDiff v1", 24, True, None),
        ("v2", "mm_sd_v15_v2.ckpt", "AnimateDiff v2", 32, False, None),
        ("v3", "v3_sd15_mm.ckpt", "AnimateDiff v3", 32, False, None),
        ("v2", "animatediff_lightning_4step_comfyui.safetensors", "AnimateDiff-Lightning", 32, False, "trailing"),
    ],
)
def test_versions_are_told_by_their_keys(
    tmp_path: Path, version: str, file: str, said: str, frames: int, joint: bool, spacing: str | None
) -> None:
    reports: list[str] = []
    path = write(tmp_path / file, official(make_adapter(version)))
    motion = load_motion(path, device=CPU, report=reports.append)
    config = motion.config
    assert said in reports[0]
    assert (motion.max_frames, config.joint_image_norms, config.norm_mode) == (frames, joint, "original")
    assert config.schedule["beta_schedule"] == "linear" and config.schedule.get("timestep_spacing") == spacing
    assert ("made for 4 steps of euler with guidance 1" in reports[0]) == (spacing is not None)


def test_lightning_in_diffusers_keys(tmp_path: Path) -> None:
    adapter = make_adapter("v2")
    path = write(tmp_path / "animatediff_lightning_4step_diffusers.safetensors", adapter.state_dict())
    motion = load_motion(path, device=CPU)
    assert_equals(motion, adapter)
    assert motion.config.schedule["timestep_spacing"] == "trailing"


def test_animatelcm_has_no_position_table(tmp_path: Path) -> None:
    adapter = make_adapter("v2")
    weights = {name: tensor for name, tensor in official(adapter).items() if "pos_encoder" not in name}
    motion = load_motion(write(tmp_path / "sd15_t2v_beta.ckpt", weights), device=CPU)
    assert motion.max_frames == 64
    table = motion.state_dict()["down_blocks.0.motion_modules.0.transformer_blocks.0.pos_embed.pe"]
    assert torch.equal(table, position_table(64, WIDTHS[0]))
    name = "up_blocks.1.motion_modules.2.transformer_blocks.0.attn2.to_v.weight"
    assert torch.equal(motion.state_dict()[name], adapter.state_dict()[name])


def test_a_folder_of_diffusers_gets_the_same_settings_as_the_file(tmp_path: Path) -> None:
    adapter = make_adapter("v1")
    adapter.save_pretrained(tmp_path / "folder")
    from_file = load_motion(write(tmp_path / "mm_sd_v15.ckpt", official(adapter)), device=CPU)
    for path in (tmp_path / "folder", tmp_path / "folder" / "diffusion_pytorch_model.safetensors"):
        assert load_motion(path, device=CPU).config == from_file.config
    save_motion(from_file, tmp_path / "ours")
    assert load_motion(tmp_path / "ours", device=CPU).config == from_file.config


@torch.no_grad()
def test_a_file_gives_the_film_that_the_folder_gives(tmp_path: Path, image_unet: UNet2DConditionModel) -> None:
    adapter = make_adapter("v3")
    adapter.save_pretrained(tmp_path / "folder")
    paths = [tmp_path / "folder", write(tmp_path / "v3_sd15_mm.ckpt", official(adapter))]
    latents_BFCHW, text_BLD = torch.randn(1, 3, 4, 8, 8), torch.randn(1, 5, 24)
    films = [VideoUNet(image_unet, load_motion(path, device=CPU))(latents_BFCHW, 10, text_BLD) for path in paths]
    assert torch.equal(*films)
    assert films[0].std() > 0.01


@pytest.mark.parity
@pytest.mark.parametrize(
    ("version", "file"),
    [
        ("v1", "mm_sd_v15.ckpt"),
        ("v2", "mm_sd_v15_v2.ckpt"),
        ("v3", "v3_sd15_mm.ckpt"),
        ("v2", "animatediff_lightning_4step_comfyui.safetensors"),
        ("v2", "AnimateLCM_sd15_t2v.ckpt"),
    ],
)
@torch.no_grad()
def test_every_file_is_what_diffusers_makes_of_its_weights(
    tmp_path: Path, image_unet: UNet2DConditionModel, version: str, file: str
) -> None:
    """Against UNetMotionModel, whose GroupNorms are the motion modules' joint and the image model's per frame."""
    adapter = make_adapter(version)
    weights = official(adapter)
    if "LCM" in file:
        weights = {name: tensor for name, tensor in weights.items() if "pos_encoder" not in name}
    motion = load_motion(write(tmp_path / file, weights), device=CPU, norm_mode="diffusers")
    motion.config = replace(motion.config, joint_image_norms=False)
    latents_BFCHW, text_BLD = torch.randn(1, 3, 4, 8, 8), torch.randn(1, 5, 24)
    ours = VideoUNet(image_unet, motion)(latents_BFCHW, 10, text_BLD)
    peer = UNetMotionModel.from_unet2d(image_unet, adapter).eval()
    text_NLD = text_BLD.repeat_interleave(3, dim=0)
    theirs = peer(latents_BFCHW.transpose(1, 2), 10, text_NLD).sample.transpose(1, 2)
    still = image_unet(latents_BFCHW.flatten(0, 1), 10, text_NLD).sample.unflatten(0, (1, 3))
    assert (ours - still).abs().max() > 1e-2, "motion has an effect"
    assert (ours - theirs).abs().max() <= 1e-4


def test_the_whole_unet_that_animatediffs_training_saves(tmp_path: Path, image_unet: UNet2DConditionModel) -> None:
    adapter = make_adapter("v3")
    said: list[str] = []
    content = {f"module.{name}": tensor for name, tensor in {**image_unet.state_dict(), **official(adapter)}.items()}
    motion = load_motion(write(tmp_path / "checkpoint.ckpt", content), device=CPU, report=said.append)
    assert_equals(motion, adapter)
    assert f"{len(image_unet.state_dict())} tensors of an image model" in said[0]


def domain_adapter() -> dict[str, Tensor]:
    stem = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
    return {f"{stem}.down.weight": torch.ones(2, 32), f"{stem}.up.weight": torch.ones(32, 2)}


STEM = "down_blocks.0.motion_modules.0.temporal_transformer"
OTHER_KINDS: dict[str, Any] = {
    "a motion LoRA": lambda: official_lora(make_adapter("v2")),
    r"the domain adapter of AnimateDiff v3[\s\S]*LoRAs for images to --concept": domain_adapter,
    "PIA": lambda: {**official(make_adapter("v3")), "conv_in.weight": torch.ones(32, 9, 3, 3)},
    "SparseCtrl": lambda: {"controlnet_cond_embedding.conv_in.weight": torch.ones(1)},
    "an image model": lambda: {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)},
    "no motion modules": lambda: {"something": torch.ones(1)},
    "1 unknown keys, such as stranger": lambda: {**official(make_adapter("v3")), "stranger": torch.ones(1)},
    r"1 unknown or of another shape \(such as .*stranger": lambda: {
        **official(make_adapter("v3")),
        f"{STEM}.stranger": torch.ones(1),
    },
    "1 missing": lambda: {k: v for k, v in official(make_adapter("v3")).items() if k != f"{STEM}.proj_in.bias"},
    "two different position tables": lambda: {
        **official(make_adapter("v3")),
        f"{STEM}.transformer_blocks.0.attention_blocks.1.pos_encoder.pe": torch.ones(1, 32, 32),
    },
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_files_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "file.ckpt", OTHER_KINDS[kind]())
    with pytest.raises(UserError, match=rf"(file\.ckpt|motion weights)[\s\S]*{kind}"):
        load_motion(path, device=CPU)


def test_too_many_frames_for_v1(tmp_path: Path, image_unet: UNet2DConditionModel) -> None:
    motion = load_motion(write(tmp_path / "mm_sd_v15.ckpt", official(make_adapter("v1"))), device=CPU)
    with pytest.raises(UserError, match=r"25 frames[\s\S]*1 to 24 frames[\s\S]*--frames 24"):
        VideoUNet(image_unet, motion)(torch.randn(1, 25, 4, 8, 8), 10, torch.randn(1, 5, 24))


def test_modules_of_another_base(tmp_path: Path, tiny_unet: UNet2DConditionModel) -> None:
    motion = load_motion(write(tmp_path / "mm.ckpt", official(make_adapter("v2"))), device=CPU)
    with pytest.raises(UserError, match=r"\(32, 64, 64, 64\)[\s\S]*\(16, 32\)"):
        VideoUNet(tiny_unet, motion)


LORA_FORMS: dict[str, Any] = {
    "released.ckpt": lambda name: name,
    "converted.safetensors": lambda name: (
        "unet."
        + name.replace(".temporal_transformer", "")
        .replace("attention_blocks.0", "attn1")
        .replace("attention_blocks.1", "attn2")
    ),
    "peft.safetensors": lambda name: (
        LORA_FORMS["converted.safetensors"](name)
        .replace(".processor", "")
        .replace("to_out_lora", "to_out.0_lora")
        .replace("_lora.down", ".lora_A")
        .replace("_lora.up", ".lora_B")
    ),
}


@pytest.mark.parametrize("file", LORA_FORMS)
def test_motion_loras_fold_into_the_weights(tmp_path: Path, file: str) -> None:
    adapter = make_adapter("v2")
    lora = official_lora(adapter)
    place = "up_blocks.2.motion_modules.1"
    inner = f"{place}.temporal_transformer.transformer_blocks.0.attention_blocks.1.processor.to_out_lora"
    assert f"{inner}.down.weight" in lora
    motion = load_motion(write(tmp_path / "mm.ckpt", official(adapter)), device=CPU)
    said: list[str] = []
    path = write(tmp_path / file, {LORA_FORMS[file](name): tensor for name, tensor in lora.items()})
    fold_motion_lora(motion, path, strength=0.5, report=said.append)

    before, after = adapter.state_dict(), motion.state_dict()
    name = f"{place}.transformer_blocks.0.attn2.to_out.0.weight"
    change = 0.5 * lora[f"{inner}.up.weight"] @ lora[f"{inner}.down.weight"]
    assert (after[name] - before[name] - change).abs().max() < 1e-5
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert len(changed) == len(lora) // 2 == 21 * 2 * 4
    assert f"matched {len(lora)}/{len(lora)}" in said[0]
    assert torch.equal(
        torch.load(tmp_path / "mm.ckpt", weights_only=True)[OFFICIAL[4]], official(adapter)[OFFICIAL[4]]
    ), "the file stays"


def _add_stranger(lora: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**lora, "down_blocks.0.motion_modules.0.temporal_transformer.stranger_lora.down.weight": torch.ones(1)}


def _drop_one(lora: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(list(lora.items())[1:])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda lora: lora, "made for AnimateDiff v2, which has a middle block"),
        (lambda lora: _add_stranger({k: v for k, v in lora.items() if "mid" not in k}), "1 of .* keys .*stranger_lora"),
        (lambda lora: _drop_one({k: v for k, v in lora.items() if "mid" not in k}), "half a pair"),
        (lambda lora: {k: v * 0 for k, v in lora.items() if "mid" not in k}, "changes nothing"),
        (lambda _: domain_adapter(), "a LoRA for the image model"),
        (lambda _: official(make_adapter("v3")), "no motion LoRA"),
    ],
)
def test_motion_loras_without_a_place_are_refused(tmp_path: Path, damage: Any, said: str) -> None:
    motion = load_motion(write(tmp_path / "v3.ckpt", official(make_adapter("v3"))), device=CPU)
    before = {name: tensor.clone() for name, tensor in motion.state_dict().items()}
    path = write(tmp_path / "lora.ckpt", damage(official_lora(make_adapter("v2"))))
    with pytest.raises(UserError, match=said):
        fold_motion_lora(motion, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in motion.state_dict().items())
