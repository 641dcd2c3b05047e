"""Films as cameras, discs, broadcast and editing programs leave them: every frame once, in order, as it is shown.

Each frame carries its own number, in six squares of black and white that no codec can blur away.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cdvideo.errors import UserError
from cdvideo.media import clips, films
from cdvideo.media.clips import iter_clip, read_clip
from cdvideo.media.export import write_video
from cdvideo.media.ffmpeg import filter_names
from cdvideo.media.films import look_through, read_with_decord
from cdvideo.runs import legal_name

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
COUNT, RATE, WIDTH, HEIGHT, SQUARE = 24, 24, 96, 64, 16
EVERY, AT_EIGHT = list(range(COUNT)), list(range(0, COUNT, 3))


def numbered(number: int) -> np.ndarray:
    """A frame whose number stands in its upper half, the lowest bit first."""
    frame = np.full((HEIGHT, WIDTH, 3), 60, np.uint8)
    for bit in range(6):
        frame[: HEIGHT // 2, bit * SQUARE : (bit + 1) * SQUARE] = 235 if number >> bit & 1 else 16
    return frame


def number_in(frame: np.ndarray) -> int:
    scale = frame.shape[1] / WIDTH
    columns = [slice(int((bit + 0.3) * SQUARE * scale), int((bit + 0.7) * SQUARE * scale)) for bit in range(6)]
    rows = slice(frame.shape[0] // 8, frame.shape[0] * 3 // 8)
    return sum(int(frame[rows, column].mean() > 125) << bit for bit, column in enumerate(columns))


def ffmpeg(*arguments: str | Path, frames: bytes | None = None) -> None:
    command = [FFMPEG, "-hide_banner", "-loglevel", "error", "-y", *map(str, arguments)]
    subprocess.run(command, input=frames, check=True)


def make(path: Path, *options: str, pixels: str = "yuv420p") -> Path:
    """The numbered film, by an encoder of ffmpeg's."""
    raw = b"".join(numbered(index).tobytes() for index in range(COUNT))
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-framerate", str(RATE), "-i", "-"]
    ffmpeg(*source, *options, "-pix_fmt", pixels, path, frames=raw)
    return path


def copied(path: Path, name: str, *options: str, before: Sequence[str] = ()) -> Path:
    """As trimming tools do it: packets as they are, in another container or with other marks."""
    ffmpeg(*before, "-i", path, "-c", "copy", *options, path.with_name(name))
    return path.with_name(name)


X264 = ("-c:v", "libx264", "-preset", "ultrafast", "-g", "8", "-bf", "2", "-crf", "20")
OPEN_GOP = (
    "-c:v", "libx264", "-crf", "20",
    "-x264-params", "open-gop=1:keyint=8:min-keyint=8:bframes=3:b-adapt=0:scenecut=0",
)  # fmt: skip
REFRESH = ("-c:v", "libx264", "-crf", "20", "-g", "8", "-x264-params", "intra-refresh=1:bframes=0")
X265 = ("-c:v", "libx265", "-preset", "ultrafast", "-g", "8", "-crf", "20", "-x265-params")
MPEG2 = ("-c:v", "mpeg2video", "-q:v", "2", "-bf", "2", "-g", "8")
MPEG4 = ("-c:v", "mpeg4", "-q:v", "2", "-bf", "2", "-g", "8")
VP9 = ("-c:v", "libvpx-vp9", "-g", "8", "-cpu-used", "8", "-crf", "20", "-b:v", "0")

# Name, encoder, pixels, whether decord is the reader.
MATRIX = [
    ("short_gop.mp4", X264, "yuv420p", True),
    ("one_gop.mp4", ("-c:v", "libx264", "-g", "250"), "yuv420p", True),
    ("no_b_frames.mp4", (*X264, "-bf", "0"), "yuv420p", True),
    ("closed.mov", X264, "yuv420p", True),
    ("closed.mkv", X264, "yuv420p", True),
    ("fragments.mp4", (*X264, "-movflags", "frag_keyframe+empty_moov"), "yuv420p", True),
    ("four_four_four.mp4", (*X264, "-vf", "pad=97:65"), "yuv444p", True),
    ("open_gop.mp4", OPEN_GOP, "yuv420p", False),
    ("open_gop.mkv", OPEN_GOP, "yuv420p", False),
    ("open_gop.ts", OPEN_GOP, "yuv420p", False),
    ("refresh.mp4", REFRESH, "yuv420p", None),  # decord for every frame, ffmpeg at a rate
    ("camera.m2ts", X264, "yuv420p", False),
    ("stream.h264", X264, "yuv420p", False),
    ("flash.flv", X264, "yuv420p", False),
    ("old.avi", X264, "yuv420p", False),
    ("closed_hevc.mp4", (*X265, "log-level=error:open-gop=0"), "yuv420p", None),
    ("open_hevc.mp4", (*X265, "log-level=error:open-gop=1"), "yuv420p", False),
    ("ten_bits_hevc.mkv", (*X265, "log-level=error:open-gop=0"), "yuv420p10le", None),
    ("vp9.webm", VP9, "yuv420p", True),
    ("vp9.mkv", VP9, "yuv420p", True),
    ("vp8.webm", ("-c:v", "libvpx", "-g", "8", "-auto-alt-ref", "1", "-lag-in-frames", "16"), "yuv420p", False),
    ("tv.ts", MPEG2, "yuv420p", False),
    ("disc.mpg", MPEG2, "yuv420p", False),
    ("disc.vob", MPEG2, "yuv420p", False),
    ("elementary.m2v", MPEG2, "yuv420p", False),
    ("fields.mpg", (*MPEG2, "-flags", "+ilme+ildct", "-vf", "setfield=tff"), "yuv420p", False),
    ("fields.mp4", ("-c:v", "libx264", "-flags", "+ilme+ildct", "-vf", "setfield=tff"), "yuv420p", False),
    ("divx.avi", MPEG4, "yuv420p", False),
    ("phone.3gp", (*MPEG4, "-bf", "0"), "yuv420p", False),
    ("divx.m4v", MPEG4, "yuv420p", False),
    ("windows.wmv", ("-c:v", "wmv2", "-q:v", "2", "-g", "8"), "yuv420p", False),
    ("theora.ogv", ("-c:v", "libtheora", "-q:v", "9", "-g", "8"), "yuv420p", False),
    ("motion_jpeg.avi", ("-c:v", "mjpeg", "-q:v", "2"), "yuvj420p", False),
    ("editing.mov", ("-c:v", "prores_ks"), "yuv422p10le", False),
    ("opaque_alpha.mov", ("-c:v", "prores_ks", "-profile:v", "4444"), "yuva444p10le", False),
    ("lossless.mkv", ("-c:v", "ffv1"), "yuv420p", False),
    ("screen.mov", ("-c:v", "qtrle"), "rgb24", False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "encoder", "pixels", "by_decord"), MATRIX, ids=[row[0] for row in MATRIX])
def test_every_frame_once_and_in_order(
    tmp_path: Path, name: str, encoder: tuple[str, ...], pixels: str, by_decord: bool | None
) -> None:
    film = make(tmp_path / name, *encoder, pixels=pixels)
    assert [number_in(frame) for frame in iter_clip(film)] == EVERY
    assert [number_in(frame) for frame in iter_clip(film, fps=8)] == AT_EIGHT
    assert [number_in(frame) for frame in iter_clip(film, fps=2)] == [0, 12]
    if by_decord is not None:
        assert (look_through(film).oddity is None) == by_decord


@pytest.mark.parametrize(
    ("encoder", "name", "first"),
    [(X264, "trimmed.mp4", 12), (X264, "trimmed.mov", 12), (X264, "trimmed.mkv", 8), (X264, "trimmed.ts", 8),
     (OPEN_GOP, "trimmed.mp4", 12), (OPEN_GOP, "trimmed.mov", 12), (OPEN_GOP, "trimmed.mkv", 8),
     (REFRESH, "trimmed.mp4", 12), (X265, "trimmed.mp4", 12), (VP9, "trimmed.webm", 8), (VP9, "trimmed.mp4", 12)],
)  # fmt: skip
def test_films_cut_without_encoding_them_anew(tmp_path: Path, encoder: tuple[str, ...], name: str, first: int) -> None:
    """mp4 and mov keep the frames before the cut, and a list that hides them; the others begin with a key frame."""
    encoder = (*encoder, "log-level=error") if encoder is X265 else encoder
    cut = copied(make(tmp_path / "whole.mkv", *encoder), name, before=["-ss", "0.49"])
    assert [number_in(frame) for frame in iter_clip(cut)] == list(range(first, COUNT))
    assert [number_in(frame) for frame in iter_clip(cut, fps=8)] == list(range(first, COUNT, 3))


def test_a_recording_that_begins_amid_a_group_of_frames(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = make(tmp_path / "whole.m2ts", *X264).read_bytes()
    packets = len(content) // 192
    (tmp_path / "later.m2ts").write_bytes(content[packets // 3 * 192 :])
    numbers = [number_in(frame) for frame in iter_clip(tmp_path / "later.m2ts")]
    assert numbers[0] in (8, 16) and numbers == list(range(numbers[0], COUNT))


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv"])
def test_a_film_that_begins_late(tmp_path: Path, name: str) -> None:
    late = copied(make(tmp_path / "whole.mp4", *X264), name, before=["-itsoffset", "1.5"])
    assert [number_in(frame) for frame in iter_clip(late)] == EVERY
    assert [number_in(frame) for frame in iter_clip(late, fps=8)] == AT_EIGHT


@pytest.mark.parametrize("name", ["changing.mp4", "changing.mkv", "changing.webm", "changing.ts", "changing.mov"])
def test_a_changing_rate(tmp_path: Path, name: str) -> None:
    """Twelve frames at 24 a second, then twelve at 8."""
    encoder = VP9 if name.endswith("webm") else X264
    slower = ("-vf", "setpts='if(lt(N,12),N,12+(N-12)*3)/24/TB'", "-fps_mode", "vfr", "-enc_time_base", "1/1000")
    film = make(tmp_path / name, *encoder, *slower)
    assert [number_in(frame) for frame in iter_clip(film)] == EVERY
    assert [number_in(frame) for frame in iter_clip(film, fps=8)][:15] == [0, 3, 6, 9, *range(12, 23)]


@pytest.mark.parametrize("name", ["wide.mp4", "wide.mkv", "wide.mpg", "wide.webm"])
def test_pixels_that_are_not_square(tmp_path: Path, name: str) -> None:
    encoder = {".mpg": MPEG2, ".webm": VP9}.get(Path(name).suffix, X264)
    shape = "setsar=2/1" if name != "wide.mpg" else "setdar=16/9"
    film = make(tmp_path / name, *encoder, "-vf", shape)
    read = read_clip(film)
    assert read.shape == (COUNT, HEIGHT, 192 if name != "wide.mpg" else 114, 3)
    assert [number_in(frame) for frame in read] == EVERY


@pytest.mark.parametrize("name", ["turned.mp4", "turned.mov", "turned.mkv"])
@pytest.mark.parametrize("angle", [90, 180, 270])
def test_what_a_phone_has_filmed(tmp_path: Path, name: str, angle: int) -> None:
    before = ["-display_rotation", str(angle)]
    turned = read_clip(copied(make(tmp_path / "film.mp4", *X264), name, before=before), fps=8)
    assert [number_in(np.rot90(frame, -angle // 90)) for frame in turned] == AT_EIGHT


def test_a_turned_film_of_wide_pixels(tmp_path: Path) -> None:
    wide = make(tmp_path / "film.mp4", *X264, "-vf", "setsar=2/1")
    turned = copied(wide, "turned.mp4", before=["-display_rotation", "90"])
    assert read_clip(turned, frames=1).shape == (1, 2 * WIDTH, HEIGHT, 3)


def test_transparent_films_are_laid_on_white(tmp_path: Path) -> None:
    clear = ("-vf", "format=argb,colorchannelmixer=aa=0")
    for name, encoder, pixels in (
        ("clear.mov", ("-c:v", "qtrle"), "argb"),
        ("clear4444.mov", ("-c:v", "prores_ks", "-profile:v", "4444"), "yuva444p10le"),
        ("clear.webm", VP9, "yuva420p"),
        ("clear8.webm", ("-c:v", "libvpx", "-auto-alt-ref", "0"), "yuva420p"),
    ):
        assert (read_clip(make(tmp_path / name, *clear, *encoder, pixels=pixels)) > 250).all(), name


@pytest.mark.skipif("zscale" not in filter_names(), reason="this ffmpeg has not the filter")
@pytest.mark.parametrize("transfer", ["arib-std-b67", "smpte2084"])
def test_films_of_high_dynamic_range(tmp_path: Path, transfer: str) -> None:
    """Colours of sRGB, stored as HLG or PQ in BT.2020 as phones do it, come back; white is a little below 255."""
    colours = [(200, 70, 60), (80, 180, 80), (60, 80, 190), (120, 120, 120), (20, 20, 20), (255, 255, 255)]
    raw = b"".join(np.full((HEIGHT, WIDTH, 3), colour, np.uint8).tobytes() for colour in colours)
    filters = [
        "format=gbrp",
        "setparams=colorspace=gbr:color_primaries=bt709:color_trc=iec61966-2-1:range=pc",
        "zscale=tin=iec61966-2-1:pin=bt709:min=gbr:rin=full:t=linear:npl=203",
        "format=gbrpf32le",
        f"zscale=pin=bt709:tin=linear:min=gbr:p=bt2020:t={transfer}:m=bt2020nc:r=limited:npl=203",
        "format=yuv420p10le",
    ]
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-framerate", "8", "-i", "-"]
    tags = ["-color_primaries", "bt2020", "-color_trc", transfer, "-colorspace", "bt2020nc"]
    film = tmp_path / "film.mp4"
    ffmpeg(*source, "-vf", ",".join(filters), *X265, "log-level=error", *tags, film, frames=raw)
    for frame, colour in zip(read_clip(film), colours, strict=True):
        assert np.abs(frame[HEIGHT // 2, WIDTH // 2].astype(int) - colour).max() < (25 if colour == (255,) * 3 else 6)


def test_films_of_fields_are_without_combs(tmp_path: Path) -> None:
    """Two fields of two moments, 1 and 2, 3 and 4, ...: the second square is white in one of both."""
    fields = ("-vf", "trim=start_frame=1,tinterlace=interleave_top,setfield=tff", "-flags", "+ilme+ildct")
    film = make(tmp_path / "film.mp4", "-c:v", "libx264", "-crf", "5", *fields)
    assert look_through(film).deinterlace
    read = read_clip(film)
    assert len(read) == 11
    for index, frame in enumerate(read):
        rows = frame.astype(int)[4 : HEIGHT // 2 - 4, SQUARE + 4 : 2 * SQUARE - 4].mean(axis=(1, 2))
        assert np.abs(rows - (235 if index % 2 else 16)).max() < 30, "what the first field shows"


def test_decord_is_used_where_it_is_right(tmp_path: Path) -> None:
    pytest.importorskip("decord")
    film = make(tmp_path / "plain.mp4", *X264)
    contents = look_through(film)
    assert [number_in(frame) for frame in read_with_decord(film, contents, 8)] == AT_EIGHT
    assert contents.starts.tolist() == pytest.approx([index / 24 for index in EVERY], abs=1e-4)
    refresh = make(tmp_path / "refresh.mp4", *REFRESH)
    with pytest.raises(films.UnreadableError, match="no decoder can begin"):
        list(read_with_decord(refresh, look_through(refresh), 3))


def test_decord_is_left_where_it_tells_other_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = make(tmp_path / "plain.mp4", *X264)
    contents = look_through(film)
    shifted = films.Contents(contents.starts * 1.1, contents.end, "h264", contents.keys, None, False, True, None, False)
    monkeypatch.setattr(clips, "look_through", lambda path: shifted)
    with pytest.raises(films.UnreadableError, match="other times"):
        next(read_with_decord(film, shifted, None))
    assert [number_in(frame) for frame in iter_clip(film)] == EVERY


def test_a_damaged_film_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = bytearray(make(tmp_path / "film.mp4", *X264).read_bytes())
    middle = content.index(b"mdat") + (len(content) - content.index(b"mdat")) // 2
    content[middle : middle + 60] = bytes(60)
    (tmp_path / "damaged.mp4").write_bytes(content)
    list(iter_clip(tmp_path / "damaged.mp4"))
    (record,) = caplog.records
    assert record.getMessage().startswith("damaged.mp4 is damaged (")


# Names and scripts


@pytest.mark.parametrize("name", ["-x", "concat:y", "http:z", "a%03d b'c"])
def test_names_that_ffmpeg_would_take_for_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A folder and a file of each name, given as they stand, written and read."""
    monkeypatch.chdir(tmp_path)
    frames = [numbered(index) for index in range(6)]
    for path in (Path(name) / "film.mp4", Path(f"{name}.mp4")):
        write_video(frames, path, fps=8, metadata={})
        assert [number_in(frame) for frame in iter_clip(path)] == list(range(6))
        assert [number_in(frame) for frame in films.read_with_ffmpeg(path, look_through(path), 8)] == list(range(6))


@pytest.mark.parametrize("name", ["evil.mp4", "list.m3u8", "evil.ffconcat"])
def test_playlists_are_no_films(tmp_path: Path, name: str) -> None:
    make(tmp_path / "a.ts", *X264)
    script = "ffconcat version 1.0\nfile a.ts\n" if name != "list.m3u8" else (
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.ts\n#EXT-X-ENDLIST\n"
    )  # fmt: skip
    (tmp_path / name).write_text(script)
    with pytest.raises(UserError, match="a playlist, which names other files"):
        read_clip(tmp_path / name)
    (tmp_path / name).write_text("# note\n\n" + script)  # by a mark that is not at the beginning
    with pytest.raises(UserError, match="can not be read"):
        read_clip(tmp_path / name)


# Bounds


def test_frames_beyond_all_measure_are_refused_before_one_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film = make(tmp_path / "film.mp4", *X264)
    monkeypatch.setattr(films, "MOST_PIXELS", WIDTH * HEIGHT - 1)
    with pytest.raises(UserError, match="frames of 96 x 64 pixels, more than"):
        read_clip(film)
    monkeypatch.setattr(films, "MOST_PIXELS", WIDTH * HEIGHT + 1)
    assert len(read_clip(film)) == COUNT
    wide = make(tmp_path / "wide.mp4", *X264, "-vf", "setsar=2/1")
    with pytest.raises(UserError, match="more than"):
        read_clip(wide)
    monkeypatch.setattr(films, "MOST_PIXELS", 1 << 26)
    monkeypatch.setattr(films, "MOST_FRAMES", COUNT - 1)
    with pytest.raises(UserError, match="more than 23 frames"):
        read_clip(film)
    monkeypatch.setattr(films, "MOST_FRAMES", COUNT)
    assert len(read_clip(film)) == COUNT
    monkeypatch.setattr(clips, "_MOST_BYTES", 10 * WIDTH * HEIGHT * 3)
    with pytest.raises(UserError, match="11 frames of 96 x 64 pixels, and more to come"):
        read_clip(film)
    assert len(read_clip(film, frames=10)) == 10


def test_a_film_that_claims_to_last_for_years_is_told(tmp_path: Path) -> None:
    """An avi whose seconds a frame, a number in its header, are broken."""
    content = bytearray(make(tmp_path / "film.avi", *MPEG4).read_bytes())
    scale = content.index(b"strh") + 28
    content[scale : scale + 4] = struct.pack("<I", 1_556_739_414)
    (tmp_path / "film.avi").write_bytes(content)
    with pytest.raises(UserError, match="its times are broken"):
        read_clip(tmp_path / "film.avi", fps=8)
    assert [number_in(frame) for frame in iter_clip(tmp_path / "film.avi")] == EVERY
    frames = [Image.fromarray(numbered(index)) for index in range(2)]
    frames[0].save(tmp_path / "film.webp", save_all=True, append_images=frames[1:], duration=[1 << 23, 100])
    assert len(list(iter_clip(tmp_path / "film.webp", fps=1))) == 601


def test_an_ffmpeg_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = make(tmp_path / "film.mp4", *X264)
    contents = look_through(film)
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(films, "_PATIENCE", 0.3)
    monkeypatch.setattr(films, "_ffmpeg_reads", lambda path, *_: sleeper)
    with pytest.raises(films.UnreadableError, match="no frame in 0.3 s"):
        list(films.read_with_ffmpeg(film, contents, None))
    with pytest.raises(UserError, match="ffmpeg has not got through it"):
        read_clip(film)


def test_what_is_left_of_a_reader_when_no_more_is_wanted(tmp_path: Path) -> None:
    film = make(tmp_path / "film.ts", *X264)
    frames = iter_clip(film)
    assert number_in(next(frames)) == 0
    frames.close()  # must not wait, nor leave a process: the folder can be emptied on Windows too
    film.unlink()


# Animations and folders of frames


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
@pytest.mark.parametrize(("told", "shown"), [(0, 100), (10, 100), (20, 20), (40, 40)])
def test_delays_as_browsers_have_them(tmp_path: Path, suffix: str, told: int, shown: int) -> None:
    pictures = [Image.fromarray(numbered(index)) for index in range(12)]
    film = tmp_path / f"film.{suffix}"
    pictures[0].save(film, save_all=True, append_images=pictures[1:], duration=told)
    assert [number_in(frame) for frame in iter_clip(film, fps=1000 / shown)] == list(range(12))
    assert len(list(iter_clip(film, fps=10))) == -(-12 * shown // 100)


def test_what_old_readers_show_of_an_animated_png_is_no_frame(tmp_path: Path) -> None:
    pictures = [Image.fromarray(numbered(index)) for index in range(4)]
    pictures[0].save(tmp_path / "film.png", save_all=True, append_images=pictures[1:], duration=100, default_image=True)
    assert [number_in(frame) for frame in iter_clip(tmp_path / "film.png")] == [1, 2, 3]


@pytest.mark.parametrize("name", ["{}.png", "{}.PNG", "frame-{}.jpg", "f{}_x.webp", "a12b{}.Bmp", "{:05d}.png"])
def test_frames_in_the_order_of_their_numbers(tmp_path: Path, name: str) -> None:
    for index in range(12):
        Image.fromarray(numbered(index)).save(tmp_path / name.format(index))
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / f"._{name.format(1)}").write_bytes(b"x")
    assert [number_in(frame) for frame in iter_clip(tmp_path)] == list(range(12))


def test_pictures_of_another_kind_beside_frames_are_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for index in range(3):
        Image.fromarray(numbered(index)).save(tmp_path / f"{index}.png")
    Image.fromarray(numbered(9)).save(tmp_path / "cover.jpg")
    assert [number_in(frame) for frame in iter_clip(tmp_path)] == [0, 1, 2]
    assert "left out are cover.jpg" in caplog.text


def test_frames_that_lie_deeper_are_told(tmp_path: Path) -> None:
    (tmp_path / "take 1" / "frames").mkdir(parents=True)
    Image.fromarray(numbered(0)).save(tmp_path / "take 1" / "frames" / "0.png")
    with pytest.raises(UserError, match="but below it: take 1.frames") as caught:
        read_clip(tmp_path)
    assert str(tmp_path / "take 1" / "frames") in caught.value.do


@pytest.mark.parametrize(
    "comment",
    ["[" * 200_000, '{"fps": 1e400}', '{"fps": NaN}', '{"fps": -1}', '{"fps": 1e-9}', '{"fps": [8]}', "[]", "{"],
)
def test_a_comment_that_is_not_of_ours(tmp_path: Path, comment: str) -> None:
    text = PngInfo()
    text.add_text("Comment", comment, zip=True)
    for index in range(3):
        Image.fromarray(numbered(index)).save(tmp_path / f"{index}.png", pnginfo=text)
    assert [number_in(frame) for frame in iter_clip(tmp_path, fps=8)] == [0, 1, 2]


def png_of(width: int, height: int) -> bytes:
    """The beginning of a grey PNG: so much is read before its pixels are asked for."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1000))
    chunks = (
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, data)
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_a_frame_of_too_many_pixels_is_told(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png_of(20_000, 20_000))
    with pytest.raises(UserError, match=r"0\.png in .* can not be read \(20000 x 20000 pixels"):
        read_clip(tmp_path)


# Films out


@pytest.mark.parametrize(
    ("text", "legal"),
    [("a dog", "a dog"), ('<new1>:"x"?*|', "-new1-x-"), ("a/b\\c", "a-b-c"), ("con", "_con"), ("Aux.png", "_Aux.png"),
     ("dots...", "dots"), ("...", "_"), ("конь", "конь"), ("console", "console")],
)  # fmt: skip
def test_names_that_windows_allows(text: str, legal: str) -> None:
    assert legal_name(text) == legal


def test_letters_that_a_terminal_has_not_are_replaced(tmp_path: Path) -> None:
    script = "import sys\nfrom cdvideo.cli import run_main\nsys.exit(run_main(lambda _: print('wrote конь-0.mp4')))"
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, env={**_environment(), "PYTHONIOENCODING": "cp1252"}
    )
    assert (ran.returncode, ran.stdout.split(), ran.stderr) == (0, [b"wrote", b"????-0.mp4"], b"")


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def test_two_at_once_do_not_take_the_same_name(tmp_path: Path) -> None:
    from cdvideo.sampling.animate import _own_stem
    from cdvideo.sampling.config import AnimateConfig

    config = AnimateConfig(prompt="a dog", out=tmp_path)
    ours, theirs = {"seed": 0, "steps": 10}, {"seed": 0, "steps": 20}
    with _own_stem(config, ours) as stem, _own_stem(config, theirs) as other:
        assert (stem, other) == ("a-dog-0", "a-dog-0-2")
    with _own_stem(config, ours) as stem, _own_stem(config, theirs) as other:
        assert (stem, other) == ("a-dog-0", "a-dog-0-2"), "made again in the same way"
    with pytest.raises(KeyboardInterrupt), _own_stem(config, {"seed": 0, "steps": 30}) as stem:
        assert stem == "a-dog-0-3"
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-dog-0-2.json", "a-dog-0.json"]
    assert json.loads((tmp_path / "a-dog-0.json").read_text(encoding="utf-8")) == ours
