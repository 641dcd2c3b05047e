"""Frames out: mp4, gif and webp, each whole or not at all, with the settings that made them inside."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cdvideo.errors import UserError
from cdvideo.runs import atomic_path

Frame: TypeAlias = npt.NDArray[np.uint8]  # frame_HWC, RGB
Metadata: TypeAlias = Mapping[str, str | int | float | bool | None]

_EXIF_DESCRIPTION = 0x010E
_EXIF_SOFTWARE = 0x0131


def write_video(frames: Iterable[Frame], path: Path, *, fps: float, metadata: Metadata) -> None:
    """Writes a film in the format of the path's suffix: .mp4, .gif or .webp.

    Args:
        frames: frame_HWC, uint8 RGB, all of one size; an mp4 takes them one by one and never holds the film.
        fps: frames a second.
        metadata: settings that made the film, for the file's comment; `prompt` becomes the title too.

    Raises:
        UserError: another suffix, no frame, or a folder that can not be written.
    """
    writers = {".mp4": _write_mp4, ".gif": _write_gif, ".webp": _write_webp}
    if path.suffix not in writers:
        raise UserError(f"film {path.name}", allowed=", ".join(writers), do="choose one of these formats")
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise UserError(f"film {path.name} of 0 frames", allowed="at least 1 frame", do="ask for more frames")
    with atomic_path(path) as part:
        writers[path.suffix](chain([first], iterator), part, fps, metadata)


def write_picture(frame: Frame, path: Path, *, metadata: Metadata) -> None:
    """Writes a PNG with the settings in its text chunks."""
    text = PngInfo()
    text.add_itxt("Title", str(metadata.get("prompt", "")))
    text.add_itxt("Comment", _as_json(metadata))
    with atomic_path(path) as part:
        Image.fromarray(frame).save(part, pnginfo=text)


def write_settings(path: Path, metadata: Metadata) -> None:
    """Writes the settings as JSON, for whoever looks beside the film instead of into it."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(dict(metadata), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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


def _write_mp4(frames: Iterator[Frame], path: Path, fps: float, metadata: Metadata) -> None:
    """H.264, 4:2:0, index in front: what every browser plays. Colours are tagged, since players guess otherwise."""
    import imageio_ffmpeg

    first = pad_to_even(next(frames))
    options = ["-crf", "16", "-preset", "slow", "-movflags", "+faststart"]
    tags = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709"
    options += ["-vf", f"scale=out_color_matrix=bt709:out_range=tv,{tags}"]
    options += ["-metadata", f"title={metadata.get('prompt', '')}", "-metadata", f"comment={_as_json(metadata)}"]
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (first.shape[1], first.shape[0]),
        fps=fps,
        codec="libx264",
        quality=None,
        pix_fmt_in="rgb24",
        pix_fmt_out="yuv420p",
        macro_block_size=1,
        output_params=options,
        ffmpeg_log_level="error",
    )
    writer.send(None)
    try:
        for frame in chain([first], map(pad_to_even, frames)):
            assert frame.shape == first.shape, f"a frame of {frame.shape} in a film of {first.shape}"
            writer.send(np.ascontiguousarray(frame))
    finally:
        writer.close()


def _write_gif(frames: Iterator[Frame], path: Path, fps: float, metadata: Metadata) -> None:
    """One palette for the whole film and no dither: the grain of a dither would crawl from frame to frame."""
    images = [Image.fromarray(frame) for frame in frames]
    palette = _common_palette(images)
    indexed = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    indexed[0].save(
        path,
        save_all=True,
        append_images=indexed[1:],
        duration=[10 * hundredths for hundredths in frame_durations(len(indexed), fps, unit=0.01)],
        loop=0,
        palette=bytes(palette.getpalette() or ()),  # else every frame would carry a copy of its own
        optimize=False,
        comment=_as_json(metadata).encode("utf-8"),
    )


def _common_palette(images: Sequence[Image.Image]) -> Image.Image:
    """256 colours by median cut over all frames; of a long or large film, over a grid of its pixels."""
    total = sum(image.width * image.height for image in images)
    step = max(1, round((total / 1_000_000) ** 0.5))
    pixels = [np.asarray(image)[::step, ::step].reshape(-1, 3) for image in images]
    return Image.fromarray(np.concatenate(pixels)[None]).quantize(256, method=Image.Quantize.MEDIANCUT)


def _write_webp(frames: Iterator[Frame], path: Path, fps: float, metadata: Metadata) -> None:
    images = [Image.fromarray(frame) for frame in frames]
    exif = Image.Exif()
    exif[_EXIF_DESCRIPTION] = json.dumps(dict(metadata))  # EXIF text is ASCII
    exif[_EXIF_SOFTWARE] = "cdvideo"
    images[0].save(
        path,
        save_all=True,
        append_images=images[1:],
        duration=frame_durations(len(images), fps, unit=0.001),
        loop=0,
        quality=90,
        method=4,
        exif=exif,
    )


def _as_json(metadata: Metadata) -> str:
    return json.dumps(dict(metadata), ensure_ascii=False)
