"""Frames out: mp4, webm, gif, webp and PNGs, each whole or not at all, with the settings that made them inside."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import GifImagePlugin, Image, ImageChops
from PIL.PngImagePlugin import PngInfo

from cdvideo.errors import UserError
from cdvideo.media.ffmpeg import Codec, encode
from cdvideo.media.spool import Frame, Spool
from cdvideo.runs import atomic_path, ensure_writable

Metadata: TypeAlias = Mapping[str, str | int | float | bool | None]

Dither: TypeAlias = Literal["none", "ordered", "diffusion"]

_PALETTE_STEP = 16  # levels between neighbouring colours of a palette of 256, roughly, in a film of few hues
_EXIF_DESCRIPTION = 0x010E
_EXIF_SOFTWARE = 0x0131


def write_video(
    frames: Iterable[Frame],
    path: Path,
    *,
    fps: float,
    metadata: Metadata,
    codec: Codec = "h264",
    dither: Dither = "none",
) -> None:
    """Writes a film in the format of the path's suffix: .mp4, .webm, .gif, .webp; without one, a folder of PNGs.

    Args:
        frames: frame_HWC, uint8 RGB, all of one size, taken one by one: no writer holds the film. A gif and a webp,
            which are read twice, keep it in a temporary file. In an mp4 or webm of odd sides the last row or column is
            repeated.
        fps: frames a second.
        metadata: settings that made the film, for the file's comment; `prompt` becomes the title too.
        codec: of an mp4: "h264", which plays everywhere, or the smaller "hevc" and "av1".
        dither: of a gif's 256 colours: "none", "ordered" (a pattern that stands still), or "diffusion" (finer, but its
            grain crawls from frame to frame).

    Raises:
        UserError: another suffix, no frame, no encoder for the codec, or a folder that can not be written.
    """
    writers: dict[str, Callable[[Iterator[Frame], Path, float, Metadata], None]] = {
        ".mp4": partial(_write_encoded, codec=codec, options=("-movflags", "+faststart")),  # plays while it loads
        ".webm": partial(_write_encoded, codec="vp9"),
        ".gif": partial(_write_gif, dither=dither),
        ".webp": _write_webp,
        "": _write_folder,
    }
    if path.suffix not in writers:
        allowed = f"{', '.join(filter(None, writers))}, or no suffix for a folder of PNGs"
        raise UserError(f"film {path.name}", allowed=allowed, do="choose one of these formats")
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise UserError(f"film {path.name} of 0 frames", allowed="at least 1 frame", do="ask for more frames")
    place = atomic_path if path.suffix else _atomic_folder
    with place(path) as part:
        writers[path.suffix](chain([first], iterator), part, fps, metadata)


def write_picture(frame: Frame, path: Path, *, metadata: Metadata) -> None:
    """Writes a PNG with the settings in its text chunks."""
    with atomic_path(path) as part:
        Image.fromarray(frame).save(part, pnginfo=_png_text(metadata))


def settings_text(metadata: Metadata) -> str:
    """The settings as JSON, for whoever looks beside the film instead of into it."""
    return json.dumps(dict(metadata), indent=2, ensure_ascii=False) + "\n"


def enlarge(frames: Iterable[Frame], short_side: int) -> Iterator[Frame]:
    """Enlarges frames (Lanczos) by the smallest whole factor that brings the short side to `short_side` or more.

    Larger frames pass as they are.
    """
    for frame in frames:
        height, width = frame.shape[:2]
        factor = -(-short_side // min(height, width))
        if factor > 1:
            image = Image.fromarray(frame)
            frame = np.asarray(image.resize((width * factor, height * factor), Image.Resampling.LANCZOS))
        yield frame


def filmstrip(frames: Sequence[Frame] | npt.NDArray[np.uint8], *, count: int = 8, gap: int = 4) -> Frame:
    """A row of up to `count` frames, evenly spread from the first to the last, `gap` white pixels apart."""
    picked = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    height = frames[0].shape[0]
    white = np.full((height, gap, 3), 255, dtype=np.uint8)
    row = [part for index in picked for part in (white, frames[index])]
    return np.concatenate(row[1:], axis=1)


def frame_durations(count: int, fps: float, *, unit: float) -> list[int]:
    """Whole units of time for each frame, rounded so that every frame starts within half a unit of its due time.

    Args:
        unit: seconds; 0.01 for gif, 0.001 for webp.
    """
    starts = [round(index / fps / unit) for index in range(count + 1)]
    return [end - start for start, end in zip(starts, starts[1:], strict=False)]


def pad_to_even(frame: Frame) -> Frame:
    """Repeats the last row or column where a side is odd: H.264 with 4:2:0 colour has pairs of pixels."""
    height, width = frame.shape[:2]
    if height % 2 == 0 and width % 2 == 0:
        return frame
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _write_encoded(
    frames: Iterator[Frame], path: Path, fps: float, metadata: Metadata, *, codec: Codec, options: Sequence[str] = ()
) -> None:
    title = ["-metadata", f"title={metadata.get('prompt', '')}", "-metadata", f"comment={_as_json(metadata)}"]
    encode(map(pad_to_even, frames), path, fps=fps, codec=codec, options=[*options, *title])


def _write_folder(frames: Iterator[Frame], path: Path, fps: float, metadata: Metadata) -> None:
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"{index:05d}.png", pnginfo=_png_text({**metadata, "fps": fps}))


def require_frames_alone(path: Path) -> None:
    """Before hours of sampling: whether a film's frames can be written there.

    Raises:
        UserError: it holds something else.
    """
    if path.exists() and not (
        path.is_dir() and all(re.fullmatch(r"\d{5,}\.png", file.name) for file in path.iterdir())
    ):
        raise UserError(
            f"{path} holds something else than a film's frames",
            allowed="a folder that does not exist yet, or one of frames alone",
            do="move it away, or name another folder with --out",
        )


@contextmanager
def _atomic_folder(path: Path) -> Iterator[Path]:
    """As `atomic_path`, for a folder of frames; an earlier one gives way, a folder of anything else does not."""
    require_frames_alone(path)
    ensure_writable(path.parent)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    part.mkdir()
    try:
        yield part
        if path.exists():
            shutil.rmtree(path)
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # there only where the film was not finished


def _png_text(metadata: Metadata) -> PngInfo:
    text = PngInfo()
    text.add_itxt("Title", str(metadata.get("prompt", "")))
    text.add_itxt("Comment", _as_json(metadata))
    return text


def _write_gif(frames: Iterator[Frame], path: Path, fps: float, metadata: Metadata, *, dither: Dither) -> None:
    """One palette for the whole film; of each frame, the box of what has changed.

    Pillow's `save` would hold all frames, so its parts of a gif are written one after the other.
    """
    diffusion = Image.Dither.FLOYDSTEINBERG if dither == "diffusion" else Image.Dither.NONE
    with Spool(frames) as film, path.open("wb") as file:
        palette = _common_palette(film)
        last: Image.Image | None = None
        for frame, hundredths in zip(film, frame_durations(len(film), fps, unit=0.01), strict=True):
            image = Image.fromarray(frame)
            shown = _raise_by_pattern(image) if dither == "ordered" else image
            indexed = shown.quantize(palette=palette, dither=diffusion)
            if last is None:
                settings = {"loop": 0, "comment": _as_json(metadata).encode("utf-8")}
                file.writelines(GifImagePlugin.getheader(indexed, info=settings)[0])
                box = (0, 0, *indexed.size)
            else:
                box = ImageChops.subtract_modulo(indexed, last).getbbox() or (0, 0, 1, 1)
            file.writelines(GifImagePlugin.getdata(indexed.crop(box), box[:2], duration=10 * hundredths))
            last = indexed
        file.write(b";")


def _raise_by_pattern(image: Image.Image) -> Image.Image:
    """Ordered dither (Bayer, 1973): each pixel is raised or lowered by its place in a 4 x 4 pattern, then rounded."""
    pattern = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]])
    levels = (pattern - 7.5) / 16 * _PALETTE_STEP
    rows, columns = (-(-side // 4) for side in (image.height, image.width))
    field = np.tile(levels, (rows, columns))[: image.height, : image.width, None]
    return Image.fromarray((np.asarray(image) + field).round().clip(0, 255).astype(np.uint8))


def _common_palette(film: Spool) -> Image.Image:
    """256 colours by median cut over all frames; of a long or large film, over a grid of its pixels."""
    total = len(film) * film[0].shape[0] * film[0].shape[1]
    step = max(1, round((total / 1_000_000) ** 0.5))
    pixels = [frame[::step, ::step].reshape(-1, 3).copy() for frame in film]
    return Image.fromarray(np.concatenate(pixels)[None]).quantize(256, method=Image.Quantize.MEDIANCUT)


def _write_webp(frames: Iterator[Frame], path: Path, fps: float, metadata: Metadata) -> None:
    """libwebp holds what it has encoded until the end, as many bytes as the file will have."""
    exif = Image.Exif()
    exif[_EXIF_DESCRIPTION] = json.dumps(dict(metadata))  # EXIF text is ASCII
    exif[_EXIF_SOFTWARE] = "cdvideo"
    with Spool(frames) as film:
        durations = frame_durations(len(film), fps, unit=0.001)
        _as_reel(film).save(path, "WEBP", save_all=True, duration=durations, loop=0, quality=90, method=4, exif=exif)


def _as_reel(film: Spool) -> Image.Image:
    """A film as Pillow's own readers show one: a picture that turns into the frame that is sought."""
    reel: Any = Image.fromarray(film[0])
    reel.n_frames = len(film)
    reel.seek = lambda index: reel.paste(Image.fromarray(film[index]))
    return reel


def _as_json(metadata: Metadata) -> str:
    return json.dumps(dict(metadata), ensure_ascii=False)
