"""imageio's ffmpeg: which encoders it has, and films through it, frame by frame."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from cdvideo.errors import UserError

Codec = Literal["h264", "hevc", "av1", "vp9"]


@dataclass(frozen=True)
class Encoder:
    """An encoder of ffmpeg's by name, and settings with which it loses nothing that is seen."""

    name: str
    options: tuple[str, ...]


# The first one that there is, is taken.
ENCODERS: dict[Codec, tuple[Encoder, ...]] = {
    "h264": (Encoder("libx264", ("-crf", "16", "-preset", "slow")),),
    # hvc1 is the only tag by which Apple's players know HEVC.
    "hevc": (
        Encoder("libx265", ("-crf", "20", "-preset", "medium", "-tag:v", "hvc1", "-x265-params", "log-level=error")),
    ),
    "av1": (
        Encoder("libaom-av1", ("-crf", "22", "-b:v", "0", "-cpu-used", "6", "-row-mt", "1")),
        Encoder("libsvtav1", ("-crf", "22", "-preset", "6")),
    ),
    "vp9": (Encoder("libvpx-vp9", ("-crf", "18", "-b:v", "0", "-cpu-used", "3", "-row-mt", "1")),),
}


@lru_cache
def encoder_names() -> frozenset[str]:
    """The video encoders of imageio's ffmpeg."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-encoders"]
    listed = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True).stdout
    return frozenset(re.findall(r"^ V\S{5} (\S+)", listed, re.MULTILINE))


@lru_cache
def filter_names() -> frozenset[str]:
    """The filters of imageio's ffmpeg."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-filters"]
    listed = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True).stdout
    return frozenset(re.findall(r"^ \S{2,3} (\S+)", listed, re.MULTILINE))


def find_encoder(codec: Codec) -> Encoder:
    """The encoder for a codec.

    Raises:
        UserError: this ffmpeg has none.
    """
    for encoder in ENCODERS[codec]:
        if encoder.name in encoder_names():
            return encoder
    able = [name for name, encoders in ENCODERS.items() if encoder_names() & {encoder.name for encoder in encoders}]
    raise UserError(
        f"codec {codec}: imageio's ffmpeg has no encoder for it",
        allowed=f"of this ffmpeg: {', '.join(able) or 'none'}",
        do="choose one of these, or let IMAGEIO_FFMPEG_EXE name an ffmpeg that has it",
    )


def encode(
    frames: Iterator[npt.NDArray[np.uint8]], path: Path, *, fps: float, codec: Codec, options: Sequence[str] = ()
) -> None:
    """Writes frame_HWC of even sides as they come: 4:2:0, colours tagged, since players guess otherwise.

    Raises:
        UserError: what ffmpeg wrote is no film of all the frames: a full disk, or an ffmpeg that failed at the end.
    """
    import imageio_ffmpeg

    path = path.resolve()  # of a name like -x, concat:y or http:z ffmpeg would make an option or a protocol
    first = next(frames)
    encoder = find_encoder(codec)
    tags = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709"
    filters = ["-vf", f"scale=out_color_matrix=bt709:out_range=tv,{tags}"]
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (first.shape[1], first.shape[0]),
        fps=fps,
        codec=encoder.name,
        quality=None,
        pix_fmt_in="rgb24",
        pix_fmt_out="yuv420p",
        macro_block_size=1,
        output_params=[*encoder.options, *filters, *options],
        ffmpeg_log_level="error",
    )
    writer.send(None)
    sent = 0
    try:
        for frame in chain([first], frames):
            assert frame.shape == first.shape, f"a frame of {frame.shape} in a film of {first.shape}"
            writer.send(np.ascontiguousarray(frame))
            sent += 1
    finally:
        writer.close()  # which does not look at how ffmpeg ended
    try:
        found, _seconds = imageio_ffmpeg.count_frames_and_secs(str(path))
    except RuntimeError:
        found = 0
    if found != sent:
        raise UserError(
            f"a film of {sent} frames, of which ffmpeg ({encoder.name}) wrote {found}",
            allowed="as many as were sent",
            do="read what ffmpeg says above; is the disk full?",
        )
