"""scripts/animate.py: long films, loops, travelling prompts, strengths, batches, and films from others, end to end."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

from cdvideo.base.loader import load_base
from cdvideo.cli import run_main
from cdvideo.motion.files import save_motion
from cdvideo.motion.modules import MotionModules
from cdvideo.sampling.animate import main
from tests.recipes.animating import save_tiny_concept

FILMS = Path("runs/films")
STEM = "a-dog-0"


@pytest.fixture
def base_folder(tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny base with motion modules that reach 8 frames; the command is called in a folder of its own."""
    folder, work = tmp_path / "base", tmp_path / "work"
    shutil.copytree(tiny_base_folder, folder)
    base = load_base(str(folder), device=torch.device("cpu"))
    motion = MotionModules.for_unet(base.unet, motion_num_attention_heads=2, motion_max_seq_length=8)
    for parameter in motion.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    save_motion(motion, folder / "motion")
    work.mkdir()
    monkeypatch.chdir(work)
    return folder


def call(base_folder: Path, *arguments: str, prompt: str = "a dog", frames: str = "3") -> int:
    always = ["--base", str(base_folder), "--concept", "none", "--frames", frames, "--steps", "2"]
    return run_main(main, ["--prompt", prompt, *always, "--format", "webp", "watch_size=0", *arguments])


def newest(folder: Path, stem: str, end: str) -> Path:
    """Films of one prompt and seed, made in several ways, are numbered."""
    found = [path for path in folder.iterdir() if re.fullmatch(rf"{stem}(-\d+)?{re.escape(end)}", path.name)]
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def shown(stem: str = STEM, folder: Path = FILMS) -> np.ndarray:
    return np.asarray(Image.open(newest(folder, stem, "-frames.png")))


def settings(stem: str = STEM) -> dict[str, object]:
    return json.loads(newest(FILMS, stem, ".json").read_text())


def test_a_long_film(base_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(base_folder, "--format", "mp4", "--noise", "freenoise", "--window-overlap", "3", frames="21") == 0
    said = capsys.readouterr().out
    assert "21 frames: the motion modules reach 8, so in 4 windows of 8, blended at every step\n" in said
    assert iio.imread(FILMS / f"{STEM}.mp4").shape == (21, 64, 64, 3)
    told = settings()
    assert (told["frames"], told["noise.kind"], told["windows.overlap"]) == (21, "freenoise", 3)
    assert "windows.size" not in told, "what was not asked for is not told"


def test_a_film_that_fits_is_told_of_no_windows(base_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(base_folder) == 0
    assert "windows" not in capsys.readouterr().out


def test_a_loop(base_folder: Path) -> None:
    assert call(base_folder, "--loop", frames="6") == 0
    looped = shown()
    assert settings()["windows.schedule"] == "looped"
    assert call(base_folder, frames="6") == 0
    assert not np.array_equal(looped, shown())


def test_a_prompt_that_travels(base_folder: Path) -> None:
    assert call(base_folder, prompt="0: a dog | 8: a cat in snow", frames="10") == 0
    (from_line,) = FILMS.glob("*-frames.png")
    Path("film.yaml").write_text("prompt: |\n  0: a dog\n  8: a cat in snow\nsteps: 2\nframes: 10\nformat: webp\n")
    always = ["--base", str(base_folder), "--concept", "none", "watch_size=0", "--out", "again"]
    assert run_main(main, ["--config", "film.yaml", *always]) == 0
    (from_file,) = Path("again").glob("*-frames.png")
    assert np.array_equal(np.asarray(Image.open(from_line)), np.asarray(Image.open(from_file)))
    assert call(base_folder, frames="10") == 0
    assert not np.array_equal(shown(), np.asarray(Image.open(from_line)))


def test_a_loop_of_a_prompt_that_travels_comes_back_to_its_first(base_folder: Path) -> None:
    still = ["--loop", "--motion-strength", "0"]  # so that each frame shows what it read
    assert call(base_folder, *still, prompt="0: a dog | 4: a cat", frames="8") == 0
    looped = shown("0-a-dog-4-a-cat-0")
    assert call(base_folder, *still[1:], prompt="0: a dog | 4: a cat", frames="8") == 0
    straight = shown("0-a-dog-4-a-cat-0")
    assert np.array_equal(looped[:, : 5 * 68], straight[:, : 5 * 68]), "as far as the last prompt"
    assert not np.array_equal(looped[:, 5 * 68 :], straight[:, 5 * 68 :]), "then back to the first"


def test_strength_of_motion_and_concept(base_folder: Path) -> None:
    assert call(base_folder, "--motion-strength", "0: 0 | 2: 1.5") == 0
    assert settings()["control.motion_strength"] == "0: 0 | 2: 1.5"
    Path("film.yaml").write_text("control: {motion_strength: 0.8}\n")
    assert call(base_folder, "--config", "film.yaml") == 0
    assert settings()["control.motion_strength"] == 0.8
    assert call(base_folder, "--concept-strength", "0.5") == 2


def test_a_concept_in_part(base_folder: Path) -> None:
    save_tiny_concept(base_folder, Path("mine/concept.safetensors"))
    films = []
    for strength in ("1", "0%: 0.2 | 40%: 1", "0"):
        given = ["--concept", "mine", "--concept-strength", strength]
        assert call(base_folder, *given, prompt="a sks dog") == 0
        films.append(shown("a-sks-dog-0"))
    assert not np.array_equal(films[0], films[1]) and not np.array_equal(films[1], films[2])


def test_two_concepts_in_one_film(base_folder: Path) -> None:
    for token in ("sks", "rex"):
        save_tiny_concept(base_folder, Path(f"{token}/concept.safetensors"), token)
    assert call(base_folder, "--concept", "sks,rex", prompt="a sks dog and a rex dog") == 0
    assert settings("a-sks-dog-and-a-rex-dog-0")["concept"] == "sks + rex"
    both = shown("a-sks-dog-and-a-rex-dog-0")
    assert call(base_folder, "--concept", "sks", prompt="a sks dog and a rex dog") == 0
    assert not np.array_equal(both, shown("a-sks-dog-and-a-rex-dog-0"))


def test_several_films_in_one_batch(base_folder: Path) -> None:
    assert call(base_folder, "--num-videos", "3", "--batch", "2", "--out", "batch") == 0
    assert call(base_folder, "--num-videos", "3") == 0
    assert call(base_folder, "--seed", "2", "--out", "alone") == 0
    for seed in range(3):
        together, one_by_one = shown(f"a-dog-{seed}", Path("batch")), shown(f"a-dog-{seed}")
        assert np.abs(together.astype(int) - one_by_one).max() <= 1
    assert np.array_equal(shown("a-dog-2"), shown("a-dog-2", Path("alone"))), "to the byte, unless batched"
    assert not np.array_equal(shown("a-dog-0"), shown("a-dog-1"))


def test_a_picture_beside_the_film(base_folder: Path) -> None:
    assert call(base_folder, "--also-still", "--num-videos", "2") == 0
    stills = [np.asarray(Image.open(FILMS / f"a-dog-{seed}-still.png")) for seed in range(2)]
    assert call(base_folder, "--still", "--out", "still", "--seed", "1") == 0
    assert np.array_equal(stills[1], np.asarray(Image.open("still/a-dog-1.png")))
    assert not np.array_equal(stills[0], stills[1])


def test_a_picture_beside_the_film_of_distilled_motion_modules_is_the_image_models(base_folder: Path) -> None:
    """Which were distilled for steps and guidance at which the image model draws badly."""
    config = base_folder / "motion" / "config.json"
    distilled = {"_sampler": "euler", "_steps": 4, "_guidance": 1.0}
    config.write_text(json.dumps({**json.loads(config.read_text()), **distilled}))
    flags = ["--base", str(base_folder), "--concept", "none", "--frames", "2", "--prompt", "a dog", "--format", "webp"]
    assert run_main(main, [*flags, "--also-still", "--motion-strength", "0.5", "watch_size=0"]) == 0
    assert (settings()["steps"], settings()["guidance"]) == (4, 1.0)
    with Image.open(FILMS / f"{STEM}-still.png") as picture:
        told = json.loads(picture.text["Comment"])
    assert (told["scheduler"], told["steps"], told["guidance"]) == ("ddim", 25, 5.0)
    assert "control.motion_strength" not in told


def make_clip(path: Path, frames: int = 4) -> np.ndarray:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (frames, 8, 8, 3), dtype=np.uint8)
    frames_FHWC = small.repeat(8, axis=1).repeat(8, axis=2)
    if path.suffix == ".png":
        iio.imwrite(path, frames_FHWC[0])
    else:
        images = [Image.fromarray(frame) for frame in frames_FHWC]
        images[0].save(path, save_all=True, append_images=images[1:], duration=100)
    return frames_FHWC


def test_a_film_from_another(base_folder: Path) -> None:
    make_clip(Path("clip.gif"))
    films = []
    for strength in ("0.1", "0.9"):
        assert call(base_folder, "--init-video", "clip.gif", "--strength", strength, "steps=10") == 2, "given twice"
        assert run_main(main, [
            "--prompt", "a dog", "--base", str(base_folder), "--concept", "none", "--frames", "3", "--steps", "10",
            "--format", "webp", "watch_size=0", "--init-video", "clip.gif", "--strength", strength,
        ]) == 0  # fmt: skip
        films.append(shown())
    assert settings()["start.video"] == "clip.gif" and settings()["start.strength"] == 0.9
    assert not np.array_equal(films[0], films[1])
    assert call(base_folder, "--init-video", "clip.gif", frames="5") == 2


def test_a_film_that_begins_with_a_picture(base_folder: Path) -> None:
    picture = make_clip(Path("picture.png"))[0]
    assert call(base_folder, "--init-image", "picture.png") == 0
    from cdvideo.base.latents import decode_latents, encode_pixels
    from cdvideo.sampling.video import to_uint8

    base = load_base(str(base_folder), device=torch.device("cpu"))
    pixels_BCHW = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        wanted = to_uint8(decode_latents(base.vae, encode_pixels(base.vae, pixels_BCHW)))[0]
    assert np.abs(np.asarray(Image.open(FILMS / f"{STEM}.png")).astype(int) - wanted).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--still", "--loop"], "still with windows: a picture has none of it"),
        (["--still", "--also-still", "--freeinit", "1"], "still with also_still, noise"),
        (["--still", "--init-image", "a.png"], "still with start"),
        (["--still", "--motion-lora", "zoom.ckpt"], "still with motion_lora"),
        (["--codec", "av1"], "codec=av1 without an mp4: format=webp"),
        (["--seed", str(2**32)], "seed=4294967296: must be from 0 to 2^32 - 1"),
        (["--init-video", "a.mp4", "--init-image", "a.png"], "video and image: a film begins from one of both"),
        (["--init-video", "a.mp4", "--freeinit", "1"], "FreeInit begins from noise alone"),
        (["--strength", "0.5"], "strength=0.5: is for a film that begins from another"),
        (["--init-video", "a.mp4", "--strength", "1.5"], "strength=1.5: must be above 0, at most 1"),
        (["--init-video", "absent.mp4"], "video=absent.mp4: no such file"),
        (["--window-overlap", "16"], "overlap=16: must be from 0 to 15"),
        (["--window-size", "1"], "size=1: must be at least 2"),
        (["--motion-strength", "9"], "motion_strength=9: values must be from 0 to 4"),
        (["--motion-strength", "0: 1 | 50%: 2"], "position 50%: the number of a frame"),
        (["--concept-strength", "0: 1 | 4: 2"], "position 0: a share such as 40%"),
        (["control.concept_up=3"], "concept_up=3: must be from 0 to 2"),
        (["--freeinit", "11"], "freeinit=11: must be from 0 to 10"),
        (["--freeinit", "1"], "ends in pure noise"),
        (["--batch", "0"], "batch=0: must be at least 1"),
    ],
)
def test_what_can_not_be(
    base_folder: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.mp4", "a.png"):
        Path(name).touch()
    assert call(base_folder, *arguments) == 2
    complaint = capsys.readouterr().err
    assert said in complaint
    assert "allowed:" in complaint and "do:" in complaint
    assert not list(FILMS.glob("*.webp"))


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("0: a dog | 9: a cat", "frame 9 lies beyond the film's 3"),
        ("0: a dog | a cat", "'a cat': an entry is written `position: value`"),
        ("2: a dog | 1: a cat", "positions 2, 1 do not rise"),
    ],
)
def test_prompts_that_can_not_be(base_folder: Path, prompt: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(base_folder, prompt=prompt) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--init-video", "--init-image"])
def test_a_damaged_file_is_told(base_folder: Path, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("some.mp4").write_bytes(b"no film")
    assert call(base_folder, flag, "some.mp4") == 2
    assert re.search(r"some.mp4 can not be read[\s\S]*allowed: a film", capsys.readouterr().err)
