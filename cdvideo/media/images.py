"""Pictures in: any size and format that Pillow reads, checked whole before any work begins. And contact sheets out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from cdvideo.errors import UserError

logger = logging.getLogger(__name__)

FEWEST, MOST = 3, 20  # pictures that make a good concept: fewer are copied, more add little
SMALLEST_SIDE = 32  # pixels: below this there is nothing to learn from
_PHONE_FORMATS = frozenset({".heic", ".heif"})  # pictures to their owner, though Pillow can not read them


@dataclass(frozen=True)
class Picture:
    """One picture as a person sees it: upright, opaque, RGB."""

    name: str  # file name without folder
    image: Image.Image


def read_pictures(folder: Path, *, short_side: int = 1024) -> list[Picture]:
    """Reads every picture of a folder, in the order of their names; subfolders are left alone.

    EXIF rotation is applied, transparency is laid on white, of an animation the first frame is taken, and grey,
    palette, CMYK and 16-bit pictures become 8-bit RGB. Files that are no pictures are left out, and that is said.

    Args:
        folder: Holds the pictures; hidden files and other files may lie beside them.
        short_side: Larger pictures are reduced to this many pixels on their short side, so that twenty of a
            camera's pictures fit into memory.

    Raises:
        UserError: When there is no such folder or no picture in it, or for pictures that are unreadable or too small
            (all of them in one error).
    """
    files = _picture_files(folder)
    pictures: list[Picture] = []
    faults: list[str] = []
    for file in files:
        try:
            image = _read(file, short_side)
        except Exception as error:  # a broken file makes Pillow's decoders raise nearly anything; each is reported
            reason = "HEIC is not supported" if file.suffix.lower() in _PHONE_FORMATS else str(error) or repr(error)
            faults.append(f"{file.name}: can not be read ({reason.replace(str(file), file.name)})")
            continue
        if min(image.size) < SMALLEST_SIDE:
            faults.append(f"{file.name}: only {image.width} x {image.height} pixels")
        pictures.append(Picture(name=file.name, image=image))
    if faults:
        raise UserError(
            f"{len(faults)} of {len(files)} pictures in {folder} can not be used:\n    " + "\n    ".join(faults),
            allowed=f"whole PNG, JPEG, WebP, GIF, TIFF, ... files, at least {SMALLEST_SIDE} pixels on each side",
            do="remove these files, or save them anew as PNG or JPEG",
        )
    if not FEWEST <= len(pictures) <= MOST:
        advice = "the concept may copy them" if len(pictures) < FEWEST else "more add little"
        logger.warning("%d pictures in %s: %d to %d work best, %s", len(pictures), folder, FEWEST, MOST, advice)
    return pictures


def _picture_files(folder: Path) -> list[Path]:
    """The files of a folder that claim to be pictures, by name. Raises UserError when there are none."""
    allowed = f"a folder of {FEWEST} to {MOST} pictures of one thing"
    if not folder.is_dir():
        given = f"{folder} is a file" if folder.exists() else f"there is no folder {folder}"
        raise UserError(given, allowed=allowed, do="put the pictures into a folder and name it with --images")
    entries = sorted(entry for entry in folder.iterdir() if entry.is_file())
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    suffixes |= _PHONE_FORMATS
    files = [entry for entry in entries if entry.suffix.lower() in suffixes and not entry.name.startswith(".")]
    ignored = [entry.name for entry in entries if entry not in files]
    if ignored:
        shown = ", ".join(ignored[:5]) + (", ..." if len(ignored) > 5 else "")
        logger.warning("ignored in %s: %s (hidden, or not a picture)", folder, shown)
    if not files:
        raise UserError(f"no pictures in {folder}", allowed=allowed, do="put pictures there, or correct --images")
    return files


def _read(file: Path, short_side: int) -> Image.Image:
    with Image.open(file) as opened:
        opened.draft(opened.mode, (short_side, short_side))  # lets a JPEG decode at a smaller size; nothing for others
        opened.load()
        image = to_rgb(ImageOps.exif_transpose(opened))
    scale = short_side / min(image.size)
    if scale < 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own conversion clips at 255. Integers are 16-bit pictures; floats are in [0, 1] or [0, 255].
        values = np.asarray(image, dtype=np.float64)
        white = 65535.0 if image.mode != "F" else 1.0 if values.max() <= 1 else 255.0
        image = Image.fromarray(np.clip(values * (255 / white) + 0.5, 0, 255).astype(np.uint8))
    return image.convert("RGB")


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
