"""Pictures in: of any size, in all common formats, checked whole before any work begins. And contact sheets out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from cdvideo.errors import UserError
from cdvideo.media.colours import to_rgb
from cdvideo.media.opening import PHONE_SUFFIXES, READABLE, open_picture, picture_suffixes, warnings_named

logger = logging.getLogger(__name__)

FEWEST, MOST = 3, 20  # pictures that make a good concept: fewer are copied, more add little
SMALLEST_SIDE = 32  # pixels: below this there is nothing to learn from
_LARGE = 64_000_000  # pixels: above this a picture is made smaller before its colours are converted
_FOLDERS_LOOKED_AT = 200  # below a folder that was given, for pictures that lie deeper


@dataclass(frozen=True)
class Picture:
    """One picture as a person sees it: upright, opaque, RGB."""

    name: str  # file name without folder
    image: Image.Image


def read_pictures(folder: Path, *, short_side: int = 1024) -> list[Picture]:
    """Reads every picture of a folder, in the order of their names; subfolders are left alone.

    EXIF rotation and colour profiles are applied, transparency is laid on white, of an animation the first frame is
    taken, and grey, palette, CMYK and 16-bit pictures become 8-bit RGB. Files that are no pictures are left out; that
    is said, and so are pictures in subfolders.

    Args:
        folder: Holds the pictures; hidden files and other files may lie beside them.
        short_side: Larger pictures are reduced to this many pixels on their short side, so that twenty of a
            camera's pictures fit into memory.

    Raises:
        UserError: When there is no such folder or no picture in it, or for pictures that are unreadable, too small or
            too large (all of them in one error).
    """
    files = _picture_files(folder)
    pictures: list[Picture] = []
    faults: list[str] = []
    for file in files:
        try:
            image = read_picture(file, short_side)
        except Exception as error:  # a broken file makes Pillow's decoders raise nearly anything; each is reported
            reason = str(error) or repr(error)
            faults.append(f"{file.name}: can not be read ({reason.replace(str(file), file.name)})")
            continue
        if min(image.size) < SMALLEST_SIDE:
            faults.append(f"{file.name}: only {image.width} x {image.height} pixels")
        pictures.append(Picture(name=file.name, image=image))
    if faults:
        raise UserError(
            f"{len(faults)} of {len(files)} pictures in {folder} can not be used:\n    " + "\n    ".join(faults),
            allowed=f"whole {READABLE} files, at least {SMALLEST_SIDE} pixels on each side",
            do="remove these files, or put others in their place",
        )
    if not FEWEST <= len(pictures) <= MOST:
        advice = "the concept may copy them" if len(pictures) < FEWEST else "more add little"
        logger.warning("%d pictures in %s: %d to %d work best, %s", len(pictures), folder, FEWEST, MOST, advice)
    return pictures


def read_picture(file: Path, short_side: int) -> Image.Image:
    """A picture as a person sees it, reduced to `short_side` pixels where it is larger; of an animation, the first.

    Raises:
        NoPictureError: another kind of file, or too many pixels.
        Exception: a damaged file makes Pillow's decoders raise nearly anything.
    """
    with warnings_named(file.name), open_picture(file) as opened:
        if getattr(opened, "is_animated", False) and opened.format != "MPO":  # an MPO is what some cameras call a JPEG
            logger.warning("%s holds several pictures: the first is taken", file.name)
        opened.draft(opened.mode, (short_side, short_side))  # lets a JPEG decode at a smaller size; nothing for others
        opened.load()
        image = to_rgb(ImageOps.exif_transpose(_reduced(opened, short_side)), name=file.name)
    scale = short_side / min(image.size)
    if scale < 1:
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    return image


def _reduced(image: Image.Image, short_side: int) -> Image.Image:
    """A very large picture by a whole factor, in its own colours: no second copy of its size is ever made."""
    factor = min(image.size) // (2 * short_side)
    if image.width * image.height <= _LARGE or factor < 2 or image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):
        return image
    small = image.reduce(factor)
    small.info["exif"] = image.getexif().tobytes()  # a TIFF has its rotation elsewhere
    return small


def _picture_files(folder: Path) -> list[Path]:
    """The files of a folder that claim to be pictures, by name. Raises UserError when there are none."""
    allowed = f"a folder of {FEWEST} to {MOST} pictures of one thing"
    if not folder.is_dir():
        given = f"{folder} is a file" if folder.exists() else f"there is no folder {folder}"
        raise UserError(given, allowed=allowed, do="put the pictures into a folder and name it with --images")
    entries = sorted(entry for entry in folder.iterdir() if entry.is_file())
    files = [entry for entry in entries if _claims_to_be_a_picture(entry)]
    ignored = [entry.name for entry in entries if entry not in files]
    if ignored:
        shown = ", ".join(ignored[:5]) + (", ..." if len(ignored) > 5 else "")
        logger.warning("ignored in %s: %s (hidden, or not a picture)", folder, shown)
    deeper = dict(pictures_below(folder))
    told = ", ".join(f"{name} ({count} pictures)" for name, count in list(deeper.items())[:5])
    told += ", ..." if len(deeper) > 5 else ""
    if not files and deeper:
        raise UserError(
            f"no pictures in {folder} itself, but below it: {told}",
            allowed=allowed,
            do=f"name the folder that holds them: --images {_quoted(folder / next(iter(deeper)))}",
        )
    if not files:
        raise UserError(f"no pictures in {folder}", allowed=allowed, do="put pictures there, or correct --images")
    if deeper:
        logger.warning("passed over, since only pictures in %s itself are learned: %s", folder, told)
    return files


def _claims_to_be_a_picture(file: Path) -> bool:
    return file.suffix.lower() in picture_suffixes() | PHONE_SUFFIXES and not file.name.startswith(".")


def pictures_below(folder: Path) -> Iterator[tuple[str, int]]:
    """The folders below one that hold pictures, each by its path from there, and how many it holds."""
    for place, folders, files in islice(os.walk(folder), _FOLDERS_LOOKED_AT):
        folders.sort()
        count = sum(_claims_to_be_a_picture(Path(name)) for name in files)
        if count and Path(place) != folder:
            yield str(Path(place).relative_to(folder)), count


def _quoted(path: Path) -> str:
    return f'"{path}"' if " " in str(path) else str(path)


def contact_sheet(
    frames_BHWC: np.ndarray, captions: Sequence[str], *, title: str = "", side: int = 256, columns: int = 4
) -> Image.Image:
    """Draws pictures side by side, each with its caption beneath.

    Args:
        frames_BHWC: uint8 pictures.
        captions: One for each picture.
        title: A line above all.
        side: Width of a picture on the sheet, in pixels.
        columns: Pictures in a row.

    Returns:
        The sheet, RGB.
    """
    assert len(captions) == len(frames_BHWC), f"{len(captions)} captions for {len(frames_BHWC)} pictures"
    font, line = ImageFont.load_default(size=14), 18
    texts = [_wrapped(caption, font, side - 8) for caption in captions]
    height = round(side * frames_BHWC.shape[1] / frames_BHWC.shape[2])
    cell_height = height + line * max(text.count("\n") + 1 for text in texts) + 8
    columns = min(columns, len(frames_BHWC))
    top = line + 8 if title else 0
    sheet = Image.new("RGB", (side * columns, top + cell_height * -(-len(frames_BHWC) // columns)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 4), title, font=font, fill="black")
    for index, (frame_HWC, text) in enumerate(zip(frames_BHWC, texts, strict=True)):
        row, column = divmod(index, columns)
        x, y = column * side, top + row * cell_height
        sheet.paste(Image.fromarray(frame_HWC).resize((side, height), Image.Resampling.LANCZOS), (x, y))
        draw.multiline_text((x + 4, y + height + 2), text, font=font, fill="black")
    return sheet


def _wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
