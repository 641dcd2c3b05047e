"""scripts/train_concept.py end to end, on tiny models: what it leaves behind, and what it says to bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from cdvideo.base.loader import Base
from cdvideo.cli import run_main
from cdvideo.concept.file import find_concept, load_concept
from cdvideo.recipes import SAMPLE_PICTURES, train_concept_main
from cdvideo.runs import create_run

ROOT = Path(__file__).parents[2]
QUICK = ["--steps", "2", "data.variants=2", "optim.batch_size=2", "sample.every=0"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        image = Image.new("RGB", (70, 64), (200, 220, 90 * number))
        ImageDraw.Draw(image).ellipse((15 + 5 * number, 10, 55, 50), fill="blue")
        image.save(folder / f"{number}.jpg")
    return folder


@pytest.fixture
def flags(tmp_path: Path, photos: Path, tiny_base_folder: Path) -> list[str]:
    return ["--images", str(photos), "--base", str(tiny_base_folder), "--out", str(tmp_path / "runs" / "rex"), *QUICK]


def test_a_run_leaves_everything_that_it_promises(
    tmp_path: Path, flags: list[str], tiny_base: Base, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [flag for flag in flags if flag != "sample.every=0"]
    settings = ["sample.steps=2", "sample.prompts=['a {}', 'a {} surfing']"]
    assert run_main(train_concept_main, [*flags, *settings, "--token", "rex", "--class-word", "stuffed animal"]) == 0
    folder = tmp_path / "runs" / "rex"
    names = {path.name for path in folder.iterdir()}
    assert {"concept.safetensors", "config.yaml", "metrics.jsonl", "samples_00000.png", "samples_00002.png"} <= names
    assert "state.safetensors" not in names
    concept = load_concept(folder / "concept.safetensors", base=tiny_base)
    assert concept.metadata.class_words == {"rex": "stuffed animal"} and concept.metadata.preview
    assert "token: rex" in (folder / "config.yaml").read_text()
    assert (
        find_concept("a rex stuffed animal surfing", tmp_path / "runs", base_hash=tiny_base.hash)
        == folder / "concept.safetensors"
    )
    said = capsys.readouterr().out
    assert "concept.safetensors" in said and "done in" in said and "peak memory" in said


def test_a_run_at_another_resolution_learns_and_draws_at_it(tmp_path: Path, flags: list[str], tiny_base: Base) -> None:
    flags = [flag for flag in flags if flag != "sample.every=0"]
    settings = ["resolution=80", "sample.steps=1", "sample.prompts=['a {}']", "preserve.prior_weight=1"]
    assert run_main(train_concept_main, [*flags, *settings, "preserve.prior_images=1", "--quiet"]) == 0
    folder = tmp_path / "runs" / "rex"
    concept = load_concept(folder / "concept.safetensors", base=tiny_base)
    assert concept.metadata.resolution == 80
    (file,) = folder.glob("prior/*/dog/0000.png")
    with Image.open(file) as drawn:
        assert drawn.size == (80, 80)


def test_later_runs_leave_earlier_results_whole(tmp_path: Path, flags: list[str]) -> None:
    assert run_main(train_concept_main, [*flags, "--quiet"]) == 0
    first = (tmp_path / "runs" / "rex" / "concept.safetensors").read_bytes()
    assert run_main(train_concept_main, [*flags, "--quiet", "--seed", "1"]) == 0
    assert run_main(train_concept_main, [*flags, "--quiet", "optim.lr=1e30"]) == 2
    assert (tmp_path / "runs" / "rex" / "concept.safetensors").read_bytes() == first
    assert (tmp_path / "runs" / "rex-2" / "concept.safetensors").read_bytes() != first
    assert not (tmp_path / "runs" / "rex-3" / "concept.safetensors").exists()


def test_quiet_prints_nothing(flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run_main(train_concept_main, [*flags, "--quiet"]) == 0
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--token", "dog"], "differ from class_word"),
        (["--token", "cat"], "ordinary word"),
        (["--token", "two words"], "token=two words"),
        (["--class-word", ""], "class_word"),
        (["--steps", "0"], "steps=0"),
        (["--images", "no/such/folder"], "there is no folder no/such/folder"),
        (["--base", "no/such/base"], "base 'no/such/base'"),
        (["optim.lr=fast", "semantics.weight=1"], "2 faults in the settings"),
        (["--device", "abacus"], "device 'abacus'"),
        (["resolution=100"], "resolution=100"),
        (["--device", "cpu", "optim.optimizer=adamw8bit"], "optim.optimizer=adamw8bit on cpu"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--resume"], "to resume"),
    ],
)
def test_bad_input_is_told_and_leaves_no_run(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str], wrong: list[str], told: str
) -> None:
    assert run_main(train_concept_main, [*flags, *wrong]) == 2
    message = capsys.readouterr().err
    assert told in message and "allowed:" in message and "do:" in message
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_bad_pictures_are_told(photos: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (1, 1)).save(photos / "dot.png")
    (photos / "broken.jpg").write_bytes(b"no picture")
    assert run_main(train_concept_main, flags) == 2
    message = capsys.readouterr().err
    assert "dot.png: only 1 x 1 pixels" in message and "broken.jpg: can not be read" in message
    for file in photos.iterdir():
        file.unlink()
    assert run_main(train_concept_main, flags) == 2
    assert "no pictures in" in capsys.readouterr().err


def test_an_output_folder_that_can_not_be_written_is_told(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert run_main(train_concept_main, [*flags, "--out", str(tmp_path / "file" / "rex")]) == 2
    assert "can not write into" in capsys.readouterr().err


def test_a_run_in_use_is_told(tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with create_run(tmp_path / "runs", "rex"):
        assert run_main(train_concept_main, [*flags, "--resume"]) == 2
    assert "in use by another process" in capsys.readouterr().err


def test_an_older_interrupted_run_is_resumed_beside_a_newer_one(tmp_path: Path, flags: list[str]) -> None:
    older, newer = tmp_path / "runs" / "rex", tmp_path / "runs" / "rex-2"
    for folder in (older, newer):
        assert run_main(train_concept_main, [*flags, "--quiet"]) == 0
        assert (folder / "concept.safetensors").exists()
    (older / "concept.safetensors").unlink()  # as if it had been interrupted before its first state
    before = (newer / "concept.safetensors").read_bytes()
    assert run_main(train_concept_main, ["--resume", "--out", str(older), "--quiet"]) == 0
    assert (older / "concept.safetensors").exists() and (newer / "concept.safetensors").read_bytes() == before


def test_an_unknown_class_word_is_warned_of_in_one_line(flags: list[str], caplog: pytest.LogCaptureFixture) -> None:
    assert run_main(train_concept_main, [*flags, "--quiet", "--class-word", "axolotl"]) == 0
    (line,) = [record.message for record in caplog.records if record.name == "cdvideo.concept.words"]
    assert "axolotl" in line and "\n" not in line


def test_an_interrupt_leaves_a_run_that_can_be_resumed(tmp_path: Path, flags: list[str]) -> None:
    flags = [*flags, "--steps", "100000", "checkpoint_every=100000", "seed=3"]
    script = [sys.executable, str(ROOT / "scripts" / "train_concept.py")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*script, *flags], cwd=ROOT, env=env, text=True, **pipes)
    metrics = tmp_path / "runs" / "rex" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "--resume --out" in said
    done = json.loads(metrics.read_text().splitlines()[-1])["step"]

    ended = tmp_path / "runs" / "ended"
    shutil.copytree(tmp_path / "runs" / "rex", ended)
    with (ended / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 1')
    assert run_main(train_concept_main, ["--resume", "--out", str(ended), "--steps", str(done)]) == 0
    last = json.loads((ended / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], "drift_cosine" in last) == (done, True), "measured at its end, whatever the step"

    again = ["--resume", "--out", str(tmp_path / "runs" / "rex"), "--steps", str(done + 2), "--quiet"]
    assert run_main(train_concept_main, again) == 0
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(done + 3))
    assert "seed: 3" in (tmp_path / "runs" / "rex" / "config.yaml").read_text()


def test_without_arguments_the_pictures_that_ship_are_taken() -> None:
    pictures = sorted(SAMPLE_PICTURES.glob("*.png"))
    assert len(pictures) == 5 and {Image.open(path).size for path in pictures} == {(128, 128)}


def test_the_base_s_own_pictures_are_drawn_once_and_kept(tmp_path: Path, flags: list[str]) -> None:
    settings = ["preserve.prior_weight=1", "preserve.prior_images=2", "sample.steps=1", "--quiet"]
    assert run_main(train_concept_main, [*flags, *settings]) == 0
    folder = tmp_path / "runs" / "rex"
    drawn = sorted(folder.glob("prior/*/dog/*"))
    assert [path.name for path in drawn] == ["0000.png", "0001.png"] and Image.open(drawn[0]).size == (64, 64)
    times = [path.stat().st_mtime_ns for path in drawn]
    (folder / "concept.safetensors").unlink()
    assert run_main(train_concept_main, ["--resume", "--out", str(folder), "--quiet"]) == 0
    assert [path.stat().st_mtime_ns for path in drawn] == times


def test_two_things_at_once(tmp_path: Path, flags: list[str], photos: Path, tiny_base: Base) -> None:
    others = f"others=[{{images: {photos}, token: tom, class_word: cat}}]"
    assert run_main(train_concept_main, [*flags, "--quiet", others]) == 0
    path = tmp_path / "runs" / "rex" / "concept.safetensors"
    assert load_concept(path, base=tiny_base).metadata.class_words == {"sks": "dog", "tom": "cat"}
    assert find_concept("a tom cat surfing", tmp_path / "runs", base_hash=tiny_base.hash) == path
    assert run_main(train_concept_main, [*flags, "--quiet", others.replace("tom", "dog")]) == 2  # a word of the base
