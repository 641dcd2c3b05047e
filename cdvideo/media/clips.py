"""Clips in: films, animations and folders of pictures, at the rate that is asked for, one frame at a time.

A frame of the result stands at each multiple of 1 / fps and is the one that the clip shows at that moment. decord reads
films where it can; it knows no AV1, gives arrays of a wrong shape at some widths, and does not turn what a phone has
filmed upright: these go through imageio's ffmpeg.
"""

from __future__ import annotations

import json
import logging
import math
import re
import subprocess
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, ImageSequence

from cdvideo.errors import UserError
from cdvideo.media.images import to_rgb

logger = logging.getLogger(__name__)

Frame = npt.NDArray[np.uint8]  # frame_HWC, RGB

_READABLE = "a film (mp4, webm, mov, ...), an animation (gif, webp, png), a picture, or a folder of numbered PNGs"
_SLACK = 1e-3  # seconds by which a frame may begin late: decord tells times in float32, gifs round to hundredths


class _UnreadableError(Exception):
    """This reader can not read the file; another may."""


def read_clip(
    path: Path, *, frames: int | None = None, fps: float | None = None, size: tuple[int, int] | None = None
) -> Frame:
    """A clip as one array; no more of it is in memory than what is asked for.

    Args:
        path: a film, an animation, a picture, or a folder of PNGs, taken in the order of their names.
        frames: how many, from the beginning; None is all there are.
        fps: frames of the result in a second of the clip; None takes every frame of the clip once.
        size: width and height; frames are reduced or enlarged to cover them, and cut around their middle.

    Returns:
        frames_FHWC: uint8 RGB.

    Raises:
        UserError: no such file, nothing in it to be seen, a clip that is too short, or frames of several sizes.
    """
    read: list[Frame] = []
    for frame in islice(iter_clip(path, fps=fps), frames):
        read.append(frame if size is None else _fit(frame, size))
        if read[-1].shape != read[0].shape:
            raise UserError(
                f"{path.name}: a frame of {_size(frame)} pixels after others of {_size(read[0])}",
                allowed="frames of one size",
                do="make them of one size",
            )
    if frames is not None and len(read) < frames:
        rate = "" if fps is None else f" at {fps:g} a second"
        raise UserError(
            f"{path.name}: {len(read)} frames{rate}, where {frames} are wanted",
            allowed=f"at most {len(read)} frames of this clip{rate}",
            do="ask for fewer frames, or give a longer clip" + (", or a higher rate" if fps is not None else ""),
        )
    return np.stack(read)


def iter_clip(path: Path, *, fps: float | None = None) -> Iterator[Frame]:
    """The frames of a clip, one by one: frame_HWC, uint8 RGB. Arguments and errors as in `read_clip`."""
    assert fps is None or fps > 0
    path = path.expanduser()
    if path.is_dir():
        yield from _read_folder(path, fps)
        return
    if not path.is_file():
        raise UserError(f"no file {path}", allowed=_READABLE, do="check the path")
    readers = [_read_with_pillow] if _pillow_knows(path) else [_read_with_decord, _read_with_ffmpeg]
    given = 0
    for reader in readers:
        try:
            for frame in islice(reader(path, fps), given, None):
                given += 1
                yield frame
        except _UnreadableError as error:
            logger.debug("%s: %s: %s", path.name, reader.__name__, error)
            reason = str(error)
            continue
        if given:
            return
        reason = "no frame in it"
    if not given:
        raise UserError(f"{path.name} can not be read ({reason})", allowed=_READABLE, do="convert it to mp4")
    logger.warning("%s is damaged: it ends after %d frames (%s)", path.name, given, reason)


def _read_with_decord(path: Path, fps: float | None) -> Iterator[Frame]:
    if find_spec("decord") is None:
        raise _UnreadableError("decord is not installed")
    report = _ffmpeg_report(path)
    if "Video:" not in report:
        raise _UnreadableError("no video stream")
    if re.search(r"rotation of|rotate\s*:", report):
        raise _UnreadableError("it is to be turned, which decord does not do")
    from decord import DECORDError, VideoReader

    try:
        reader = VideoReader(str(path), num_threads=1)
        starts = reader.get_frame_timestamp(list(range(len(reader))))[:, 0]
        indices = range(len(starts)) if fps is None else _shown_at(starts - starts[0], _end(reader), fps)
        for index in indices:
            frame: Frame = reader[index].asnumpy()
            if frame.shape[2] != 3:
                raise _UnreadableError(f"decord gives arrays of {frame.shape}")
            yield frame
    except (DECORDError, RuntimeError, IndexError, ValueError) as error:
        raise _UnreadableError(str(error).strip().splitlines()[-1] if str(error) else repr(error)) from error


def _end(reader: Iterable[Frame]) -> float:
    """Seconds from the beginning of a decord reader's film to the end of its last frame."""
    times = reader.get_frame_timestamp([0, len(reader) - 1])  # type: ignore[attr-defined, arg-type]
    return float(times[1, 1] - times[0, 0])


def _shown_at(starts: npt.NDArray[np.floating], end: float, fps: float) -> list[int]:
    """The index of the frame that is shown at 0, 1 / fps, 2 / fps, ..., before `end`; `starts` in seconds."""
    wanted = np.arange(math.ceil((end - _SLACK) * fps)) / fps
    found: list[int] = (np.searchsorted(starts, wanted + _SLACK, side="right") - 1).clip(0).tolist()
    return found


def _read_with_ffmpeg(path: Path, fps: float | None) -> Iterator[Frame]:
    """Each frame by itself, or at the rate, by ffmpeg's filter: "up" shows a frame from its own time on."""
    import imageio_ffmpeg

    if "Video:" not in _ffmpeg_report(path):
        raise _UnreadableError("no video stream")
    rate = ["-fps_mode", "passthrough"] if fps is None else ["-vf", f"fps={fps}:round=up:start_time=0"]
    stream = imageio_ffmpeg.read_frames(str(path), output_params=rate)
    try:
        width, height = next(stream)["size"]
        for raw in stream:
            yield np.frombuffer(raw, np.uint8).reshape(height, width, 3)
    except (RuntimeError, OSError, ValueError, IndexError) as error:
        raise _UnreadableError(str(error).strip().splitlines()[0] if str(error) else repr(error)) from error
    finally:
        stream.close()


def _ffmpeg_report(path: Path) -> str:
    """What ffmpeg says of a file."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(path)]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False).stderr


def _pillow_knows(path: Path) -> bool:
    try:
        with Image.open(path):
            return True
    except Exception:  # on damaged files Pillow's readers raise whatever they come upon
        return False


def _read_with_pillow(path: Path, fps: float | None) -> Iterator[Frame]:
    """Animations by their own durations; a picture is a clip of one frame."""
    try:
        with Image.open(path) as animation:
            timed = _timed(animation)
            yield from (frame for _, frame in timed) if fps is None else _at_rate(timed, fps)
    except Exception as error:  # as above
        raise _UnreadableError(str(error)) from error


def _timed(animation: Image.Image) -> Iterator[tuple[float, Frame]]:
    """Frames, each with the second at which it ends."""
    end = 0.0
    for image in ImageSequence.Iterator(animation):
        image.load()  # the duration is known only then
        # As browsers have it: a frame without duration is shown for a tenth of a second.
        end += (image.info.get("duration") or 100) / 1000
        yield end, np.asarray(to_rgb(ImageOps.exif_transpose(image)))


def _read_folder(folder: Path, fps: float | None) -> Iterator[Frame]:
    files = sorted(folder.glob("*.png"))
    if not files:
        raise UserError(f"no PNGs in the folder {folder}", allowed=_READABLE, do="check the path")

    def frames() -> Iterator[Frame]:
        for file in files:
            try:
                with Image.open(file) as image:
                    yield np.asarray(to_rgb(image))
            except (OSError, SyntaxError, ValueError) as error:
                given = f"{file.name} in {folder} can not be read ({error})"
                raise UserError(given, allowed="whole PNGs", do="write it anew") from error

    rate = _stored_rate(files[0])
    if fps is None or rate is None:  # without a rate of its own it is taken to be at the one asked for
        yield from frames()
    else:
        yield from _at_rate((((index + 1) / rate, frame) for index, frame in enumerate(frames())), fps)


def _stored_rate(file: Path) -> float | None:
    """Frames a second, where `write_video` wrote the frame."""
    try:
        with Image.open(file) as image:
            rate = json.loads(image.info.get("Comment", "{}")).get("fps")
    except (OSError, SyntaxError, ValueError, AttributeError):  # not a PNG, or a comment of somebody else's
        return None
    return float(rate) if isinstance(rate, (int, float)) and rate > 0 else None


def _at_rate(timed: Iterable[tuple[float, Frame]], fps: float) -> Iterator[Frame]:
    """Of frames with the second at which each ends, the one shown at 0, 1 / fps, 2 / fps, ..."""
    given = 0
    for end, frame in timed:
        while given / fps < end - _SLACK:
            yield frame
            given += 1


def _fit(frame: Frame, size: tuple[int, int]) -> Frame:
    if frame.shape[1::-1] == size:
        return frame
    return np.asarray(ImageOps.fit(Image.fromarray(frame), size, Image.Resampling.LANCZOS))


def _size(frame: Frame) -> str:
    return f"{frame.shape[1]} x {frame.shape[0]}"
