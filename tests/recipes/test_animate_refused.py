"""scripts/animate.py where something is wrong: it is told, before anything is made, and earlier films stay whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from cdvideo.cli import run_main
from cdvideo.concept.concept import Concept
from cdvideo.concept.file import save_concept
from cdvideo.sampling.animate import main
from tests.recipes.animating import call, names, save_tiny_concept


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "  "], "prompt is empty"),
        (["--prompt", "a dog", "--frames", "0"], "frames=0: must be at least 1"),
        (["--prompt", "a dog", "--fps", "0"], "fps=0"),
        (["--prompt", "a dog", "--fps", "60"], "a gif shows at most 50"),
        (["--prompt", "a dog", "--steps", "0"], "steps=0"),
        (["--prompt", "a dog", "--guidance", "0.5"], "guidance=0.5"),
        (["--prompt", "a dog", "--seed", "-1"], "seed=-1"),
        (["--prompt", "a dog", "--num-videos", "0"], "num_videos=0"),
        (["--prompt", "a dog", "--format", "mp4,avi"], "format=mp4,avi: must be some of mp4, webm, gif, webp, png"),
        (["--prompt", "a dog", "frame=8"], "did you mean frames"),
        (["--frames", "8"], "prompt: has no default"),
    ],
)
def test_wrong_settings(workplace: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(main, arguments) == 2
    complaint = capsys.readouterr().err
    assert said in complaint
    assert "allowed:" in complaint and "do:" in complaint
    assert names(workplace) == set(), "nothing is made before the settings are right"


def test_all_wrong_settings_are_told_at_once(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(main, ["--prompt", "", "--frames", "0", "--steps", "0"]) == 2
    complaint = capsys.readouterr().err
    assert all(said in complaint for said in ("prompt is empty", "frames=0", "steps=0"))


def _fail(*_: Any, **__: Any) -> None:
    raise AssertionError("must not get as far as this")


def test_an_unwritable_folder_is_told_before_anything_is_loaded(
    base_folder: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import cdvideo.base.loader

    monkeypatch.setattr(cdvideo.base.loader, "load_base", _fail)
    Path("file").touch()
    assert call(base_folder, "--out", "file/films") == 2
    assert "can not write into" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--frames", "20", "--window-size", "9"], "2 to 8 frames"),
        (["--concept", "absent.safetensors"], "no concept file absent.safetensors"),
        (["--concept", "truncated.safetensors"], "damaged"),
        (["--concept", "other.safetensors"], "matched"),
        (["--motion", "absent"], "there is no motion folder absent"),
        (["width=100"], "multiples of 8"),
    ],
)
def test_what_does_not_fit_is_told_and_leaves_earlier_films_whole(
    base_folder: Path, workplace: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_concept(base_folder, Path("whole.safetensors"))
    Path("truncated.safetensors").write_bytes(Path("whole.safetensors").read_bytes()[:-100])
    _save_concept_of_another_base(Path("other.safetensors"), Path("whole.safetensors"))
    films = workplace / "runs" / "films"
    films.mkdir(parents=True)
    (films / "a-sks-dog-surfing-0.mp4").write_bytes(b"an earlier film")

    assert call(base_folder, *(["--concept", "none"] if "--concept" not in arguments else []), *arguments) == 2
    complaint = capsys.readouterr().err
    assert said in complaint
    assert "allowed:" in complaint and "do:" in complaint
    assert names(films) == {"a-sks-dog-surfing-0.mp4"}
    assert (films / "a-sks-dog-surfing-0.mp4").read_bytes() == b"an earlier film"


def _save_concept_of_another_base(path: Path, like: Path) -> None:
    from cdvideo.concept.file import load_concept

    concept = load_concept(like)
    save_concept(
        Concept(concept.tokens, {name: kv[:, :5] for name, kv in concept.weights.items()}, concept.metadata), path
    )


def test_a_base_without_motion_modules(base_folder: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(base_folder / "motion")
    assert call(base_folder, "--concept", "none") == 2
    assert "has no motion modules of its own" in capsys.readouterr().err


def test_an_interrupt_leaves_earlier_films_whole(
    base_folder: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(base_folder, "--concept", "none") == 0
    films = workplace / "runs" / "films"
    before = {path.name: path.read_bytes() for path in films.iterdir()}

    import cdvideo.media.export

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cdvideo.media.export, "_common_palette", interrupted)
    assert call(base_folder, "--concept", "none", "--steps", "1") == 130
    after = {path.name: path.read_bytes() for path in films.iterdir()}
    assert all(after[name] == before[name] for name in before)
    assert not any(name.endswith(".part") for name in after)


def test_a_folder_of_something_else_is_told_before_anything_is_loaded(
    base_folder: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import cdvideo.base.loader

    monkeypatch.setattr(cdvideo.base.loader, "load_base", _fail)
    taken = workplace / "runs/films/a-sks-dog-surfing-1-png"
    taken.mkdir(parents=True)
    (taken / "Thumbs.db").touch()
    assert call(base_folder, "--concept", "none", "--format", "gif,png", "--num-videos", "2") == 2
    assert "holds something else than a film's frames" in capsys.readouterr().err


def test_a_codec_without_encoder_is_told_before_anything_is_loaded(
    base_folder: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import cdvideo.base.loader
    from cdvideo.media import ffmpeg

    monkeypatch.setattr(cdvideo.base.loader, "load_base", _fail)
    monkeypatch.setattr(ffmpeg, "encoder_names", lambda: frozenset({"libx264"}))
    assert call(base_folder, "--codec", "av1") == 2
    assert "codec av1: imageio's ffmpeg has no encoder for it" in capsys.readouterr().err
    assert call(base_folder, "--format", "webm") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--concept", "absent.safetensors"], "there is no concept file absent.safetensors"),
        (["--motion", "missing.ckpt"], "there is no motion file missing.ckpt"),
        (["--motion", "absent"], "there is no motion folder absent"),
        (["--motion-lora", "zoom.ckpt:0.5"], "there is no motion LoRA zoom.ckpt"),
        (["--init-video", "clip.mp4"], "start.video=clip.mp4: no such file"),
        (["--scheduler", "lcm", "--speed", "fast"], "the sampler lcm, which adds new noise"),
    ],
)
def test_a_typo_is_told_before_the_base_is_looked_for(
    workplace: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(workplace / "no-such-base", *arguments) == 2
    assert said in capsys.readouterr().err


def test_an_untried_preset_is_told(base_folder: Path, workplace: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert call(base_folder, "--concept", "none", "--speed", "balanced", "--guidance", "8") == 0
    assert "--speed balanced was chosen at 25 steps of ddim and guidance 5, not at guidance 8" in caplog.text
