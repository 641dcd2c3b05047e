"""scripts/benchmark.py sampler, decode and length from end to end on the tiny models; what their tables say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cdvideo.base.loader import load_base
from cdvideo.cli import run_main
from cdvideo.concept.adapters import unfit_weights
from cdvideo.concept.file import SAMPLE_CONCEPT, load_concept, save_concept
from cdvideo.concept.kv import kv_projections
from cdvideo.evaluation.benchmark_films import SPEEDS
from cdvideo.evaluation.benchmark_main import main
from cdvideo.evaluation.benchmark_random import random_sd15
from cdvideo.evaluation.benchmark_sampler import as_markdown, spread
from cdvideo.evaluation.benchmark_side import SIDES, another_concept
from cdvideo.motion.files import save_motion
from cdvideo.motion.modules import MotionModules
from cdvideo.sampling.speed import PRESETS
from tests.recipes.test_animate import save_tiny_concept

CPU = torch.device("cpu")


@pytest.fixture
def base_folder(tmp_path: Path, tiny_base_folder: Path) -> Path:
    """The tiny base with motion modules that reach 8 frames."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base_folder, folder)
    pipeline = {"_class_name": "StableDiffusionPipeline", "feature_extractor": [None, None]}
    pipeline |= {"safety_checker": [None, None], "image_encoder": [None, None]}
    pipeline |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderTiny"]}
    pipeline |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    pipeline |= {"scheduler": ["diffusers", "DDIMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(pipeline))
    base = load_base(str(folder), device=CPU)
    motion = MotionModules.for_unet(base.unet, motion_num_attention_heads=2, motion_max_seq_length=8)
    for parameter in motion.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    save_motion(motion, folder / "motion")
    return folder


def bench(base: Path, out: Path, *argv: str) -> dict[str, Any]:
    assert run_main(main, [*argv, "--base", str(base), "--pairs", "2", "--out", str(out), "prompt=a dog"]) == 0
    result: dict[str, Any] = json.loads((out / f"results-{argv[0]}.json").read_text())
    return result


def test_a_film_is_timed_against_diffusers(
    base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--frames", "3", "--steps", "2", "--peers", "documented", "--peak-tflops", "0.5"]
    result = bench(base_folder, tmp_path / "out", "sampler", *short)
    (group,) = result["groups"]
    theirs, own = group["rows"]
    assert (theirs["side"], own["side"]) == ("documented", "exact")
    assert own["psnr_db"]["min"] > 60 and own["contrast"] > 2, "the same film, and one with something to see"
    assert [len(one["seconds"]["all"]) for one in (theirs, own)] == [2, 2]
    ratios = [peer / mine for peer, mine in zip(theirs["seconds"]["all"], own["seconds"]["all"], strict=True)]
    assert own["times_faster"]["all"] == pytest.approx(ratios, rel=0.05)
    assert 50e6 < own["peak_bytes"] < 5e9 and own["run_bytes"] <= own["peak_bytes"]
    assert 0.5 < own["flops"] / theirs["flops"] <= 1.01
    assert own["share_of_peak"] == pytest.approx(own["tflops"] / 0.5, rel=0.1, abs=2e-4)
    assert group["versions"].keys() == {"torch", "diffusers", "transformers"}
    assert str(tmp_path) not in json.dumps(result), "no folders of a machine"
    said = capsys.readouterr().out
    assert (tmp_path / "out" / "results-sampler.md").read_text() in said
    assert "| documented |" in said and "times faster" in said


@pytest.mark.slow
def test_decoding_is_timed_against_diffusers(base_folder: Path, tmp_path: Path) -> None:
    (group,) = bench(base_folder, tmp_path / "out", "decode", "--frames", "5", "--quiet")["groups"]
    theirs, own = group["rows"]
    assert own["psnr_db"]["min"] > 45 and own["seconds"]["median"] > 0 and theirs["side"] == "decode-diffusers"


@pytest.mark.slow
def test_lengths_are_compared_with_the_shortest(base_folder: Path, tmp_path: Path) -> None:
    (group,) = bench(base_folder, tmp_path / "out", "length", "--steps", "1", "--quiet", "lengths=[2,4]")["groups"]
    shortest, longer = group["rows"]
    assert (shortest["side"], shortest["linear"]["all"]) == ("2 frames", [1, 1])
    assert (longer["side"], longer["linear"]["median"] > 0) == ("4 frames", True)


@pytest.mark.slow
def test_films_of_many_concepts_are_each_as_alone(
    base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / f"{token}.safetensors" for token in ("sks", "tom", "rex")]
    for seed, file in enumerate(files):
        save_tiny_concept(base_folder, file, token=file.stem)
        save_concept(another_concept(load_concept(file), seed=seed), file)
    named = ["--films", "3", "--concepts", ",".join(map(str, files))]
    short = ["--frames", "3", "--steps", "2", "--pairs", "2"]
    assert run_main(main, ["concepts", "--base", str(base_folder), "--out", str(tmp_path), *named, *short]) == 0
    result = json.loads((tmp_path / "results-concepts.json").read_text())
    assert result["film"]["concepts"] == "sks.safetensors, tom.safetensors, rex.safetensors"
    assert str(tmp_path) not in json.dumps(result)
    (group,) = result["groups"]
    one, many, alone = group["rows"]
    assert (one["side"], many["side"], group["dtype"]) == ("one concept", "many concepts", "float32")
    assert many["from_one_by_one"] <= 1e-4 and many["from_one_concept"] > 1e-3
    ratios = [own / least for own, least in zip(many["seconds"]["all"], one["seconds"]["all"], strict=True)]
    assert many["time_ratio"]["all"] == pytest.approx(ratios, rel=0.05) and one["time_ratio"]["all"] == [1, 1]
    assert many["peak_ratio"] == pytest.approx(many["peak_bytes"] / one["peak_bytes"], abs=1e-3)
    assert len(alone["seconds"]["all"]) == 2
    said = capsys.readouterr().out
    assert "each from a file of its own" in said and "| from one by one |" in said


def test_concepts_by_chance_change_k_and_v_and_differ() -> None:
    base, sample = load_base("tiny", device=CPU), load_concept(SAMPLE_CONCEPT)
    first, again, second = (another_concept(base, sample, seed=seed) for seed in (1, 1, 2))
    assert not unfit_weights(base, first) and first.metadata.adapter == "kv"
    places = kv_projections(base.unet)
    assert first.weights.keys() == places.keys()
    for name, change in first.weights.items():
        assert change.std() == pytest.approx(0.08 * places[name].weight.std().item(), rel=0.1)
        assert torch.equal(change, again.weights[name]) and not torch.equal(change, second.weights[name])
    assert not torch.equal(first.tokens["sks"], sample.tokens["sks"])


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["sampler", "--peers", "fastest"], "peers=fastest: must be some of documented, best"),
        (["sampler", "--speed", "warp"], "speed=warp: must be some of exact"),
        (["sampler", "--pairs", "1"], "pairs=1"),
        (["sampler", "--base", "nowhere"], "random-sd15"),
        (["length", "lengths=[8]"], "at least 2 are needed"),
        (["concepts", "--films", "3", "--concepts", "a.bin,b.bin"], "2 files for films=3"),
        (["concepts", "--films", "1"], "films=1: must be at least 2"),
        (["concepts", "--films", "2", "--concepts", "a.bin,b.bin"], "concepts=a.bin: no such file"),
        (["concepts", "--base", "random-sd15"], "has no sample concept"),
    ],
)
def test_wrong_settings_are_told_with_exit_code_2(
    tmp_path: Path, argv: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(main, [*argv, "--out", str(tmp_path)]) == 2
    assert told in capsys.readouterr().err


def test_a_table_says_what_failed() -> None:
    result = {"benchmark": "sampler", "film": {"frames": 2, "width": None}, "pairs": 2, "date": "2026-01-01"}
    failed = {"against": "diffusers at its best", "failed": "best: Unsupported: graph break", "rows": []}
    table = as_markdown({**result, "groups": [failed]})
    assert "failed: best: Unsupported: graph break" in table and "width" not in table


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "all": [3.0, 1.0, 2.0]}


@pytest.mark.slow
def test_random_stable_diffusion_has_the_real_sizes() -> None:
    base, motion = random_sd15(CPU, torch.bfloat16)
    modules = (base.unet, base.text_encoder, base.vae, motion)
    assert [sum(weights.numel() for weights in module.parameters()) for module in modules] == [
        859_520_964,
        123_060_480,
        83_653_863,
        453_209_280,
    ]
    assert motion.max_frames == 32 and base.resolution == 512


def test_every_preset_is_a_side() -> None:
    assert {*SPEEDS} == {*PRESETS, "compiled"} <= SIDES.keys()
