"""What a file is that holds no weights: told by its first bytes, for errors that help (no torch)."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple


class Described(NamedTuple):
    """What a file is in place of weights, and what its owner can do."""

    what: str
    do: str


_ITSELF = "download the file itself: the link behind the download button, not the page's own"
_PICTURE = "name a file of weights; an embedding within a picture has to be saved as .pt or .safetensors first"
_ARCHIVE = "unpack it, and name the file of weights that is in it"
# What files begin with.
_BEGINNINGS: tuple[tuple[bytes, Described], ...] = (
    (
        b"version https://git-lfs",
        Described(
            "a Git LFS pointer, which stands for a file that was not fetched",
            "run `git lfs pull` in the repository that it comes from, or download the file itself",
        ),
    ),
    (b"\x89PNG\r\n", Described("a PNG picture", _PICTURE)),
    (b"\xff\xd8\xff", Described("a JPEG picture", _PICTURE)),
    (b"GIF8", Described("a GIF picture", _PICTURE)),
    (b"RIFF", Described("a WebP picture, a film or a sound", _PICTURE)),
    (b"%PDF", Described("a PDF document", "name a file of weights")),
    (b"GGUF", Described("a GGUF file, quantised for other programs", "get the same weights as .safetensors")),
    (b"\x89HDF", Described("an HDF5 file, as Keras writes it", "get the same weights as .safetensors")),
    (b"\x93NUMPY", Described("an array of NumPy", "save it as .safetensors, under the word it stands for")),
    (b"\x1f\x8b", Described("a gzip archive", _ARCHIVE)),
    (b"BZh", Described("a bzip2 archive", _ARCHIVE)),
    (b"\xfd7zXZ", Described("an xz archive", _ARCHIVE)),
    (b"7z\xbc\xaf", Described("a 7z archive", _ARCHIVE)),
    (b"Rar!", Described("a RAR archive", _ARCHIVE)),
)


def describe_bytes(path: Path) -> Described | None:
    """Return what a file without weights is, by its first bytes: a web page, a Git LFS pointer, a picture, text.

    Of a file of weights, whole or damaged, it says nothing.
    """
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return Described("an empty file", "fetch it again")
    if start[4:9] == b"\0\0\0\0{":  # of safetensors, whatever its length looks like
        return None
    for beginning, described in _BEGINNINGS:
        if start.startswith(beginning):
            return described
    if start[4:8] == b"ftyp":
        return Described("a film or a HEIC picture", "name a file of weights")
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] == b"<":
        return Described("a web page", _ITSELF)
    if text[:1] in (b"{", b"["):
        return Described("a JSON text", "download the file itself: this may be a server's answer, or a config")
    if start.startswith(b"PK") and zipfile.is_zipfile(path) and not _is_of_torch(path):
        return Described("a zip archive, and not one of torch", _ARCHIVE)
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start):
        return Described("a text", "download the file of weights itself")
    return None


def _is_of_torch(path: Path) -> bool:
    """Whether a zip archive is one of torch.save's, or too damaged to tell."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except Exception:  # a damaged directory raises whatever its numbers lead to
        return True
