"""Clips in every kind of file, at their own rate and at others; what can not be read is told."""

from __future__ import annotations

import subprocess
import tracemalloc
import wave
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from cdvideo.errors import UserError
from cdvideo.media.clips import iter_clip, read_clip
from cdvideo.media.export import write_video
from cdvideo.media.ffmpeg import ENCODERS, encoder_names
from cdvideo.media.films import UnreadableError, look_through, read_with_decord, read_with_ffmpeg
from tests.media.test_export import make_frames, mean_difference

HAS_AV1 = bool(encoder_names() & {encoder.name for encoder in ENCODERS["av1"]})
GREYS = range(10, 250, 20)  # 12 frames


def grey_film(path: Path, *, fps: float, height: int = 64, width: int = 96, codec: str = "h264") -> Path:
    """Twelve grey frames that grow brighter by 20 levels each: a frame is known by its level."""
    frames = (np.full((height, width, 3), level, np.uint8) for level in GREYS)
    write_video(frames, path, fps=fps, metadata={}, codec=codec)
    return path


def seen(frames_FHWC: np.ndarray) -> list[int]:
    """Which of the twelve frames each one is."""
    return [round((float(frame.mean()) - 10) / 20) for frame in frames_FHWC]


def ffmpeg(*arguments: str | Path) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True)


FILES = ["film.mp4", "film.webm", "film.gif", "film.webp", "film"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("height", "width"), [(64, 96), (64, 72), (64, 16), (160, 192)])
def test_what_was_written_comes_back(tmp_path: Path, name: str, height: int, width: int) -> None:
    """At some of these widths decord's arrays have a wrong shape."""
    frames = make_frames(height=height, width=max(width, 96))
    frames = [frame[:, -width:] // 2 + 20 * index for index, frame in enumerate(frames)]  # equal ones become one
    write_video(frames, tmp_path / name, fps=8, metadata={})
    read = read_clip(tmp_path / name)
    assert read.shape == (6, height, width, 3) and read.dtype == np.uint8
    assert all(mean_difference(before, after) < 10 for before, after in zip(frames, read, strict=True))


@pytest.mark.skipif(not HAS_AV1, reason="this ffmpeg has no encoder for AV1")
@pytest.mark.parametrize("fps", [None, 4])
def test_av1_which_decord_does_not_know(tmp_path: Path, fps: float | None) -> None:
    film = grey_film(tmp_path / "film.mp4", fps=8, codec="av1", width=160)
    with pytest.raises(UnreadableError):
        next(read_with_decord(film, look_through(film), fps))
    assert seen(read_clip(film, fps=fps)) == (list(range(12)) if fps is None else [0, 2, 4, 6, 8, 10])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (10, list(range(12))),
        (5, [0, 2, 4, 6, 8, 10]),
        (20, [index // 2 for index in range(24)]),
        (7.5, [0, 1, 2, 4, 5, 6, 8, 9, 10]),
    ],
)
def test_the_frame_that_is_shown_at_each_moment(tmp_path: Path, name: str, fps: float, expected: list[int]) -> None:
    assert seen(read_clip(grey_film(tmp_path / name, fps=10), fps=fps)) == expected


@pytest.mark.parametrize("reader", [read_with_decord, read_with_ffmpeg])
@pytest.mark.parametrize("fps", [None, 3, 10, 24])
def test_both_readers_of_films_agree(tmp_path: Path, reader: object, fps: float | None) -> None:
    pytest.importorskip("decord")
    film = grey_film(tmp_path / "film.mp4", fps=10, width=160)
    assert callable(reader)
    expected = list(range(12)) if fps is None else [int(index * 10 / fps + 1e-6) for index in range(100)]
    assert seen(reader(film, look_through(film), fps)) == [index for index in expected if index < 12]


@pytest.mark.parametrize("reader", [read_with_decord, read_with_ffmpeg])
def test_a_film_of_changing_rate(tmp_path: Path, reader: object) -> None:
    """Six frames at 10 a second, then six at 5: 1.8 seconds."""
    assert callable(reader)
    write_video((np.full((64, 160, 3), level, np.uint8) for level in GREYS), tmp_path / "a.mp4", fps=10, metadata={})
    changed = "setpts='if(lt(N,6),N,6+(N-6)*2)/10/TB'"
    ffmpeg("-i", tmp_path / "a.mp4", "-vf", changed, "-fps_mode", "vfr", "-enc_time_base", "1/1000", tmp_path / "b.mp4")
    at_ten = seen(reader(tmp_path / "b.mp4", look_through(tmp_path / "b.mp4"), 10))
    assert at_ten[:16] == [0, 1, 2, 3, 4, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10] and at_ten[16] == 11
    assert seen(reader(tmp_path / "b.mp4", look_through(tmp_path / "b.mp4"), None)) == list(range(12))


def test_what_a_phone_has_filmed_stands_upright(tmp_path: Path) -> None:
    write_video(make_frames(height=160, width=192), tmp_path / "film.mp4", fps=8, metadata={})
    ffmpeg("-display_rotation", "90", "-i", tmp_path / "film.mp4", "-c", "copy", tmp_path / "turned.mp4")
    turned, film = read_clip(tmp_path / "turned.mp4"), read_clip(tmp_path / "film.mp4")
    assert turned.shape == (6, 192, 160, 3)
    assert mean_difference(turned[2], np.rot90(film[2])) < 3


def test_size_covers_and_cuts_the_middle(tmp_path: Path) -> None:
    frame = np.zeros((64, 128, 3), np.uint8)
    frame[:, 32:96] = 200
    write_video([frame] * 2, tmp_path / "film", fps=8, metadata={})
    read = read_clip(tmp_path / "film", size=(32, 32))
    assert read.shape == (2, 32, 32, 3)
    assert (read[:, :, 2:-2] > 190).all()
    assert read_clip(tmp_path / "film", size=(128, 64)).tolist() == [frame.tolist()] * 2


def test_transparent_frames_are_laid_on_white_and_a_picture_is_a_clip_of_one(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_clip(tmp_path / "clear.png") == 255).all()
    assert read_clip(tmp_path / "clear.png").shape == (1, 8, 8, 3)


def test_no_more_is_in_memory_than_asked_for(tmp_path: Path) -> None:
    frames = (np.full((160, 192, 3), index, np.uint8) for index in range(200))
    write_video(frames, tmp_path / "film.mp4", fps=8, metadata={})
    next(iter_clip(tmp_path / "film.mp4"))  # what is imported at first use
    tracemalloc.start()
    for name in ("film.mp4",):
        assert len(read_clip(tmp_path / name, frames=8, fps=1, size=(96, 80))) == 8
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 160 * 192 * 3, "less than eight frames as they are in the film, of 200"


def test_too_short_clips_are_told(tmp_path: Path) -> None:
    film = grey_film(tmp_path / "film.gif", fps=10)
    with pytest.raises(UserError, match=r"film\.gif: 12 frames, where 13 are wanted"):
        read_clip(film, frames=13)
    with pytest.raises(UserError, match=r"6 frames at 5 a second, where 7 are wanted[\s\S]*a higher rate"):
        read_clip(film, frames=7, fps=5)
    assert len(read_clip(film, frames=12)) == 12


def test_what_is_no_clip_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        read_clip(tmp_path / "absent.mp4")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 8000, "NONE", ""))
        sound.writeframes(bytes(16000))
    with pytest.raises(UserError, match=r"sound\.wav can not be read \(no video stream\)"):
        read_clip(tmp_path / "sound.wav")
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 8)
    with pytest.raises(UserError, match=r"noise\.mp4 can not be read"):
        read_clip(tmp_path / "noise.mp4")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")  # more pixels than Pillow reads
    with pytest.raises(UserError, match=r"bomb\.png can not be read"):
        read_clip(tmp_path / "bomb.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures in the folder"):
        read_clip(tmp_path / "empty")
    (tmp_path / "empty" / "0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"0\.png in .*empty can not be read"):
        read_clip(tmp_path / "empty")


def test_of_a_damaged_film_the_whole_frames_are_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    frames = list(rng.integers(0, 256, (12, 160, 192, 3), dtype=np.uint8))  # noise: every frame takes much room
    write_video(frames, tmp_path / "film.mp4", fps=8, metadata={})
    content = (tmp_path / "film.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    read = read_clip(tmp_path / "cut.mp4")
    assert 1 <= len(read) < 12
    with pytest.raises(UserError, match="where 12 are wanted"):
        read_clip(tmp_path / "cut.mp4", frames=12)


def test_frames_of_several_sizes_are_told(tmp_path: Path) -> None:
    for index, side in enumerate((16, 24)):
        Image.new("RGB", (side, 16)).save(tmp_path / f"{index}.png")
    with pytest.raises(UserError, match="a frame of 24 x 16 pixels after others of 16 x 16"):
        read_clip(tmp_path)
    assert read_clip(tmp_path, size=(8, 8)).shape == (2, 8, 8, 3)
