"""scripts/animate.py from end to end on the tiny models: what it writes, what it says, how it fails."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

from cdvideo.base.loader import load_base
from cdvideo.cli import run_main
from cdvideo.concept.concept import Concept, ConceptMetadata
from cdvideo.concept.file import save_concept
from cdvideo.concept.kv import kv_projections
from cdvideo.motion.files import save_motion
from cdvideo.motion.modules import MotionModules
from cdvideo.sampling import animate
from cdvideo.sampling.animate import main, slug
from cdvideo.sampling.speed import PRESETS, Speed
from cdvideo.sampling.video import sample_video

CPU = torch.device("cpu")
QUICK = ["--frames", "3", "--steps", "2"]
PROMPT = "a sks dog surfing"


@pytest.fixture
def base_folder(tmp_path: Path, tiny_base_folder: Path) -> Path:
    """The tiny base with motion modules that reach 8 frames."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base_folder, folder)
    base = load_base(str(folder), device=CPU)
    motion = MotionModules.for_unet(
        base.unet, motion_num_attention_heads=2, motion_max_seq_length=8, norm_mode="diffusers", trained_for=base.hash
    )
    for parameter in motion.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    save_motion(motion, folder / "motion")
    return folder


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the command is called in."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def save_tiny_concept(base_folder: Path, path: Path, token: str = "sks") -> None:
    base = load_base(str(base_folder), device=CPU)
    generator = torch.Generator().manual_seed(1)
    metadata = ConceptMetadata(
        class_words={token: "dog"},
        initialiser="dog",
        base_name="tiny",
        base_hash=base.hash,
        resolution=64,
        prediction_type="v_prediction",
        steps=1,
        lr=1e-4,
        token_lr=1e-3,
        seed=0,
        loss_weights={},
        sample_prompt="",
    )
    kv = {
        name: torch.randn(linear.weight.shape, generator=generator).half()
        for name, linear in kv_projections(base.unet).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_concept(Concept(tokens={token: torch.randn(1, 32, generator=generator)}, weights=kv, metadata=metadata), path)


def call(base_folder: Path, *arguments: str, prompt: str = PROMPT) -> int:
    return run_main(main, ["--prompt", prompt, "--base", str(base_folder), *QUICK, *arguments])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


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
    assert "using the sample concept that ships with cdvideo" in capsys.readouterr().out
    assert json.loads(Path("runs/films/a-sks-dog-surfing-0.json").read_text())["concept"] == "sample concept"


def test_a_concept_whose_token_is_missing_is_warned_of(
    base_folder: Path, workplace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny_concept(base_folder, Path("mine.safetensors"))
    assert call(base_folder, "--still", "--concept", "mine.safetensors", prompt="a dog") == 0
    (warning,) = [record for record in caplog.records if record.name == animate.logger.name]
    assert "lacks the concept's token (sks)" in warning.getMessage()
    assert "\n" not in warning.getMessage()


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
        (["--motion", "absent"], "motion folder absent"),
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


def test_motion_modules_of_another_base_are_warned_of(
    base_folder: Path, workplace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = base_folder / "motion" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_trained_for": "0" * 16}))
    assert call(base_folder, "--concept", "none", "--format", "gif") == 0
    assert "trained for a base with other weights" in caplog.text


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
    assert after.keys() == before.keys()
    assert after["a-sks-dog-surfing-0.gif"] == before["a-sks-dog-surfing-0.gif"]


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
