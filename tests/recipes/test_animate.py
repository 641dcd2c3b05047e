"""scripts/animate.py from end to end on the tiny models: what it writes, and what it says."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from cdvideo.base.loader import load_base
from cdvideo.cli import run_main
from cdvideo.concept.file import load_concept, save_concept
from cdvideo.sampling import animate
from cdvideo.sampling.animate import main, slug
from cdvideo.sampling.speed import PRESETS, Speed
from cdvideo.sampling.video import sample_video
from tests.recipes.animating import CPU, PROMPT, QUICK, call, names, save_tiny_concept


def test_one_line_makes_a_film(base_folder: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(base_folder, "--concept", "none") == 0
    films = workplace / "runs" / "films"
    stem = "a-sks-dog-surfing-0"
    assert names(films) == {f"{stem}{end}" for end in (".mp4", ".gif", ".png", "-frames.png", ".json")}
    assert iio.imread(films / f"{stem}.mp4").shape == (3, 384, 384, 3)
    with Image.open(films / f"{stem}.gif") as gif:
        assert (gif.n_frames, gif.size) == (3, (384, 384))
        inside = json.loads(gif.info["comment"])
    beside = json.loads((films / f"{stem}.json").read_text())
    assert inside == beside
    assert beside["prompt"] == PROMPT
    assert (beside["seed"], beside["steps"], beside["frames"], beside["concept"]) == (0, 2, 3, None)
    assert str(base_folder.parent) not in json.dumps(beside), "no folders of the user's machine in a film"
    said = capsys.readouterr().out
    assert f"{stem}.mp4" in said and f"{stem}.gif" in said
    assert "peak memory" in said
    loaded = rf"^motion {re.escape(str(base_folder))}/motion: .*matched (\d+)/\1, up to 8 frames"
    assert re.search(loaded, said, re.MULTILINE)


def test_film_is_what_the_sampler_makes(base_folder: Path, workplace: Path) -> None:
    """Nothing is lost or added between the sampler and the file."""
    from cdvideo.motion.files import load_motion

    assert call(base_folder, "--concept", "none", "--format", "webp", "--seed", "4", "watch_size=0") == 0
    base = load_base(str(base_folder), device=CPU)
    motion = load_motion(base_folder / "motion", device=CPU)
    frames_FHWC = sample_video(base, motion, PROMPT, seed=4, frames=3, steps=2)
    with Image.open(workplace / "runs/films/a-sks-dog-surfing-4.png") as poster:
        assert np.array_equal(np.asarray(poster), frames_FHWC[0])
    with Image.open(workplace / "runs/films/a-sks-dog-surfing-4.webp") as film:
        assert film.n_frames == 3


def test_saving_memory_changes_no_frame(base_folder: Path, workplace: Path) -> None:
    save_tiny_concept(base_folder, workplace / "one.safetensors")
    save_tiny_concept(base_folder, workplace / "two.safetensors", token="tom")
    flags = [
        "--prompt",
        PROMPT,
        "--base",
        str(base_folder),
        "--concept",
        "one.safetensors,two.safetensors",
        *QUICK,
        "--format",
        "gif",
    ]
    assert run_main(main, [*flags, "--out", "plain"]) == 0
    assert run_main(main, [*flags, "--out", "offloaded", "--offload"]) == 0
    names = {path.name for path in Path("plain").iterdir()}
    assert names == {path.name for path in Path("offloaded").iterdir()}
    assert all((Path("plain") / name).read_bytes() == (Path("offloaded") / name).read_bytes() for name in names)


def test_large_pictures_can_be_decoded_in_tiles(base_folder: Path, workplace: Path) -> None:
    flags = [
        "--prompt",
        "a dog",
        "--base",
        str(base_folder),
        "--still",
        "--steps",
        "1",
        "width=576",
        "height=64",
        "watch_size=0",
    ]
    pictures = []
    for tiling in ("false", "true"):
        assert run_main(main, [*flags, "--out", tiling, f"vae_tiling={tiling}"]) == 0
        pictures.append(iio.imread(Path(tiling) / "a-dog-0.png").astype(int))
    assert pictures[0].shape == (64, 576, 3)
    difference = np.abs(pictures[0] - pictures[1])
    assert difference.max() > 0 and difference.mean() < 5


def test_every_film_has_its_own_seed(base_folder: Path, workplace: Path) -> None:
    assert call(base_folder, "--concept", "none", "--format", "webp", "--num-videos", "2", "--seed", "5") == 0
    assert call(base_folder, "--concept", "none", "--format", "webp", "--seed", "6", "--out", "again") == 0
    films = workplace / "runs/films"
    assert {"a-sks-dog-surfing-5.webp", "a-sks-dog-surfing-6.webp"} <= names(films)
    second, alone = (folder / "a-sks-dog-surfing-6.webp" for folder in (films, workplace / "again"))
    assert second.read_bytes() == alone.read_bytes()
    assert second.read_bytes() != (films / "a-sks-dog-surfing-5.webp").read_bytes()


def test_still(base_folder: Path, workplace: Path) -> None:
    shutil.rmtree(base_folder / "motion")  # a picture needs none
    assert call(base_folder, "--concept", "none", "--still", "--num-videos", "2") == 0
    films = workplace / "runs" / "films"
    assert names(films) == {f"a-sks-dog-surfing-{seed}.{end}" for seed in (0, 1) for end in ("png", "json")}
    with Image.open(films / "a-sks-dog-surfing-1.png") as image:
        assert image.size == (384, 384)
        assert json.loads(image.text["Comment"])["seed"] == 1


def test_config_file_and_overrides(base_folder: Path, workplace: Path) -> None:
    Path("film.yaml").write_text(
        f"prompt: a cat\nbase: {base_folder}\nframes: 2\nsteps: 1\nformat: gif\nconcept: none\n"
    )
    assert run_main(main, ["--config", "film.yaml", "--frames", "4", "fps=4", "guidance=1", "--quiet"]) == 0
    with Image.open(workplace / "runs/films/a-cat-0.gif") as gif:
        assert (gif.n_frames, gif.info["duration"]) == (4, 250)


def test_the_newest_concept_whose_token_stands_in_the_prompt(
    base_folder: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for age, (run, token) in enumerate([("other", "zwx"), ("new", "sks"), ("old", "sks")]):
        path = workplace / "runs" / run / "concept.safetensors"
        save_tiny_concept(base_folder, path, token)
        os.utime(path, (1e9 - age, 1e9 - age))
    assert call(base_folder, "--still") == 0
    assert 'concept runs/new/concept.safetensors: "sks dog", matched 9/9\n' in capsys.readouterr().out
    films = workplace / "runs" / "films"
    assert json.loads((films / "a-sks-dog-surfing-0.json").read_text())["concept"] == "new"

    assert call(base_folder, "--still", "--concept", "none", "--out", "without") == 0
    with_concept, without = films / "a-sks-dog-surfing-0.png", Path("without/a-sks-dog-surfing-0.png")
    assert not np.array_equal(np.asarray(Image.open(with_concept)), np.asarray(Image.open(without)))


def test_before_any_training_the_sample_concept_is_used_and_that_is_said(
    base_folder: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import cdvideo.concept.file

    sample = base_folder / "sample_concept.safetensors"
    save_tiny_concept(base_folder, sample)
    monkeypatch.setattr(cdvideo.concept.file, "SAMPLE_CONCEPT", sample)
    assert call(base_folder, "--still") == 0
    assert "using the sample concept of cdvideo's own" in capsys.readouterr().out
    assert call(base_folder, "--still", "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert json.loads(Path("runs/films/a-sks-dog-surfing-0.json").read_text())["concept"] == "sample concept"


def test_a_concept_whose_token_is_missing_is_warned_of(
    base_folder: Path, workplace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny_concept(base_folder, Path("mine.safetensors"))
    assert call(base_folder, "--still", "--concept", "mine.safetensors", prompt="a dog") == 0
    (warning,) = [record for record in caplog.records if record.name == animate.logger.name]
    assert "lacks the concept's token (sks)" in warning.getMessage()
    assert "\n" not in warning.getMessage()


def test_of_two_tokens_the_one_that_is_missing_is_warned_of(
    base_folder: Path, workplace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for token in ("sks", "rex"):
        save_tiny_concept(base_folder, Path(f"{token}.safetensors"), token)
    rex = load_concept(Path("rex.safetensors"))  # words of the same rows would be names of one thing
    save_concept(dataclasses.replace(rex, tokens={"rex": rex.tokens["rex"] + 1}), Path("rex.safetensors"))
    assert call(base_folder, "--still", "--concept", "sks.safetensors,rex.safetensors") == 0
    assert "lacks the concept's token (rex)" in caplog.text and "(sks)" not in caplog.text


def test_a_negative_prompt_that_is_not_read_is_warned_of(
    base_folder: Path, workplace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert call(base_folder, "--still", "--concept", "none", "--negative-prompt", "snow", "--guidance", "1") == 0
    assert "the negative prompt is not read" in caplog.text


def test_a_film_made_in_another_way_takes_no_name(base_folder: Path, workplace: Path) -> None:
    films, stem = workplace / "runs" / "films", "a-sks-dog-surfing-0"
    assert call(base_folder, "--concept", "none", "--format", "gif") == 0
    first = {path.name: path.read_bytes() for path in films.iterdir()}
    assert call(base_folder, "--concept", "none", "--format", "gif", "--guidance", "2") == 0
    assert call(base_folder, "--concept", "none", "--still") == 0
    assert {f"{stem}-2.gif", f"{stem}-2.json", f"{stem}-3.png", f"{stem}-3.json"} <= names(films)
    assert first == {name: (films / name).read_bytes() for name in first}
    count = len(names(films))
    assert call(base_folder, "--concept", "none", "--format", "gif", "--guidance", "2") == 0
    assert len(names(films)) == count, "the same film has the same name"


def test_motion_modules_of_another_base_are_warned_of(
    base_folder: Path, workplace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = base_folder / "motion" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_trained_for": "0" * 16}))
    assert call(base_folder, "--concept", "none", "--format", "gif") == 0
    assert "trained for a base with other weights" in caplog.text


def test_quiet_says_nothing(base_folder: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(base_folder, "--concept", "none", "--quiet", "--format", "gif") == 0
    assert capsys.readouterr().out == ""


def test_slug() -> None:
    assert slug("A sks dog, wearing headphones & surfing!") == "a-sks-dog-wearing-headphones-surfing"
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("ein Hündchen im Schnee") == "ein-hündchen-im-schnee"
    assert len(slug("very " * 100)) <= 60 and not slug("very " * 100).endswith("-")
    assert slug("!?") == "film"


def test_two_concepts_share_a_film(base_folder: Path, workplace: Path) -> None:
    for token in ("sks", "rex"):
        save_tiny_concept(base_folder, Path(f"{token}/concept.safetensors"), token)
    both = "sks/concept.safetensors,rex/concept.safetensors"
    assert call(base_folder, "--concept", both, "--still", prompt="a sks dog and a rex dog") == 0
    settings = json.loads(next((workplace / "runs" / "films").glob("*.json")).read_text())
    assert settings["concept"] == "sks + rex"
    assert call(base_folder, "--concept", "sks/concept.safetensors,sks/concept.safetensors", "--still") == 2


def test_every_format_and_codec_from_the_command_line(base_folder: Path, workplace: Path) -> None:
    formats = ["--format", "mp4,webm,gif,png", "--codec", "hevc", "--dither", "ordered"]
    assert call(base_folder, "--concept", "none", *formats, "watch_size=64") == 0
    films = workplace / "runs" / "films"
    stem = "a-sks-dog-surfing-0"
    assert {f"{stem}{end}" for end in (".mp4", ".webm", ".gif", "-png")} <= names(films)
    assert names(films / f"{stem}-png") == {f"{index:05d}.png" for index in range(3)}
    assert iio.imread(films / f"{stem}.mp4").shape == iio.imread(films / f"{stem}.webm").shape == (3, 64, 64, 3)


def test_attention_by_another_kernel_gives_the_same_film_and_an_absent_one_is_told(
    base_folder: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sdpa", "flash"):
        options = ["--format", "png", "--attention", name, "--out", name, "watch_size=0"]
        assert call(base_folder, "--concept", "none", *options) == 0
    first, second = (iio.imread(f"{name}/a-sks-dog-surfing-0-png/00002.png") for name in ("sdpa", "flash"))
    assert np.abs(first.astype(int) - second).max() <= 1
    assert call(base_folder, "--concept", "none", "--attention", "cudnn") == 2
    assert "attention cudnn on cpu" in capsys.readouterr().err


def test_speed_and_its_distance(
    base_folder: Path, workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "fast", Speed(guided_until=0))
    assert call(base_folder, "--concept", "none", "--speed", "fast", "--compare") == 0
    (decibels,) = re.findall(r"seed 0, fast beside exact: PSNR ([\d.]+) dB, SSIM 0\.\d{3}", capsys.readouterr().out)
    assert 5 < float(decibels) < 90
    assert call(base_folder, "--concept", "none", "--compare") == 2
    assert call(base_folder, "--concept", "none", "--still", "--speed", "fast") == 2
