"""Clips in: films, animations and folders of pictures, at the rate that is asked for, one frame at a time.

A frame of the result stands at each multiple of 1 / fps and is the one that the clip shows at that moment.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cdvideo.errors import UserError
from cdvideo.media.colours import to_rgb
from cdvideo.media.films import (
    MOST_FRAMES,
    MOST_PIXELS,
    SLACK,
    Frame,
    UnreadableError,
    look_through,
    read_with_decord,
    read_with_ffmpeg,
)
from cdvideo.media.images import pictures_below, read_picture
from cdvideo.media.opening import NoPictureError, UnknownKindError, open_picture, picture_suffixes, warnings_named

logger = logging.getLogger(__name__)

_READABLE = "a film (mp4, webm, mov, ...), an animation (gif, webp, png), a picture, or a folder of numbered pictures"
_MOST_BYTES = 1 << 32  # of a clip in one array
_FLASH = 10  # milliseconds: up to here a frame's duration is taken to be none, and that is a tenth of a second
_LONGEST = 600_000  # milliseconds: a frame that is to be shown for longer is of a broken file, and would never end
_LARGE_SIDE = 2048  # pixels on the short side of a picture of more than MOST_PIXELS
_RATES = (0.01, 1000.0)  # frames a second that a file may ask for


def read_clip(
    path: Path, *, frames: int | None = None, fps: float | None = None, size: tuple[int, int] | None = None
) -> Frame:
    """A clip as one array; no more of it is in memory than what is asked for.

    Args:
        path: a film, an animation, a picture, or a folder of pictures of one kind, taken in the order of their numbers
            (9.png before 10.png).
        frames: how many, from the beginning; None is all there are.
        fps: frames of the result in a second of the clip; None takes every frame of the clip once.
        size: width and height; frames are reduced or enlarged to cover them, and cut around their middle.

    Returns:
        frames_FHWC: uint8 RGB.

    Raises:
        UserError: no such file, nothing in it to be seen, a clip that is too short, one that does not fit into 4 GB, or
            frames of several sizes.
    """
    read: list[Frame] = []
    for frame in islice(iter_clip(path, fps=fps), frames):
        read.append(frame if size is None else _fit(frame, size))
        if len(read) * read[0].nbytes > _MOST_BYTES or len(read) > MOST_FRAMES:
            raise UserError(
                f"{path.name}: {len(read)} frames of {_size(read[0])} pixels, and more to come",
                allowed=f"{_MOST_BYTES >> 30} GB of frames at once, and {MOST_FRAMES}",
                do="give `frames` or a smaller `size`, or take them one by one with iter_clip",
            )
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
    yield from _read_with_pillow(path, fps) if _is_picture(path) else _read_film(path, fps)


def _is_picture(path: Path) -> bool:
    """Raises UserError for what is neither a picture nor perhaps a film."""
    try:
        open_picture(path).close()
    except UnknownKindError:
        return False
    except Exception as error:  # on damaged files Pillow's readers raise whatever they come upon
        raise _unreadable(path, error, do="save it as PNG or JPEG") from error
    return True


def _unreadable(path: Path, reason: object, *, do: str) -> UserError:
    return UserError(f"{path.name} can not be read ({reason})", allowed=_READABLE, do=do)


def _read_film(path: Path, fps: float | None) -> Iterator[Frame]:
    """By decord where it can be trusted; where it fails on the way, ffmpeg takes over from the next frame on."""
    given, reason = 0, "no frame in it"
    try:
        contents = look_through(path)
    except UnreadableError as error:
        raise _unreadable(path, error, do="convert it to mp4") from error
    if contents.drags and fps is not None:
        raise _unreadable(path, "its times are broken: it would show each frame for minutes", do="convert it to mp4")
    for reader in (read_with_decord, read_with_ffmpeg):
        try:
            for frame in islice(reader(path, contents, fps), given, None):
                given += 1
                yield frame
        except UnreadableError as error:
            logger.debug("%s: %s: %s", path.name, reader.__name__, error)
            reason = str(error)
            continue
        if given:
            return
    if not given:
        raise _unreadable(path, reason, do="convert it to mp4")
    logger.warning("%s is damaged (%s): %d frames of it can be read", path.name, reason, given)


def _read_with_pillow(path: Path, fps: float | None) -> Iterator[Frame]:
    """Animations by their own durations; a picture is a clip of one frame."""
    given = 0
    try:
        for frame in _animation(path) if fps is None else _at_rate(_timed_animation(path), fps):
            given += 1
            yield frame
    except Exception as error:  # as above
        if not given:
            raise _unreadable(path, error, do="save it as PNG or JPEG") from error
        logger.warning("%s is damaged (%s): %d frames of it can be read", path.name, error, given)


def _animation(path: Path) -> Iterator[Frame]:
    return (frame for _, frame in _timed_animation(path))


def _timed_animation(path: Path) -> Iterator[tuple[float, Frame]]:
    """Frames, each with the second at which it ends."""
    with open_picture(path) as animation:
        # An MPO is what some cameras call a JPEG: beside the picture it holds a small one, or a map of its lights.
        still = animation.format == "MPO" or not getattr(animation, "is_animated", False)
        if animation.width * animation.height > MOST_PIXELS:
            if not still:
                raise NoPictureError(f"frames of {animation.width} x {animation.height} pixels: make it smaller")
            yield 0.1, np.asarray(read_picture(path, _LARGE_SIDE))
            return
        end = 0.0
        for index in range(MOST_FRAMES):
            with warnings_named(path.name):
                try:
                    animation.seek(index)
                except EOFError:
                    return
                animation.load()  # the duration is known only then
                frame = np.asarray(to_rgb(ImageOps.exif_transpose(animation), name=path.name))
            if index == 0 and not still and animation.info.get("default_image"):
                continue  # what a reader shows that knows no animated PNG
            duration = animation.info.get("duration") or 0
            end += min(duration if duration > _FLASH else 100, _LONGEST) / 1000  # as browsers have it
            yield end, frame
            if still:
                return


def _read_folder(folder: Path, fps: float | None) -> Iterator[Frame]:
    files = _frame_files(folder)

    def frames() -> Iterator[Frame]:
        for file in files:
            try:
                bounds = {"most_pixels": MOST_PIXELS, "most_jpeg_pixels": MOST_PIXELS}
                with warnings_named(file.name), open_picture(file, **bounds) as image:
                    frame = np.asarray(to_rgb(ImageOps.exif_transpose(image), name=file.name))
            except Exception as error:  # as above
                given = f"{file.name} in {folder} can not be read ({error})"
                raise UserError(given, allowed="whole pictures", do="write it anew") from error
            yield frame

    rate = _stored_rate(files[0])
    if fps is None or rate is None:  # without a rate of its own it is taken to be at the one asked for
        yield from frames()
    else:
        yield from _at_rate((((index + 1) / rate, frame) for index, frame in enumerate(frames())), fps)


def _frame_files(folder: Path) -> list[Path]:
    """A folder's PNGs, or, where it has none, its pictures of the most frequent kind, in the order of their numbers."""
    kinds: dict[str, list[Path]] = {}
    for file in folder.iterdir():
        if file.suffix.lower() in picture_suffixes() and not file.name.startswith(".") and file.is_file():
            kinds.setdefault(file.suffix.lower(), []).append(file)
    if not kinds:
        below = dict(islice(pictures_below(folder), 5))
        where = f" itself, but below it: {', '.join(below)}" if below else ""
        do = f"name the folder that holds them, {folder / next(iter(below))}" if below else "check the path"
        raise UserError(f"no pictures in the folder {folder}{where}", allowed=_READABLE, do=do)
    files = kinds.pop(".png", None) or kinds.pop(max(kinds, key=lambda kind: len(kinds[kind])))
    if kinds:
        told = ", ".join(file.name for others in kinds.values() for file in others[:2])
        logger.warning("frames in %s are its %s: left out are %s", folder, files[0].suffix, told)
    return sorted(files, key=_in_numbers)


def _in_numbers(file: Path) -> tuple[list[int | str], str]:
    """A key by which 9.png comes before 10.png."""
    parts = re.split(r"([0-9]+)", file.name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], file.name


def _stored_rate(file: Path) -> float | None:
    """Frames a second, where `write_video` wrote the frame."""
    try:
        with open_picture(file) as image:
            rate = json.loads(image.info.get("Comment", "{}")).get("fps")
    except Exception:  # not a PNG, a broken one (told when it is read), or a comment of somebody else's
        return None
    slowest, fastest = _RATES
    return float(rate) if isinstance(rate, (int, float)) and slowest <= rate <= fastest else None


def _at_rate(timed: Iterable[tuple[float, Frame]], fps: float) -> Iterator[Frame]:
    """Of frames with the second at which each ends, the one shown at 0, 1 / fps, 2 / fps, ..."""
    given = 0
    for end, frame in timed:
        while given / fps < end - SLACK:
            yield frame
            given += 1


def _fit(frame: Frame, size: tuple[int, int]) -> Frame:
    if frame.shape[1::-1] == size:
        return frame
    return np.asarray(ImageOps.fit(Image.fromarray(frame), size, Image.Resampling.LANCZOS))


def _size(frame: Frame) -> str:
    return f"{frame.shape[1]} x {frame.shape[0]}"
