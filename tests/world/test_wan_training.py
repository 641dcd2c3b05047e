"""The embedded Wan's stages for a few steps at tiny size, on the toy world; what comes out is diffusers' own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from cdvideo.errors import UserError
from cdvideo.world.config import WAN_STAGES, MakeBaseConfig
from cdvideo.world.train_wan import TextAndTransformer, caption_ids, sample, training_times
from cdvideo.world.training import Limits
from tests.world.test_training import SIZE, make, smoke_config, stop_after, weights

PARTS = {"wan-vae": ("vae",), "wan": ("transformer", "text_encoder")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MakeBaseConfig]:
    folder = tmp_path_factory.mktemp("made")
    config = smoke_config(folder)
    make(config, WAN_STAGES[1:], folder)
    return folder, config


def test_diffusers_pipeline_films_with_the_exported_folder(made: tuple[Path, MakeBaseConfig]) -> None:
    folder, config = made
    facts = json.loads((folder / "tiny" / "training.json").read_text())
    assert facts["wan-vae"]["steps"] == facts["wan"]["steps"] == 3
    assert list((config.out / "wan" / "samples").glob("*-clips.png"))
    pipe = WanPipeline.from_pretrained(folder / "tiny")
    pipe.set_progress_bar_config(disable=True)
    film = pipe("a red square", height=SIZE, width=SIZE, num_frames=5, num_inference_steps=2, output_type="np")
    assert film.frames.shape == (1, 5, SIZE, SIZE, 3)
    exported, trained = weights(folder / "tiny" / "transformer"), weights(config.out / "model-wan" / "transformer")
    assert all(torch.equal(exported[key], trained[key].half()) for key in trained)
    words = pipe.tokenizer("A red ſ Square")["input_ids"]
    assert words[-1] == pipe.tokenizer.eos_token_id == 1 and pipe.tokenizer.unk_token_id not in words


def test_the_training_reads_text_as_the_pipeline_does(made: tuple[Path, MakeBaseConfig]) -> None:
    """512 rows of states and zeros there, folded rows here: the same velocity."""
    folder, _ = made
    pipe = WanPipeline.from_pretrained(folder / "tiny")
    states, _ = pipe.encode_prompt("a red square", do_classifier_free_guidance=False, max_sequence_length=512)
    torch.nn.init.normal_(pipe.transformer.proj_out.weight)
    latents, time = torch.randn(1, 16, 2, SIZE // 8, SIZE // 8), torch.tensor([0.7])
    with torch.no_grad():
        expected = pipe.transformer(latents, 1000 * time, states).sample
        both = TextAndTransformer(pipe.text_encoder, pipe.transformer)
        folded = both(latents, time, caption_ids(pipe.tokenizer, ["a red square"], 12))
    assert expected.std() > 0.1 and torch.allclose(folded, expected, atol=1e-5)
    assert sample(both, pipe.tokenizer, ["a square"], (16, 1, 8, 8), 12, steps=2).isfinite().all()


@pytest.mark.parametrize("stage", PARTS)
def test_resumed_training_equals_uninterrupted(stage: str, made: tuple[Path, MakeBaseConfig], tmp_path: Path) -> None:
    _, config = made
    shutil.copytree(config.out / "model-wan", tmp_path / "base" / "model-wan")
    for part in PARTS[stage]:
        shutil.rmtree(tmp_path / "base" / "model-wan" / part)
    resumed = replace(config, out=tmp_path / "base")
    make(resumed, (stage,), tmp_path, Limits(seconds=0, quiet=True))
    for steps in (1, 3):
        stop_after(resumed, stage, steps, tmp_path)
    for part in PARTS[stage]:
        a, b = weights(config.out / "model-wan" / part), weights(tmp_path / "base" / "model-wan" / part)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_training_times_are_shifted_towards_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    even = training_times(4000, shift=1, generator=generator)
    shifted = training_times(4000, shift=3, generator=generator)
    assert even.min() > 0 and shifted.max() < 1
    assert even.median() == pytest.approx(0.5, abs=0.02)
    assert shifted.median() == pytest.approx(0.75, abs=0.02)  # 3 * 0.5 / (1 + 2 * 0.5)


def test_a_stage_without_its_forerunner_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stage 'wan' needs .*\n  allowed: .*wan-vae, wan-latents, wan, wan-export"):
        make(smoke_config(tmp_path), ("wan",), tmp_path)
