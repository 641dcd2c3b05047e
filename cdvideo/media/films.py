"""Films in: which of two readers can be trusted with a file, and both of them.

decord is the faster one, but it carries an FFmpeg of 2018 and counts frames from one key frame to the next in the order
in which they are stored. Where they are shown in another order (open GOPs), where some are not shown at all (a film cut
without being encoded anew), and in the containers of broadcast and of old, it gives frames twice, late or not at all.
Nor does it turn what a phone has filmed upright, stretch pixels, or know HDR. So it is given a film only once imageio's
ffmpeg has listed all packets of it and these are plain, and only if it tells the same times. All else is read by
ffmpeg: slower at a low rate, since it decodes every frame, and right.
"""

from __future__ import annotations

import logging
import math
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image

from cdvideo.media.colours import to_rgb
from cdvideo.media.ffmpeg import encoder_names, filter_names

logger = logging.getLogger(__name__)

Frame = npt.NDArray[np.uint8]  # frame_HWC, RGB

SLACK = 1e-3  # seconds by which a frame may begin late: containers round times to milliseconds, gifs to hundredths
MOST_PIXELS = 1 << 26  # of a frame, 8192 x 8192: 0.2 GB
MOST_FRAMES = 1_000_000  # four hours at 60 a second
_LIBVPX = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
_PATIENCE = 120  # seconds in which ffmpeg must look through a file, and in which it must give each frame

# Names of ffmpeg's readers. Playlists (HLS, DASH, ffconcat, SDP) are not among them: they name other files.
_CONTAINERS = (
    "mov,matroska,webm,mpegts,mpeg,mpegvideo,avi,asf,flv,live_flv,ogg,mxf,dv,nut,rm,wtv,swf,gxf,ivf,obu,h264,hevc,vvc,"
    "m4v,vc1,vc1test,mjpeg,yuv4mpegpipe,gif,apng,aiff,wav,mp3,flac,aac"
)
_PLAIN_CONTAINERS = ("mov,mp4", "matroska,webm")
_PLAIN_CODECS = ("h264", "hevc", "vp9")
_KEY, _DISPOSABLE, _UNKNOWN_TIME = 0x1, 0x10, -(1 << 63)  # as ffmpeg marks packets


class UnreadableError(Exception):
    """This reader can not read the file; another may."""


@dataclass(frozen=True)
class Contents:
    """What ffmpeg finds in a film.

    Args:
        starts: seconds at which each frame is shown, from that of the first, ascending; none where there is an oddity.
        end: seconds at which the last one ends.
        codec: by ffmpeg's name.
        keys: how many frames are key frames.
        oddity: why decord is not to read it; None where it may.
        deinterlace: whether its frames are two fields each, filmed one after the other.
        opaque: whether it has no transparency.
        hdr: the transfer curve of a film of high dynamic range, as most phones film; None of any other.
        drags: whether it claims to show each frame for more than a minute, on average: at a rate, it would never end.
    """

    starts: npt.NDArray[np.float64]
    end: float
    codec: str
    keys: int
    oddity: str | None
    deinterlace: bool
    opaque: bool
    hdr: str | None
    drags: bool


def look_through(path: Path) -> Contents:
    """Lists a film's packets without decoding them.

    Raises:
        UnreadableError: no film, or one that goes beyond MOST_PIXELS or MOST_FRAMES.
    """
    with path.open("rb") as file:
        head = file.read(1024)
    if head.lstrip().startswith((b"#EXTM3U", b"ffconcat", b"[playlist]")) or b"<MPD" in head:
        raise UnreadableError("a playlist, which names other files, and no film")
    command = [*_ffmpeg_reads(path), "-c", "copy", "-frames:v", str(MOST_FRAMES + 1), "-f", "framecrc", "-"]
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UnreadableError(f"ffmpeg has not got through it in {_PATIENCE} s") from error
    about = ran.stderr.partition("Stream mapping:")[0]
    videos = re.findall(r"^\[info\]\s+Stream #0:\d+.*?: Video: (.*)", about, re.MULTILINE)
    fault = _first_fault(ran.stderr)
    if not videos:
        raise UnreadableError(fault if fault and "matches no streams" not in fault else "no video stream")
    video = videos[0]
    _check_size(video)
    packets = [line.split(",") for line in ran.stdout.splitlines() if not line.startswith("#")]
    if len(packets) > MOST_FRAMES:
        raise UnreadableError(f"more than {MOST_FRAMES} frames")
    if not packets:
        raise UnreadableError(fault or "no frame in it")
    unit = re.search(r"^#tb 0: (\d+)/(\d+)", ran.stdout, re.MULTILINE)
    assert unit, "framecrc tells its unit of time"
    times, lengths = (np.array([int(packet[column]) for packet in packets]) for column in (2, 3))
    deinterlace = bool(re.search(r"(top|bottom) (coded )?first", video))
    clear = re.search(r"\b(yuva|rgba|bgra|argb|abgr|gbrap|ya8|ya16|pal8)", video)
    opaque = not (clear or re.search(r"^\[info\]\s+alpha_mode\s*: 1", about, re.MULTILINE))
    hdr = re.search(r"\b(smpte2084|arib-std-b67)\b", video)
    stamps = np.array([int(packet[1]) for packet in packets] + times[times != _UNKNOWN_TIME].tolist(), dtype=np.float64)
    seconds = int(unit[1]) / int(unit[2])
    drags = float(np.ptp(stamps)) * seconds > 600 + 60 * len(packets)
    marks = deinterlace, opaque, hdr[1] if hdr else None, drags
    flags = np.array([_flags(packet) for packet in packets])
    codec, keys = video.split()[0].rstrip(","), int((flags & _KEY).sum())
    oddity = fault or _oddity(about, videos, codec) or _disorder(times, flags)
    if oddity is None and (deinterlace or not opaque or hdr):
        oddity = "fields, transparency or HDR, which decord does not heed"
    if oddity is not None:
        return Contents(np.zeros(0), 0.0, codec, keys, oddity, *marks)
    order = np.argsort(times)
    starts = (times[order] - times[order[0]]) * seconds
    length = lengths[order[-1]] * seconds
    if length <= 0:  # not told: as long as the one before it
        length = starts[-1] - starts[-2] if len(starts) > 1 else 1 / 25
    return Contents(starts, float(starts[-1] + length), codec, keys, None, *marks)


def read_with_decord(path: Path, contents: Contents, fps: float | None) -> Iterator[Frame]:
    """Frames as `iter_clip` has them.

    Raises:
        UnreadableError: a film that decord may not read, or does not.
    """
    if contents.oddity is not None:
        raise UnreadableError(contents.oddity)
    if find_spec("decord") is None:
        raise UnreadableError("decord is not installed")
    from decord import DECORDError, VideoReader

    try:
        reader = VideoReader(str(path.resolve()), num_threads=1)
        told = reader.get_frame_timestamp(list(range(len(reader))))[:, 0]
        if len(told) != len(contents.starts) or not np.allclose(told - told[0], contents.starts, rtol=1e-6, atol=2e-3):
            raise UnreadableError("decord tells other times than ffmpeg")
        indices = list(range(len(told))) if fps is None else shown_at(contents, fps)
        # To leave frames out, decord seeks where a key frame lies between; not from every one can a decoder begin.
        sections = np.searchsorted(reader.get_key_indices(), indices, side="right")
        left_out = np.diff(indices) - 1
        seeks = bool(left_out[np.diff(sections) > 0].sum() > len(told) / 2)  # else it is not worth a look
        if seeks and not _can_begin_at_key_frames(path, contents):
            raise UnreadableError("key frames at which no decoder can begin")
        read = section = 0
        for index, its_section in zip(indices, sections, strict=True):
            if index >= read:
                if seeks or its_section == section:
                    if index > read:
                        reader.skip_frames(index - read)
                else:
                    for _ in range(read, index):
                        reader.next()
                frame: Frame = reader.next().asnumpy()
                read, section = index + 1, its_section
            if frame.shape[2] != 3:
                raise UnreadableError(f"decord gives arrays of {frame.shape}")
            yield frame
    except subprocess.TimeoutExpired as error:
        raise UnreadableError(f"ffmpeg has not got through it in {_PATIENCE} s") from error
    except (DECORDError, RuntimeError, IndexError, ValueError, MemoryError, AssertionError) as error:
        raise UnreadableError(str(error).strip().splitlines()[-1] if str(error) else repr(error)) from error


def _can_begin_at_key_frames(path: Path, contents: Contents) -> bool:
    """Whether all key frames of H.264 and HEVC are such as forget all before them (IDR); those of VP9 always do."""
    kinds = {"h264": "5", "hevc": "19-20"}
    if contents.codec not in kinds:
        return True
    only = ["-c", "copy", "-bsf:v", f"filter_units=pass_types={kinds[contents.codec]}", "-f", "framecrc", "-"]
    ran = subprocess.run([*_ffmpeg_reads(path), *only], capture_output=True, timeout=_PATIENCE, check=False)
    return sum(not line.startswith(b"#") for line in ran.stdout.splitlines()) == contents.keys


def shown_at(contents: Contents, fps: float) -> list[int]:
    """The index of the frame that is shown at 0, 1 / fps, 2 / fps, ..., before the end."""
    wanted = np.arange(math.ceil((contents.end - SLACK) * fps)) / fps
    found: list[int] = (np.searchsorted(contents.starts, wanted + SLACK, side="right") - 1).clip(0).tolist()
    return found


def read_with_ffmpeg(path: Path, contents: Contents, fps: float | None) -> Iterator[Frame]:
    """Each frame by itself, or at the rate, by ffmpeg's filter: "up" shows a frame from its own time on.

    Raises:
        UnreadableError: where it comes to nothing more, with what ffmpeg says.
    """
    process = subprocess.Popen(_decoding(path, contents, fps), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    said: list[bytes] = []
    listener = threading.Thread(target=_listen, args=(process.stderr, said), daemon=True)
    listener.start()
    try:
        while True:
            began = time.monotonic()
            patience = threading.Timer(_PATIENCE, process.kill)
            patience.start()
            try:
                frame = _next_frame(process.stdout)
            finally:
                patience.cancel()
            if frame is None:
                break
            yield frame
        if time.monotonic() - began >= _PATIENCE:
            raise UnreadableError(f"ffmpeg has given no frame in {_PATIENCE} s")
        status = process.wait()
        listener.join()
        fault = _first_fault(b"".join(said).decode("utf-8", errors="replace"))
        if status != 0 or fault:
            raise UnreadableError(fault or f"ffmpeg ended with {status}")
    finally:
        process.kill()
        process.wait()
        listener.join()
        process.stdout.close()
        process.stderr.close()


def _decoding(path: Path, contents: Contents, fps: float | None) -> list[str]:
    """ffmpeg that writes each frame as a picture, whose header tells its size."""
    filters = ["bwdif=mode=send_frame:deint=interlaced"] if contents.deinterlace else []
    if fps is not None:
        filters += ["setpts=PTS-STARTPTS", f"fps={fps}:round=up:start_time=0"]
    if contents.hdr is not None:
        filters += _tone_mapping(path, contents.hdr)
    # Pixels that are not square are stretched, never squeezed, as players do it; beyond 4 : 1 it is not believed.
    width, height = "if(between(sar,1,4),round(iw*sar),iw)", "if(between(sar,1/4,1),round(ih/sar),ih)"
    filters += [f"scale=w='{width}':h='{height}'", "setsar=1"]
    # ffmpeg's own decoders of VP8 and VP9 leave transparency out.
    able = not contents.opaque and _LIBVPX.get(contents.codec) in encoder_names()
    decoder = ["-c:v", _LIBVPX[contents.codec]] if able else []
    form = ["-pix_fmt", "rgb24" if contents.opaque else "rgba", "-c:v", "pam", "-f", "image2pipe", "-"]
    return [*_ffmpeg_reads(path, *decoder), "-vf", ",".join(filters), "-fps_mode", "passthrough", *form]


def _tone_mapping(path: Path, transfer: str) -> list[str]:
    """Filters from HDR to sRGB: diffuse white, 203 cd/m2 (ITU-R BT.2408), is white; what is brighter is squeezed in."""
    if "zscale" not in filter_names():
        logger.warning("%s is HDR: its colours will be pale, since this ffmpeg lacks the filter zscale", path.name)
        return []
    return [
        f"zscale=pin=bt2020:min=bt2020nc:tin={transfer}:t=linear:npl=203",
        "format=gbrpf32le",
        "zscale=p=bt709",
        "tonemap=mobius:param=0.8:desat=0",
        "zscale=t=iec61966-2-1:m=gbr:r=full",
        "format=gbrp",
    ]


def _ffmpeg_reads(path: Path, *options: str) -> list[str]:
    """ffmpeg with a film as its input, whatever its name looks like; what its contents name is not fetched."""
    import imageio_ffmpeg

    bounds = ["-protocol_whitelist", "file,pipe", "-format_whitelist", _CONTAINERS, "-max_pixels", str(2 * MOST_PIXELS)]
    bounds += ["-threads", "4"]  # each holds frames of its own
    said = ["-hide_banner", "-nostdin", "-loglevel", "level+info", "-nostats"]
    # V: no pictures of covers.
    return [imageio_ffmpeg.get_ffmpeg_exe(), *said, *bounds, *options, "-i", f"file:{path.resolve()}", "-map", "0:V:0"]


def _check_size(video: str) -> None:
    """Refuses frames beyond MOST_PIXELS, as they are stored or stretched, by ffmpeg's line on the stream."""
    size = re.search(r", (\d+)x(\d+)", video)
    if size is None:
        raise UnreadableError("its size is not known")
    width, height = int(size[1]), int(size[2])
    aspect = _pixel_aspect(video)
    if width * height * max(aspect, 1 / aspect) > MOST_PIXELS:
        raise UnreadableError(f"frames of {width} x {height} pixels, more than {MOST_PIXELS / 1e6:.0f} million")


def _pixel_aspect(video: str) -> float:
    """A pixel's width by its height; 1 where it is not known or not believable, as the filter has it."""
    found = re.search(r"SAR (\d+):(\d+)", video)
    aspect = int(found[1]) / int(found[2]) if found and int(found[2]) else 1.0
    return aspect if 1 / 4 <= aspect <= 4 else 1.0


def _oddity(about: str, videos: list[str], codec: str) -> str | None:
    """What ffmpeg tells of a film that decord gets wrong or has never been tried with."""
    container = re.search(r"Input #0, (.*?), from '", about)
    if not (container and container[1].startswith(_PLAIN_CONTAINERS)):
        return "a container that decord is not trusted with"
    if codec not in _PLAIN_CODECS:
        return f"{codec}, which decord is not trusted with"
    if len(videos) > 1:
        return "several streams of pictures"
    if re.search(r"displaymatrix|rotation of|rotate\s*:|[Cc]ropping", about):
        return "it is to be turned or cropped, which decord does not do"
    if _pixel_aspect(videos[0]) != 1:
        return "its pixels are not square, which decord does not heed"
    return None


def _disorder(times: npt.NDArray[np.int64], flags: npt.NDArray[np.int64]) -> str | None:
    """What there is in a film's packets, in the order in which they are stored, that makes decord count wrongly."""
    if (times == _UNKNOWN_TIME).any() or len(np.unique(times)) < len(times):
        return "frames without a time of their own"
    if not set(flags.tolist()) <= {0, _KEY, _DISPOSABLE, _KEY | _DISPOSABLE}:
        return "frames that are damaged or not to be shown"
    keys = (flags & _KEY).astype(bool)
    if not keys[0]:
        return "it does not begin with a key frame"
    if (times < np.maximum.accumulate(np.where(keys, times, times[0]))).any():
        return "frames that are shown before the key frame that they are stored after"
    return None


def _flags(packet: list[str]) -> int:
    return next((int(field.strip()[2:], 16) for field in packet[6:] if field.strip().startswith("F=")), _KEY)


def _next_frame(stream: IO[bytes]) -> Frame | None:
    """Reads one picture in PAM, whose header tells its size; None where no whole one is left."""
    header: dict[bytes, bytes] = {}
    for line in stream:
        if line == b"ENDHDR\n":
            break
        name, _, value = line.strip().partition(b" ")
        header[name] = value
    else:
        return None
    width, height, depth = (int(header[name]) for name in (b"WIDTH", b"HEIGHT", b"DEPTH"))
    pixels = stream.read(width * height * depth)
    if len(pixels) < width * height * depth:
        return None
    frame = np.frombuffer(pixels, np.uint8).reshape(height, width, depth)
    return frame if depth == 3 else np.asarray(to_rgb(Image.fromarray(frame)))


def _listen(stream: IO[bytes], said: list[bytes]) -> None:
    """Empties a pipe, so that its writer can go on, and keeps the beginning."""
    while piece := stream.read1(1 << 16):  # type: ignore[attr-defined]
        if sum(map(len, said)) < 1 << 16:
            said.append(piece)


def _first_fault(said: str) -> str | None:
    """The first thing that ffmpeg calls an error."""
    found = re.search(r"\[(?:error|fatal|panic)\] (.*)", said)
    return found[1].strip() if found else None
