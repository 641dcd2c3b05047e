"""Films written, and read back with the readers that people have."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image, ImageSequence

from cdvideo.errors import UserError
from cdvideo.media.export import (
    enlarge,
    filmstrip,
    frame_durations,
    pad_to_even,
    settings_text,
    write_picture,
    write_video,
)
from cdvideo.media.ffmpeg import encoder_names

SETTINGS = {"prompt": "a dög; surfing = 'fun' #1", "seed": 7, "guidance": 6.0, "negative_prompt": "", "concept": None}


def make_frames(count: int = 6, height: int = 64, width: int = 96) -> list[np.ndarray]:
    """A bright square that moves over a slow gradient."""
    y, x = np.mgrid[:height, :width]
    frames = []
    for index in range(count):
        frame = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 90)], axis=-1).astype(np.uint8)
        frame[20:36, 4 + 8 * index : 20 + 8 * index] = (250, 240, 20)
        frames.append(frame)
    return frames


def ffmpeg_report(path: Path) -> str:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(path)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False).stderr


def mean_difference(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(left.astype(int) - right).mean())


@pytest.mark.parametrize("suffix", ["mp4", "gif", "webp"])
def test_frames_come_back(tmp_path: Path, suffix: str) -> None:
    frames = make_frames()
    path = tmp_path / f"film.{suffix}"
    write_video(iter(frames), path, fps=8, metadata=SETTINGS)
    read = iio.imread(path) if suffix == "mp4" else np.stack(read_with_pillow(path))
    assert read.shape == (6, 64, 96, 3)
    for before, after in zip(frames, read, strict=True):
        assert mean_difference(before, after) < 4
    assert mean_difference(frames[0], read[5]) > 4, "the frames must be in order"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def read_with_pillow(path: Path) -> list[np.ndarray]:
    with Image.open(path) as image:
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]


def test_mp4_plays_in_a_browser(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    write_video(make_frames(count=12), path, fps=6, metadata=SETTINGS)
    report = ffmpeg_report(path)
    assert "h264" in report and "yuv420p(tv, bt709" in report
    assert "96x64" in report and "6 fps" in report
    assert "Duration: 00:00:02.00" in report
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat"), "the index must come first, to play while loading"


def test_mp4_colours_are_right(tmp_path: Path) -> None:
    """Flat colours show a wrong colour matrix or range at once: by up to 30 levels."""
    colours = [(200, 30, 40), (20, 180, 60), (30, 60, 220), (128, 128, 128), (255, 255, 255), (0, 0, 0)]
    write_video((np.full((64, 64, 3), c, np.uint8) for c in colours), tmp_path / "f.mp4", fps=2, metadata={})
    for colour, frame in zip(colours, iio.imread(tmp_path / "f.mp4"), strict=True):
        assert np.abs(frame[32, 32].astype(int) - colour).max() <= 4


def test_mp4_reads_with_decord(tmp_path: Path) -> None:
    decord = pytest.importorskip("decord")
    write_video(make_frames(height=160, width=192), tmp_path / "film.mp4", fps=8, metadata=SETTINGS)
    reader = decord.VideoReader(str(tmp_path / "film.mp4"))
    assert len(reader) == 6
    assert reader[0].shape == (160, 192, 3)
    assert reader.get_avg_fps() == pytest.approx(8)


@pytest.mark.parametrize(("height", "width"), [(63, 95), (64, 95), (63, 96)])
def test_odd_sizes_are_padded_by_their_edge(tmp_path: Path, height: int, width: int) -> None:
    frames = make_frames(height=height, width=width)
    write_video(frames, tmp_path / "film.mp4", fps=8, metadata={})
    read = iio.imread(tmp_path / "film.mp4")
    assert read.shape == (6, 64, 96, 3)
    assert mean_difference(frames[0], read[0][:height, :width]) < 4


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_odd_sizes_stay_where_the_format_has_them(tmp_path: Path, suffix: str) -> None:
    frames = make_frames(height=63, width=95)
    write_video(frames, tmp_path / f"film.{suffix}", fps=8, metadata={})
    read = read_with_pillow(tmp_path / f"film.{suffix}")
    assert read[5].shape == (63, 95, 3) and mean_difference(read[5], frames[5]) < 4


def test_pad_to_even() -> None:
    frame = np.arange(5 * 3 * 3, dtype=np.uint8).reshape(5, 3, 3)
    padded = pad_to_even(frame)
    assert padded.shape == (6, 4, 3)
    assert np.array_equal(padded[:5, :3], frame)
    assert np.array_equal(padded[5], padded[4]) and np.array_equal(padded[:, 3], padded[:, 2])
    even = frame[:4, :2]
    assert pad_to_even(even) is even


def test_mp4_is_streamed(tmp_path: Path) -> None:
    """Frames are drawn from the iterator as they are written: an early failure comes before the last frame is made."""
    made = 0

    def film() -> Iterator[np.ndarray]:
        nonlocal made
        for frame in make_frames():
            made += 1
            if made == 3:
                raise KeyboardInterrupt
            yield frame

    with pytest.raises(KeyboardInterrupt):
        write_video(film(), tmp_path / "film.mp4", fps=8, metadata={})
    assert made == 3


@pytest.mark.parametrize("suffix", ["mp4", "gif", "webp"])
def test_an_interrupt_leaves_the_earlier_film_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"film.{suffix}"
    write_video(make_frames(), path, fps=8, metadata=SETTINGS)
    before = path.read_bytes()

    def interrupted() -> Iterator[np.ndarray]:
        yield from make_frames(count=2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(interrupted(), path, fps=8, metadata=SETTINGS)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def gif_colour_tables(content: bytes) -> tuple[bool, int, int]:
    """Whether there is a global colour table, the number of frames, and how many of them have a table of their own."""

    def table_size(flags: int) -> int:
        return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0

    def skip_blocks(at: int) -> int:
        while content[at]:
            at += content[at] + 1
        return at + 1

    frames = own = 0
    at = 13 + table_size(content[10])
    while content[at] != 0x3B:
        if content[at] == 0x21:
            at = skip_blocks(at + 2)
        else:
            assert content[at] == 0x2C
            frames, own = frames + 1, own + bool(content[at + 9] & 0x80)
            at = skip_blocks(at + 10 + table_size(content[at + 9]) + 1)
    return bool(content[10] & 0x80), frames, own


def test_gif_has_one_palette(tmp_path: Path) -> None:
    write_video(make_frames(), tmp_path / "film.gif", fps=8, metadata=SETTINGS)
    assert gif_colour_tables((tmp_path / "film.gif").read_bytes()) == (True, 6, 0)


def test_gif_palette_knows_the_last_frames_too(tmp_path: Path) -> None:
    """A palette of the first frame alone would have no red."""
    blue, red = np.full((32, 32, 3), (20, 30, 200), np.uint8), np.full((32, 32, 3), (220, 30, 20), np.uint8)
    write_video([blue, blue, red], tmp_path / "film.gif", fps=8, metadata={})
    assert mean_difference(read_with_pillow(tmp_path / "film.gif")[-1], red) < 3


def test_gif_has_no_dither(tmp_path: Path) -> None:
    """What does not move stays the same to the last pixel."""
    write_video(make_frames(), tmp_path / "film.gif", fps=8, metadata={})
    read = read_with_pillow(tmp_path / "film.gif")
    assert all(np.array_equal(frame[40:], read[0][40:]) for frame in read)


@pytest.mark.parametrize(("suffix", "unit"), [("gif", 10), ("webp", 1)])
@pytest.mark.parametrize("fps", [7, 8, 12, 24, 30])
def test_the_whole_film_has_its_duration(tmp_path: Path, suffix: str, unit: int, fps: float) -> None:
    path = tmp_path / f"film.{suffix}"
    write_video(make_frames(count=9), path, fps=fps, metadata={})
    with Image.open(path) as image:
        assert image.info["loop"] == 0  # for ever
        milliseconds = []
        for index in range(image.n_frames):
            image.seek(index)
            image.load()
            milliseconds.append(image.info["duration"])
    assert len(milliseconds) == 9
    assert sum(milliseconds) == pytest.approx(9000 / fps, abs=unit / 2)


def test_frame_durations() -> None:
    assert frame_durations(4, 8, unit=0.01) == [12, 13, 13, 12]
    assert frame_durations(3, 30, unit=0.01) == [3, 4, 3]
    assert frame_durations(2, 8, unit=0.001) == [125, 125]
    assert min(frame_durations(100, 50, unit=0.01)) == 2


def test_settings_are_in_the_files(tmp_path: Path) -> None:
    for suffix in ("mp4", "gif", "webp"):
        write_video(make_frames(), tmp_path / f"film.{suffix}", fps=8, metadata=SETTINGS)
    report = ffmpeg_report(tmp_path / "film.mp4")
    (title,) = [line.partition(":")[2].strip() for line in report.splitlines() if line.strip().startswith("title")]
    (comment,) = [line.partition(":")[2].strip() for line in report.splitlines() if line.strip().startswith("comment")]
    assert title == SETTINGS["prompt"]
    assert json.loads(comment) == SETTINGS
    with Image.open(tmp_path / "film.gif") as image:
        assert json.loads(image.info["comment"]) == SETTINGS
    with Image.open(tmp_path / "film.webp") as image:
        assert json.loads(image.getexif()[0x010E]) == SETTINGS


def test_picture_and_settings(tmp_path: Path) -> None:
    (frame,) = make_frames(count=1)
    write_picture(frame, tmp_path / "poster.png", metadata=SETTINGS)
    with Image.open(tmp_path / "poster.png") as image:
        assert np.array_equal(np.asarray(image), frame)
        assert image.text["Title"] == SETTINGS["prompt"]
        assert json.loads(image.text["Comment"]) == SETTINGS
    assert json.loads(settings_text(SETTINGS)) == SETTINGS and "dög" in settings_text(SETTINGS)


def test_enlarge() -> None:
    (frame,) = make_frames(count=1, height=128, width=160)
    (large,) = enlarge([frame], 384)
    assert large.shape == (384, 480, 3)
    assert mean_difference(large[1::3, 1::3], frame) < 3
    assert [next(enlarge([frame], side)).shape[0] for side in (0, 100, 128, 129, 300)] == [128, 128, 128, 256, 384]
    assert next(enlarge([frame], 128)) is frame


def test_filmstrip() -> None:
    frames = make_frames(count=16)
    strip = filmstrip(frames, count=4, gap=2)
    assert strip.shape == (64, 4 * 96 + 3 * 2, 3)
    assert np.array_equal(strip[:, :96], frames[0])
    assert np.array_equal(strip[:, -96:], frames[15])
    assert np.array_equal(strip[:, 96:98], np.full((64, 2, 3), 255))
    assert np.array_equal(filmstrip(frames[:1]), frames[0])


def test_refuses_other_formats_and_empty_films(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"film\.avi[\s\S]*\.mp4, \.webm, \.gif, \.webp"):
        write_video(make_frames(), tmp_path / "film.avi", fps=8, metadata={})
    with pytest.raises(UserError, match="0 frames"):
        write_video([], tmp_path / "film.mp4", fps=8, metadata={})


@pytest.mark.skipif(sys.platform == "win32", reason="the ffmpeg that fails is a shell script")
def test_an_ffmpeg_that_fails_at_its_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last frame is taken by then, and imageio does not look at how it ends."""
    failing, film = tmp_path / "ffmpeg", tmp_path / "film.mp4"
    script = ["#!/bin/sh", "for to; do :; done", "cat > /dev/null", "[ $to = - ] || echo stump > $to", "exit 1"]
    failing.write_text("\n".join(script))
    failing.chmod(0o755)
    film.write_bytes(b"an earlier film")
    assert "libx264" in encoder_names()  # of the ffmpeg that works
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(failing))
    with pytest.raises(UserError, match="a film of 6 frames, of which ffmpeg"):
        write_video(make_frames(), film, fps=8, metadata=SETTINGS)
    assert film.read_bytes() == b"an earlier film"
    assert {path.name for path in tmp_path.iterdir()} == {"ffmpeg", "film.mp4"}


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can not write"):
        write_video(make_frames(), tmp_path / "file" / "film.mp4", fps=8, metadata={})


def test_no_writer_holds_the_film(tmp_path: Path) -> None:
    """Of the frames that were handed out, at most the last two are alive."""
    handed: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []

    def film() -> Iterator[np.ndarray]:
        for index in range(8):
            alive.append(sum(reference() is not None for reference in handed))
            frame = np.full((32, 32, 3), 20 * index, np.uint8)
            handed.append(weakref.ref(frame))
            yield frame
            del frame

    for suffix in (".mp4", ".webm", ".gif", ".webp", ""):
        write_video(film(), tmp_path / f"film{suffix}", fps=8, metadata={})
        assert len(alive) == 8 and max(alive) <= 2, suffix
        handed.clear(), alive.clear()


MEASURE = """
import sys
import numpy as np
from pathlib import Path
from cdvideo.cli import peak_memory_bytes
from cdvideo.media.export import write_video

def film(count):
    y, x = np.mgrid[:384, :384]
    still = np.stack([x % 256, y % 256, (x + y) % 256], axis=-1).astype(np.uint8)
    for index in range(count):
        frame = still.copy()
        frame[40:120, 2 * index : 2 * index + 80] = 255
        yield frame

path = Path(sys.argv[1])
write_video(film(10), path, fps=8, metadata={})
before = peak_memory_bytes()
write_video(film(110), path, fps=8, metadata={})
print(peak_memory_bytes() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_memory_does_not_grow_with_the_film(tmp_path: Path, suffix: str) -> None:
    """100 frames more are 44 MB of pixels, 15 MB of palette indices."""
    path = tmp_path / f"film.{suffix}"
    told = subprocess.run([sys.executable, "-c", MEASURE, str(path)], check=True, capture_output=True, text=True).stdout
    print(f"{suffix}: {int(told) / 1e6:.1f} MB more for 100 frames more, a file of {path.stat().st_size / 1e6:.1f} MB")
    assert int(told) < 6e6 + 2 * path.stat().st_size


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_frames_that_stand_still(tmp_path: Path, suffix: str) -> None:
    """Each keeps its time, and nothing else changes."""
    first, *_, last = make_frames()
    write_video([first, first, first, last], tmp_path / f"film.{suffix}", fps=7, metadata={})
    read = read_with_pillow(tmp_path / f"film.{suffix}")
    assert len(read) in (4, 2)  # libwebp lengthens the one before
    assert mean_difference(read[-2], first) < 4 and mean_difference(read[-1], last) < 4
    with Image.open(tmp_path / f"film.{suffix}") as image:
        total = 0
        for index in range(image.n_frames):
            image.seek(index)
            image.load()
            total += image.info["duration"]
    assert total == pytest.approx(4000 / 7, abs=5)
