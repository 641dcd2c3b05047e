"""Picture files opened: by a short list of formats, within bounds, and named where they are something else.

Pillow left to itself tries all its readers on every file, whatever its name: a PostScript file called dog.jpg would
start Ghostscript.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError

logger = logging.getLogger(__name__)

# TGA and its like have no mark at their beginning, so that anything may look like one; others are rare or run programs.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM")
READABLE = "PNG, JPEG, WebP, GIF, TIFF, BMP, AVIF or JPEG 2000"
PHONE_SUFFIXES = frozenset({".heic", ".heif"})  # pictures to their owner, though Pillow can not read them

MOST_PIXELS = 178_956_970  # of a picture: 0.7 GB as Pillow holds it, and what Pillow itself refuses
MOST_JPEG_PIXELS = 512_000_000  # a JPEG can be decoded at an eighth
MOST_PROGRESSIVE_PIXELS = 64_000_000  # of one that comes in passes, all coefficients are held: 6 bytes a pixel
# A few bytes may claim a picture of any size. A photo has more than 1 byte for 100 pixels, at the worst quality.
_SURELY_FITS = 25_000_000  # pixels, whatever the file
_MOST_PER_BYTE = 200  # pixels

_HEIC = "HEIC, which is not supported: save it as JPEG"
_LOCK = threading.Lock()
_MARKS = (
    (b"%!PS", "PostScript, which is not supported: save it as PNG"),
    (b"\xc5\xd0\xd3\xc6", "PostScript, which is not supported: save it as PNG"),
    (b"%PDF", "a PDF: save it as PNG"),
    (b"8BPS", "a Photoshop file, which is not supported: save it as PNG"),
    (b"version https://git-lfs", "a Git LFS pointer in place of the file: git lfs pull fetches it"),
    (b"\xff\x0a", "JPEG XL, which is not supported: save it as PNG"),
    (b"\0\0\0\x0cJXL ", "JPEG XL, which is not supported: save it as PNG"),
)


class NoPictureError(ValueError):
    """What a file is that can not be opened as a picture."""


class UnknownKindError(NoPictureError):
    """A file that may be anything else, a film for instance."""


def open_picture(
    file: Path, *, most_pixels: int = MOST_PIXELS, most_jpeg_pixels: int = MOST_JPEG_PIXELS
) -> Image.Image:
    """Opens a picture, to be closed by the caller. Its pixels are not yet decoded, but their number is in order.

    Args:
        most_jpeg_pixels: where the caller lets `draft` make them fewer.

    Raises:
        NoPictureError: another kind of file, or too many pixels, for any picture or for one of so few bytes.
        OSError, SyntaxError, ...: as Pillow has it, for a damaged file.
    """
    _refuse_other_kinds(file)
    Image.init()
    # Pillow's own bound is a warning at 89 megapixels, an error at 179; it can be lifted for the whole process only.
    with _LOCK, warnings_named(file.name):
        bound, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
        except UnidentifiedImageError as error:
            if file.suffix.lower() in PHONE_SUFFIXES:
                raise NoPictureError(_HEIC) from error
            raise UnknownKindError("no picture") from error
        finally:
            Image.MAX_IMAGE_PIXELS = bound
    if image.format == "TIFF":
        image.filename = ""  # with it Pillow maps uncompressed pixels, and those of a turned picture with sides swapped
    most = most_jpeg_pixels if image.format in ("JPEG", "MPO") else most_pixels
    pixels, size = image.width * image.height, f"{image.width} x {image.height} pixels"
    fault, bytes_of_it = None, file.stat().st_size
    if pixels > most:
        fault = f"{size}, more than {most // 10**6} million: make it smaller"
    elif pixels > MOST_PROGRESSIVE_PIXELS and image.info.get("progressive"):
        fault = f"{size} in a progressive JPEG, more than {MOST_PROGRESSIVE_PIXELS // 10**6} million: make it smaller"
    elif pixels > max(_SURELY_FITS, _MOST_PER_BYTE * bytes_of_it):
        fault = f"{size} in {bytes_of_it / 1000:.0f} kB: it is damaged, or nearly empty: make it smaller"
    if fault is not None:
        image.close()
        raise NoPictureError(fault)
    return image


@contextmanager
def warnings_named(name: str) -> Iterator[None]:
    """Says what Pillow warns of (broken EXIF, tags cut short) in one line with the picture's name, once each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    heeded = [each for each in caught if not issubclass(each.category, Image.DecompressionBombWarning)]
    for text in dict.fromkeys(str(warning.message) for warning in heeded):
        _say_once(f"{name}: {' '.join(text.split())}")


@lru_cache(maxsize=1000)  # a clip is opened to see what it is, and again to be read
def _say_once(text: str) -> None:
    logger.warning(text)


def picture_suffixes() -> frozenset[str]:
    """The suffixes of the formats that are read, in lower case, with dots."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)


def _refuse_other_kinds(file: Path) -> None:
    """Raises NoPictureError where a file's first bytes tell that it is of a kind that is known, and none of FORMATS."""
    with file.open("rb") as opened:
        head = opened.read(512)
    if not head:
        raise NoPictureError("an empty file")
    if head[4:8] == b"ftyp" and b"avif" not in head[8:64] and b"avis" not in head[8:64]:
        if head[8:11] in (b"hei", b"hev", b"mif", b"msf"):
            raise NoPictureError(_HEIC)
        raise UnknownKindError("a film")
    if head.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        raise NoPictureError("a web page: fetch the file again")
    for mark, name in _MARKS:
        if head.startswith(mark):
            raise NoPictureError(name)
