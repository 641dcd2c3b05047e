"""The base's training, every stage for a few steps at tiny size, on a toy world of coloured squares."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, MotionAdapter, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from cdvideo.base.loader import load_base, weights_hash
from cdvideo.config import load_config
from cdvideo.errors import UserError
from cdvideo.motion.files import load_motion
from cdvideo.world.config import MakeBaseConfig
from cdvideo.world.dataset import Item, Split, read_labels, render_split
from cdvideo.world.make_base import STAGES, make_base, render
from cdvideo.world.training import Limits

SIZE = 64
SMOKE = Path(__file__).parents[2] / "configs" / "base" / "smoke.yaml"
QUIET = Limits(quiet=True)
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


@dataclass(frozen=True)
class SquareWorld:
    """A coloured square on grey; in a clip it walks to the right."""

    size: int = SIZE

    def item(self, rng: np.random.Generator, split: Split, *, frames: int, captions: int) -> Item:
        colour = str(rng.choice(list(COLOURS)))
        top, left = rng.integers(0, self.size // 2, size=2)
        count = frames if split == "clips" else 1
        pictures = np.full((count, self.size, self.size, 3), 128, dtype=np.uint8)
        mask = np.zeros((self.size, self.size), dtype=np.uint8)
        for index in range(count):
            pictures[index, top : top + 24, left + index : left + index + 24] = COLOURS[colour]
        mask[top : top + 24, left : left + 24] = 255
        return Item(pictures, mask, [f"a {colour} square"] * captions, {"subject": colour, "thing": ""})


def smoke_config(folder: Path, *overrides: str) -> MakeBaseConfig:
    paths = [f"out={folder / 'base'}", f"cache={folder / 'world'}", f"resolution={SIZE}", "device=cpu"]
    return load_config(MakeBaseConfig, file=SMOKE, overrides=[*paths, *overrides])


def make(config: MakeBaseConfig, stages: tuple[str, ...], folder: Path, limits: Limits = QUIET) -> None:
    make_base(config, stages, limits=limits, sprites=folder / "none", export=folder / "tiny", world=SquareWorld())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MakeBaseConfig]:
    folder = tmp_path_factory.mktemp("made")
    config = smoke_config(folder)
    make(config, STAGES[1:], folder)
    return folder, config


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def test_every_stage_writes_its_part_and_its_facts(made: tuple[Path, MakeBaseConfig]) -> None:
    folder, config = made
    facts = json.loads((folder / "tiny" / "training.json").read_text())
    assert {"vae", "text", "unet", "motion"} == facts.keys()
    assert all(facts[stage]["steps"] == 3 for stage in ("vae", "text", "unet", "motion"))
    stills = {"seed": 0, "count": config.data.scenes, "captions": 2, "size": SIZE}
    assert facts["unet"]["data"] == {"train": stills}
    assert facts["vae"]["data"] == {"train": stills, "heldout": {**stills, "count": config.data.heldout_scenes}}
    assert facts["motion"]["data"] == {"clips": {**stills, "count": config.data.clips, "frames": 5}}
    for stage in ("vae", "unet", "motion"):
        assert list((config.out / stage / "samples").glob("*.png")), stage
        assert (config.out / stage / "metrics.jsonl").read_text().count("\n") == 3
    card = (folder / "tiny" / "README.md").read_text()
    assert f"{facts['unet']['parameters']:,}" in card and str(facts["vae"]["psnr_db"]) in card
    assert "dog + headphones + surfing" in card
    assert "48 stills, each with 2 captions, seed 0 (autoencoder, text encoder, image UNet)" in card
    assert "4 clips of 5 frames, each with 2 captions, seed 0 (motion modules)" in card
    assert "block_out_channels" not in json.loads((folder / "tiny" / "vae" / "config.json").read_text())


def test_exported_folder_loads_in_diffusers_and_here(made: tuple[Path, MakeBaseConfig]) -> None:
    folder, config = made
    pipe = StableDiffusionPipeline.from_pretrained(folder / "tiny")
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red square", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (SIZE, SIZE, 3)
    adapter = MotionAdapter.from_pretrained(folder / "tiny" / "motion")
    film = AnimateDiffPipeline.from_pretrained(folder / "tiny", motion_adapter=adapter)
    film.set_progress_bar_config(disable=True)
    frames = film("a red square", num_frames=4, num_inference_steps=2, output_type="np").frames[0]
    assert frames.shape == (4, SIZE, SIZE, 3)

    assert all(key.startswith("text_model.") for key in weights(folder / "tiny" / "text_encoder"))
    base = load_base(str(folder / "tiny"), device=torch.device("cpu"))
    assert base.resolution == SIZE and base.scheduler_config["rescale_betas_zero_snr"]
    motion = load_motion(folder / "tiny" / "motion", device=torch.device("cpu")).config
    assert (motion.norm_mode, motion.trained_for) == ("diffusers", base.hash)
    own, same = base.text_encoder.state_dict(), weights(config.out / "model" / "text_encoder")
    assert own.keys() == same.keys() and all(torch.equal(own[key], same[key].half().float()) for key in same)
    exported, trained = weights(folder / "tiny" / "unet"), weights(config.out / "model" / "unet")
    assert exported.keys() == trained.keys()
    assert all(torch.equal(exported[key], trained[key].half()) for key in trained)
    modes = {file.stat().st_mode for file in (folder / "tiny").rglob("*") if file.is_file()}
    assert len(modes) == 1, "weights may be read by whom the rest may be read"


@pytest.mark.parametrize("stage", ["vae", "text", "unet", "motion"])
def test_resumed_training_equals_uninterrupted(stage: str, made: tuple[Path, MakeBaseConfig], tmp_path: Path) -> None:
    folder, config = made
    shutil.copytree(config.out / "model", tmp_path / "base" / "model")
    part = {"text": "text_encoder"}.get(stage, stage)
    shutil.rmtree(tmp_path / "base" / "model" / part)
    resumed = replace(config, out=tmp_path / "base")
    make(resumed, (stage,), tmp_path, Limits(seconds=0, quiet=True))
    # No time at all: a state at step 0 that later calls go on from, one step at a time.
    for steps in (1, 3):
        stop_after(resumed, stage, steps, tmp_path)
    a, b = weights(config.out / "model" / part), weights(tmp_path / "base" / "model" / part)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def stop_after(config: MakeBaseConfig, stage: str, steps: int, folder: Path) -> None:
    """Trains until ``steps``, as if interrupted there; the schedule's end stays where the config has it."""
    from cdvideo.world import training

    def out_of_time(self: training.Stage) -> bool:
        return self.step >= steps

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Stage, "_out_of_time", out_of_time)
        make(config, (stage,), folder)


def test_rendering_is_the_same_for_any_number_of_processes_and_resumes(tmp_path: Path) -> None:
    def render_into(name: str, workers: int, count: int = 300) -> Path:
        folder = tmp_path / name
        render_split(SquareWorld(), folder, "train", count, size=SIZE, frames=4, captions=2, seed=3, workers=workers)
        return folder

    alone, together = render_into("alone", 1), render_into("together", 2)
    assert (alone / "labels.jsonl").read_text() == (together / "labels.jsonl").read_text()
    assert np.array_equal(np.load(alone / "pixels.npy"), np.load(together / "pixels.npy"))
    masks = np.load(alone / "masks.npy")
    assert masks.shape == (300, SIZE // 8, SIZE // 8) and masks.max() == 255

    text = (together / "labels.jsonl").read_text().splitlines(keepends=True)
    (together / "labels.jsonl").unlink()
    (together / "labels-00000000.jsonl").write_text("".join(text[:128]))
    pixels = np.load(together / "pixels.npy", mmap_mode="r+")
    pixels[:] = 0
    render_into("together", 1)
    again = np.load(together / "pixels.npy")
    assert not again[:128].any(), "a finished chunk was rendered again"
    assert np.array_equal(again[128:], np.load(alone / "pixels.npy")[128:])
    assert len(read_labels(together)) == 300


@pytest.mark.parametrize("change", [{"seed": 4}, {"size": 32}, {"captions": 1}, {"count": 3}, {"frames": 3}])
def test_other_settings_render_anew_and_the_same_do_not(tmp_path: Path, change: dict[str, int]) -> None:
    def render_with(**settings: int) -> str:
        render_split(SquareWorld(settings["size"]), tmp_path, "clips", workers=1, **settings)
        return (tmp_path / "labels.jsonl").read_text()

    settings = {"count": 4, "size": SIZE, "frames": 4, "captions": 2, "seed": 3}
    first = render_with(**settings)
    for file in ("caption_ids.npy", "latents.npy"):
        (tmp_path / file).touch()
    (tmp_path / "labels.jsonl").write_text("kept")
    assert render_with(**settings) == "kept"
    second = render_with(**settings | change)
    assert second != "kept" and (second == first) == (change.keys() <= {"size", "frames"})
    made = settings | change
    shape = (made["count"], made["frames"], made["size"], made["size"], 3)
    assert np.load(tmp_path / "pixels.npy").shape == shape
    assert not (tmp_path / "caption_ids.npy").exists() and not (tmp_path / "latents.npy").exists()


def test_frames_of_clips_are_nothing_to_stills(tmp_path: Path) -> None:
    for frames in (1, 4):
        render_split(SquareWorld(), tmp_path, "train", 2, size=SIZE, frames=frames, captions=2, seed=3, workers=1)
        if frames == 1:
            (tmp_path / "labels.jsonl").write_text("kept")
    assert (tmp_path / "labels.jsonl").read_text() == "kept"


def test_motion_trains_on_a_machine_that_has_the_model_and_the_clips(
    made: tuple[Path, MakeBaseConfig], tmp_path: Path
) -> None:
    _, config = made
    shutil.copytree(config.out / "model", tmp_path / "base" / "model", ignore=shutil.ignore_patterns("motion"))
    shutil.copytree(config.cache / "clips", tmp_path / "world" / "clips")
    (tmp_path / "world" / "clips" / "caption_ids.npy").unlink()
    alone = replace(config, out=tmp_path / "base", cache=tmp_path / "world")
    make(alone, ("motion",), tmp_path, Limits(seconds=0, quiet=True))
    assert (tmp_path / "base" / "model" / "motion").is_dir()
    shutil.rmtree(tmp_path / "base" / "model" / "tokenizer")
    with pytest.raises(UserError, match="stage 'motion' needs .*tokenizer"):
        make(alone, ("motion",), tmp_path)


def test_motion_modules_of_an_earlier_unet_do_not_pass_for_this_ones(
    made: tuple[Path, MakeBaseConfig], tmp_path: Path
) -> None:
    folder, config = made
    shutil.copytree(config.out / "model", tmp_path / "base" / "model")
    (file,) = (tmp_path / "base" / "model" / "unet").glob("*.safetensors")
    changed = load_file(file)
    changed["conv_in.bias"] += 1
    save_file(changed, file, metadata={"format": "pt"})
    make(replace(config, out=tmp_path / "base"), ("export",), tmp_path)
    trained_for = load_motion(tmp_path / "tiny" / "motion", device=torch.device("cpu")).config.trained_for
    assert trained_for == weights_hash(config.out / "model") != weights_hash(tmp_path / "tiny")


def test_training_goes_on_from_an_exported_base(made: tuple[Path, MakeBaseConfig], tmp_path: Path) -> None:
    folder, config = made
    shutil.copytree(folder / "tiny", tmp_path / "base" / "model")
    resumed = replace(config, out=tmp_path / "base")
    make(resumed, ("unet",), tmp_path, Limits(seconds=0, quiet=True))
    start, after = weights(folder / "tiny" / "unet"), weights(tmp_path / "base" / "model" / "unet")
    assert all(torch.equal(start[key].float(), after[key]) for key in start)
    make(resumed, ("export",), tmp_path)
    assert load_motion(tmp_path / "tiny" / "motion", device=torch.device("cpu")).config.trained_for == weights_hash(
        tmp_path / "tiny"
    )
    for part in ("unet", "vae", "text_encoder", "motion"):
        a, b = weights(folder / "tiny" / part), weights(tmp_path / "tiny" / part)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), part


def test_an_unfinished_base_is_exported_as_such(
    made: tuple[Path, MakeBaseConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, config = made
    shutil.copytree(config.out / "model", tmp_path / "base" / "model")
    shutil.rmtree(tmp_path / "base" / "model" / "motion")
    make(replace(config, out=tmp_path / "base"), ("export",), tmp_path)
    assert "without motion" in capsys.readouterr().out
    assert (tmp_path / "tiny" / "unet").is_dir() and not (tmp_path / "tiny" / "model_index.json").exists()


def test_all_world_words_become_single_tokens(made: tuple[Path, MakeBaseConfig]) -> None:
    _, config = made
    tokenizer = CLIPTokenizer.from_pretrained(config.out / "model" / "tokenizer")
    for word in ("a", "red", "green", "blue", "square"):
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1
    odd = tokenizer("Übergröße 漢字 🐶 zzyzx!?", add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in odd


def test_a_stage_without_its_forerunner_says_so(tmp_path: Path) -> None:
    config = smoke_config(tmp_path)
    with pytest.raises(UserError, match="needs .*labels.jsonl"):
        make(config, ("vae",), tmp_path)


def test_a_base_over_the_size_limit_is_refused(
    made: tuple[Path, MakeBaseConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, config = made
    monkeypatch.setattr("cdvideo.world.export.MAX_BYTES", 1000)
    with pytest.raises(UserError, match="takes"):
        make(config, ("export",), tmp_path)
    assert not (tmp_path / "tiny").exists()


def test_render_fills_all_splits(tmp_path: Path) -> None:
    config = smoke_config(tmp_path)
    render(config, ("heldout", "clips"), SquareWorld())
    assert np.load(config.cache / "clips" / "pixels.npy").shape == (4, 5, SIZE, SIZE, 3)
    assert not (config.cache / "train").exists()
