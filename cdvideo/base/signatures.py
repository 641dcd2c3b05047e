"""What a file is that holds no weights: told by its first bytes, for errors that help (no torch)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Stranger(NamedTuple):
    """What a file is in place of weights, and what its owner can do."""

    what: str
    do: str


_AGAIN = "fetch the file itself, by the page's own download link"
_LFS = Stranger(
    "a pointer of Git LFS: a few lines of text that stand for the file",
    "fetch the file itself: `git lfs pull` in the folder that it came from, or the page's download link",
)
_PAGE = Stranger("a web page", _AGAIN)
_PICTURE = "name a file of weights; an embedding within a picture has to be saved as .pt or .safetensors first"
_STARTS: tuple[tuple[bytes, Stranger], ...] = (
    (b"version https://git-lfs", _LFS),
    (b"\x89PNG\r\n", Stranger("a picture (PNG)", _PICTURE)),
    (b"\xff\xd8\xff", Stranger("a picture (JPEG)", _PICTURE)),
    (b"GIF8", Stranger("a picture (GIF)", _PICTURE)),
    (b"\x1f\x8b", Stranger("packed with gzip", "unpack it: gunzip")),
    (b"BZh", Stranger("packed with bzip2", "unpack it: bunzip2")),
    (b"\xfd7zXZ", Stranger("packed with xz", "unpack it: unxz")),
    (b"7z\xbc\xaf", Stranger("a 7z archive", "unpack it, and name the file of weights within")),
    (b"Rar!", Stranger("a RAR archive", "unpack it, and name the file of weights within")),
    (b"GGUF", Stranger("a GGUF file, whose weights are quantised", "get the same weights as .safetensors")),
    (b"\x89HDF", Stranger("an HDF5 file, as TensorFlow writes them", "get the same weights for PyTorch")),
    (b"\x93NUMPY", Stranger("an array of NumPy", "save it as .safetensors, under the word it stands for")),
    (b"%PDF", Stranger("a PDF", "name a file of weights")),
)


def stranger(path: Path) -> Stranger | None:
    """What a file is that can not be read as weights; None where its first bytes do not tell."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return Stranger("empty", _AGAIN)
    found = next((what for begin, what in _STARTS if start.startswith(begin)), None)
    if found is not None:
        return found
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return Stranger("a picture (WebP)", _PICTURE)
    if start[4:8] == b"ftyp":
        return Stranger("a film or a HEIC picture", "name a file of weights")
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return _PAGE
    if text.startswith((b"{", b"[")):
        return Stranger("a text in JSON", "name the file of weights beside it; a server's answer says why it sent none")
    return None
