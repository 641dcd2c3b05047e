"""Codecs, webm, folders of PNGs and dithers: written, and read back with the readers that people have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from cdvideo.errors import UserError
from cdvideo.media import ffmpeg
from cdvideo.media.export import write_video
from cdvideo.media.ffmpeg import ENCODERS, encoder_names, find_encoder
from tests.media.test_export import SETTINGS, ffmpeg_report, make_frames, mean_difference, read_with_pillow

HAS = {codec for codec, encoders in ENCODERS.items() if encoder_names() & {encoder.name for encoder in encoders}}


@pytest.mark.parametrize(("codec", "told"), [("h264", "h264"), ("hevc", "hevc"), ("av1", "av1"), ("vp9", "vp9")])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (63, 95)])
def test_every_codec_keeps_frames_rate_colours_and_settings(
    tmp_path: Path, codec: str, told: str, height: int, width: int
) -> None:
    if codec not in HAS:
        pytest.skip(f"this ffmpeg has no encoder for {codec}")
    path = tmp_path / ("film.webm" if codec == "vp9" else "film.mp4")
    frames = make_frames(count=12, height=height, width=width)
    write_video(frames, path, fps=6, metadata=SETTINGS, codec="h264" if codec == "vp9" else codec)
    read = iio.imread(path)
    assert read.shape == (12, 64, 96, 3)
    assert all(mean_difference(before, after[:height, :width]) < 4 for before, after in zip(frames, read, strict=True))
    report = ffmpeg_report(path)
    assert told in report and "96x64" in report and "6 fps" in report
    assert "yuv420p(tv, bt709" in report and "Duration: 00:00:02.00" in report
    found = {line.partition(":")[0].strip().lower(): line.partition(":")[2].strip() for line in report.splitlines()}
    assert found["title"] == SETTINGS["prompt"]
    assert json.loads(found["comment"]) == SETTINGS


def test_a_codec_without_encoder_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffmpeg, "encoder_names", lambda: frozenset({"libx264", "libaom-av1"}))
    with pytest.raises(UserError, match=r"codec hevc[\s\S]*of this ffmpeg: h264, av1\n"):
        find_encoder("hevc")
    assert find_encoder("av1").name == "libaom-av1"
    monkeypatch.setattr(ffmpeg, "encoder_names", lambda: frozenset({"libsvtav1"}))
    assert find_encoder("av1").name == "libsvtav1"


def test_a_folder_of_frames(tmp_path: Path) -> None:
    folder = tmp_path / "film-png"
    frames = make_frames(height=63, width=95)
    write_video(make_frames(count=9), folder, fps=8, metadata={})
    write_video(iter(frames), folder, fps=8, metadata=SETTINGS)
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"{index:05d}.png" for index in range(6)], "none of the earlier film"
    for file, frame in zip(files, frames, strict=True):
        with Image.open(file) as image:
            assert np.array_equal(np.asarray(image), frame)
            assert json.loads(image.text["Comment"]) == {**SETTINGS, "fps": 8}
    assert [path.name for path in tmp_path.iterdir()] == ["film-png"]


def test_an_interrupt_leaves_the_earlier_frames_whole(tmp_path: Path) -> None:
    def interrupted() -> Iterator[np.ndarray]:
        yield from make_frames(count=2)
        raise KeyboardInterrupt

    write_video(make_frames(), tmp_path / "film", fps=8, metadata={})
    with pytest.raises(KeyboardInterrupt):
        write_video(interrupted(), tmp_path / "film", fps=8, metadata={})
    assert len(list((tmp_path / "film").iterdir())) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["film"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="something else than a film's frames"):
        write_video(make_frames(), tmp_path, fps=8, metadata={})
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def smooth(count: int) -> list[np.ndarray]:
    """A field of many slow hues that stands still, and a square that moves: too many colours for a palette."""
    y, x = np.mgrid[:96, :128]
    still = np.stack([x * 2 - x % 2, y * 2 + 30, 255 - (x + y)], axis=-1).clip(0, 255).astype(np.uint8)
    frames = [still.copy() for _ in range(count)]
    for index, frame in enumerate(frames):
        frame[4:12, 4 + 8 * index : 12 + 8 * index] = 255
    return frames


@pytest.mark.parametrize(("dither", "stands_still"), [("none", True), ("ordered", True), ("diffusion", False)])
def test_dithers(tmp_path: Path, dither: str, stands_still: bool) -> None:
    frames = smooth(4)
    for name in ("none", dither):
        write_video(frames, tmp_path / f"{name}.gif", fps=8, metadata={}, dither=name)
    read = read_with_pillow(tmp_path / f"{dither}.gif")
    assert stands_still == all(np.array_equal(frame[16:], read[0][16:]) for frame in read)

    def banding(frame: np.ndarray) -> float:
        """Error of means over 8 x 8 pixels, which is what the eye sees of a dither from afar."""
        error = frame[16:].astype(float) - frames[0][16:]
        return float(np.abs(error.reshape(10, 8, 16, 8, 3).mean(axis=(1, 3))).mean())

    if dither != "none":
        assert banding(read[0]) < 0.8 * banding(read_with_pillow(tmp_path / "none.gif")[0])
