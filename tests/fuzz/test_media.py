"""Pictures and clips with damaged bytes, and with headers that claim what is not there."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from cdvideo.media.clips import iter_clip, read_clip
from cdvideo.media.export import write_video
from cdvideo.media.images import read_pictures
from tests.fuzz.hostile import BYTE_EDITS, TEXTS, VALUES, ByteEdit, as_json, damaged, put
from tests.fuzz.watch import Watch

SIDE = 48
FORMS: dict[str, list[dict[str, Any]]] = {
    "png": [{}, {"mode": "P"}, {"mode": "RGBA"}, {"mode": "I;16"}, {"mode": "1"}, {"mode": "LA"}],
    "jpg": [{}, {"mode": "L"}, {"mode": "CMYK"}, {"progressive": True}],
    "webp": [{}, {"lossless": True}, {"mode": "RGBA"}],
    "gif": [{}],
    "tiff": [{}, {"compression": "tiff_lzw"}, {"mode": "F"}, {"mode": "I;16"}, {"mode": "LAB"}, {"mode": "CMYK"}],
    "bmp": [{}, {"mode": "P"}],
    "jp2": [{}],
    "avif": [{}],
}
SIZES = st.tuples(*[st.sampled_from([0, 1, 31, 2**8, 10_000, 13_000, 22_000, 2**16 - 1, 2**31 - 1, 2**32 - 1])] * 2)


def frame(mode: str = "RGB", shade: int = 0) -> Image.Image:
    ramp = np.linspace(0, 255, SIDE).astype(np.uint8)
    rgb = Image.fromarray(np.stack(np.broadcast_arrays(ramp[:, None], ramp, np.uint8(shade)), axis=-1))
    if mode == "F":
        return Image.fromarray(np.asarray(rgb.convert("L"), dtype=np.float32) / 255)
    if mode == "I;16":
        return Image.fromarray(np.asarray(rgb.convert("L"), dtype=np.uint16) * 257)
    if mode == "LAB":
        return Image.merge("LAB", rgb.split())
    return rgb.convert(mode)


def pictures(suffix: str) -> list[bytes]:
    """Small pictures of all the modes that a format has, with EXIF."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a dog"
    made = []
    for options in FORMS[suffix]:
        buffer = io.BytesIO()
        kind = Image.registered_extensions()[f".{suffix}"]
        with_exif = {"exif": exif} if suffix in ("png", "jpg", "webp", "avif", "tiff") else {}
        image = frame(options.get("mode", "RGB"))
        image.save(buffer, kind, **with_exif, **{key: value for key, value in options.items() if key != "mode"})
        made.append(buffer.getvalue())
    return made


@dataclass(frozen=True)
class Damaged:
    """Which of several files, and what is done to it; for PNG and its like, with checksums that are right again."""

    file: int
    edits: Sequence[ByteEdit]
    size: tuple[int, int] | None
    mend: bool

    def of(self, files: Sequence[bytes]) -> bytes:
        content = files[self.file % len(files)]
        content = damaged(content if self.size is None else _claiming(content, *self.size), self.edits)
        return _with_checksums(content) if self.mend else content


def damages() -> SearchStrategy[Damaged]:
    edits = st.one_of(BYTE_EDITS, BYTE_EDITS, st.just([]))
    return st.builds(Damaged, st.integers(0, 40), edits, st.one_of(st.none(), st.none(), SIZES), st.booleans())


def _claiming(content: bytes, width: int, height: int) -> bytes:
    """The header says another size."""
    short = struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
    if content.startswith(b"\x89PNG"):
        return _with_checksums(content[:16] + struct.pack(">II", width, height) + content[24:])
    if content.startswith(b"GIF8"):
        return content[:6] + short + content[10:]
    if content.startswith(b"BM"):
        return content[:18] + struct.pack("<II", width, height) + content[26:]
    if content.startswith(b"\xff\xd8"):
        at = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2"))
        return content[: at + 5] + struct.pack(">HH", height & 0xFFFF, width & 0xFFFF) + content[at + 9 :]
    if content[8:16] == b"WEBPVP8 ":
        return content[:26] + short + content[30:]
    if content[8:16] == b"WEBPVP8X":
        return content[:24] + struct.pack("<I", width)[:3] + struct.pack("<I", height)[:3] + content[30:]
    for mark in (b"ihdr", b"ispe\0\0\0\0"):
        if (at := content.find(mark)) >= 0:
            at += len(mark)
            return content[:at] + struct.pack(">II", width, height) + content[at + 8 :]
    return content


def _with_checksums(content: bytes) -> bytes:
    """A PNG whose chunks have the checksums of what they hold."""
    if not content.startswith(b"\x89PNG"):
        return content
    done, at = content[:8], 8
    while at + 12 <= len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        body = content[at + 4 : at + 8 + length]
        if at + 12 + length > len(content):
            break
        done += content[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return done + content[at:]


def _suffixes() -> list[str]:
    return [suffix for suffix in FORMS if suffix != "avif" or features.check("avif")]


@pytest.mark.parametrize("suffix", _suffixes())
def test_pictures(watch: Watch, suffix: str) -> None:
    files, folder = pictures(suffix), watch.room / "here"

    def read(content: bytes) -> Callable[[], object]:
        put(folder / f"a.{suffix}", content)
        return lambda: read_pictures(folder, short_side=64)

    for whole in files:
        watch.accept(read(whole))
    watch.check(st.one_of(damages(), damages(), st.binary(max_size=200)), lambda each: read(_content(each, files)))


def _content(each: Damaged | bytes, files: Sequence[bytes]) -> bytes:
    return each if isinstance(each, bytes) else each.of(files)


def films(folder: Path, suffix: str) -> list[bytes]:
    frames = np.stack([np.asarray(frame(shade=30 * number)) for number in range(6)])
    if suffix in ("mp4", "webm"):
        write_video(frames, folder / f"film.{suffix}", fps=8, metadata={})
        return [(folder / f"film.{suffix}").read_bytes()]
    kind = {"gif": "GIF", "webp": "WEBP", "png": "PNG", "avif": "AVIF"}[suffix]
    made = []
    for options in ({"duration": 125}, {"duration": [0, 10, 60_000, 5, 100, 200], "loop": 3}):
        buffer = io.BytesIO()
        images = [Image.fromarray(each) for each in frames]
        images[0].save(buffer, kind, save_all=True, append_images=images[1:], **options)
        made.append(buffer.getvalue())
    return made


@pytest.mark.parametrize("suffix", ["mp4", "webm", "gif", "webp", "png", "avif"])
def test_clips(watch: Watch, suffix: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    files = films(tmp_path_factory.mktemp("films"), suffix)
    path = watch.room / "here" / f"clip.{suffix}"

    def read(content: bytes, rate: float | None) -> Callable[[], object]:
        put(path, content)

        def as_is_used() -> object:
            if rate is None:
                return [each.mean() for each in islice(iter_clip(path), 40)]
            return read_clip(path, frames=4, fps=rate, size=(32, 32))

        return as_is_used

    for whole in files:
        watch.accept(read(whole, None))
        watch.accept(read(whole, 8))
    inputs = st.tuples(st.one_of(damages(), damages(), st.binary(max_size=200)), st.sampled_from([None, 8, 0.5, 24.0]))
    watch.check(inputs, lambda each: read(_content(each[0], files), each[1]))


NAMES = "0.png 1.png 10.png 0000.png a.jpg b.webp .hidden.png x.txt sub/1.png ٣.png".split() + ["9" * 200 + ".png"]
PAGES = st.one_of(st.sampled_from(["png", "jpg", "gif"]), st.binary(max_size=100), damages())
COMMENTS = st.one_of(st.none(), TEXTS, st.dictionaries(st.just("fps"), VALUES, min_size=1).map(as_json))


def test_folders_of_frames(watch: Watch) -> None:
    """Folders as `write_video` leaves them, with other files among theirs."""
    folder = watch.room / "here" / "frames"
    files = {suffix: pictures(suffix)[0] for suffix in ("png", "jpg", "gif")}

    def read(tree: dict[str, Any], comment: str | None, rate: float | None) -> Callable[[], object]:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for number, (name, page) in enumerate(tree.items()):
            (folder / name).parent.mkdir(exist_ok=True)
            content = files[page] if isinstance(page, str) else _content(page, [*files.values()])
            if page == "png" and number == 0 and comment is not None:
                content = _commented(comment)
            put(folder / name, content)
        return lambda: (list(islice(iter_clip(folder, fps=rate), 40)), read_clip(folder, frames=1, size=(32, 32)))

    watch.accept(read({"0.png": "png", "1.png": "png", "10.png": "png"}, json.dumps({"fps": 8}), 8))
    trees = st.dictionaries(st.sampled_from(NAMES), PAGES, max_size=5)
    inputs = st.tuples(trees, COMMENTS, st.sampled_from([None, 8, 0.5]))
    watch.check(inputs, lambda each: read(*each))


def _commented(text: str) -> bytes:
    buffer, info = io.BytesIO(), PngInfo()
    info.add_text("Comment", text.encode("latin-1", errors="replace").decode("latin-1")[:1000])
    frame().save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
