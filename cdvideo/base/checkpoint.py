"""Files of tensors that others have made: mapped from the disk, not copied, and read without running any code."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cdvideo.errors import UserError

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *PICKLED)
DEPTH = 16  # of lists and mappings in each other, in a pickle; trainers nest three or four
PIECE = 2**27  # bytes of a file that are in memory at once while its tensors are cast; one tensor may be more


class _Inert:
    """Stands in for what trainers pickle beside the weights: takes everything, does nothing."""

    def __init__(self, *_args: object) -> None: ...


# Stable Diffusion's own .ckpt files carry the state of this callback.
_STAND_INS: list[Any] = [(_Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]
_HARMLESS: list[Any] = [*_STAND_INS, nn.ParameterDict]  # in which textual inversion first kept its rows


class Described(NamedTuple):
    """What a file is that is no file of weights, and what to do about it."""

    what: str
    do: str


_WEB_PAGE = Described("a web page", "download the file itself: the link behind the download button, not the page's own")
_POINTER = Described(
    "a Git LFS pointer, which stands for a file that was not fetched",
    "run `git lfs pull` in the repository that it comes from, or download the file itself",
)
_ARCHIVE = "unpack it, and name the file of weights that is in it"
# What files begin with.
_BEGINNINGS: tuple[tuple[bytes, Described], ...] = (
    (b"version https://git-lfs", _POINTER),
    (b"\x89PNG\r\n", Described("a PNG picture", "name the file of weights that belongs to it")),
    (b"\xff\xd8\xff", Described("a JPEG picture", "name the file of weights that belongs to it")),
    (b"GIF8", Described("a GIF picture", "name the file of weights that belongs to it")),
    (b"RIFF", Described("a WebP picture, a film or a sound", "name the file of weights that belongs to it")),
    (b"%PDF", Described("a PDF document", "name a file of weights")),
    (b"GGUF", Described("a GGUF file, quantised for other programs", "get the same weights as .safetensors")),
    (b"\x89HDF", Described("an HDF5 file, as Keras writes it", "get the same weights as .safetensors")),
    (b"\x1f\x8b", Described("a gzip archive", _ARCHIVE)),
    (b"7z\xbc\xaf", Described("a 7z archive", _ARCHIVE)),
    (b"Rar!", Described("a RAR archive", _ARCHIVE)),
)


def describe_bytes(path: Path) -> Described | None:
    """What a file without weights is, by its first bytes: a web page, a Git LFS pointer, a picture, an archive, text.

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
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] == b"<":
        return _WEB_PAGE
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


def read_tensors(path: Path, *, dtype_of: Callable[[str], torch.dtype] | None = None) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .ckpt, .pt, .pth or .bin file, by name; as `read_content`.

    Entries that are no tensors (step counts, configs) are left out.

    Args:
        dtype_of: The type that a tensor of floating point is cast to, by its name; None leaves all as they are. Those
            of another type are copied, and are never in memory together with what they were copied from.

    Raises:
        UserError: no such file, another kind of file, a damaged one, or a pickle of more than tensors.
    """
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{path} is {'a file of another kind' if path.is_file() else 'no file'}",
            allowed=f"a file that ends in {', '.join(SUFFIXES)}",
            do="check the path",
        )
    tensors = _named_tensors(path)
    if not tensors:
        raise UserError(f"{path} holds no tensors", allowed="a file of named weights", do="choose another file")
    if dtype_of is not None:
        _cast(path, tensors, dtype_of)
    return tensors


def _named_tensors(path: Path) -> dict[str, Tensor]:
    content, _ = read_content(path)
    if not isinstance(content, Mapping):
        return {}
    return {str(name): value.detach() for name, value in content.items() if isinstance(value, Tensor)}


def _cast(path: Path, tensors: dict[str, Tensor], dtype_of: Callable[[str], torch.dtype]) -> None:
    """In place, piece by piece. What is read of a mapped file stays in memory as long as any of its tensors does, so
    each piece is cast out of a mapping of its own, which goes with it."""
    pieces: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype != dtype_of(name):
            if size + tensor.nbytes > PIECE and pieces[-1]:
                pieces.append([])
                size = 0
            pieces[-1].append(name)
            size += tensor.nbytes
    for names in pieces:
        piece = _named_tensors(path) if _is_mapped(path) else tensors
        for name in names:
            tensors[name] = piece[name].to(dtype_of(name))


def read_content(path: Path) -> tuple[Any, dict[str, str]]:
    """What a file of weights holds, most often tensors by name, and the texts of a safetensors file's header.

    Its first bytes tell how to read it, whatever its name. Pickled files are read with `weights_only=True`, so nothing
    in them is executed. What trainers wrap around the weights goes: an outer `state_dict`, and `module.` before each
    name. The tensors lie in the file itself, mapped into memory: they take room only as they are read.

    Raises:
        UserError: a damaged file, one of another kind, by name, a pickle of more than tensors and plain values, or one
            whose tensors claim to be larger than what is stored of them.
    """
    content, header = (_read_pickle(path), {}) if _is_pickle(path) else _read_safetensors(path)
    for _ in range(2):
        if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
            content = content["state_dict"]
    if isinstance(content, Mapping):
        content = {str(name).removeprefix("module."): value for name, value in content.items()}
    return content, header


def read_metadata(path: Path) -> dict[str, str]:
    """The header's texts of a safetensors file, whatever its name; other files have none."""
    if not path.is_file() or _is_pickle(path):
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _is_pickle(path: Path) -> bool:
    """Whether a file begins as torch.save writes it, in a zip or as it did before 1.6. Safetensors begin with a length,
    which may look like either, and a JSON object."""
    with path.open("rb") as file:
        start = file.read(9)
    return start.startswith((b"PK", b"\x80")) and start[8:] != b"{"


def _is_mapped(path: Path) -> bool:
    """Pickled files from before torch 1.6 are no zip archives, and can not be mapped."""
    return not _is_pickle(path) or zipfile.is_zipfile(path)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_mapped(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise _damaged(path, error) from error
        raise UserError(
            f"{path} pickles more than tensors: {found[1]}",
            allowed="pickles of tensors and plain values, which can be read without running code",
            do="get the same weights as .safetensors",
        ) from error
    except Exception as error:  # damaged bytes, read as pickled instructions, raise whatever the broken one raises
        raise _damaged(path, error) from error
    _check_claims(path, content)
    return content


def _check_claims(path: Path, content: Any) -> None:
    """A few bytes of a pickle may claim a tensor of any size (strides of 0), or hold themselves.

    Raises:
        UserError: a tensor that is larger than what is stored of it, or of a kind that no weights have; values nested
            without an end.
    """
    level, seen = [content], set[int]()
    for _ in range(DEPTH):
        deeper: list[Any] = []
        for value in level:
            if isinstance(value, Tensor):
                _check_tensor(path, value)
            elif isinstance(value, (Mapping, list, tuple, set, frozenset)) and id(value) not in seen:
                seen.add(id(value))
                deeper += value.values() if isinstance(value, Mapping) else value
        level = deeper
    if any(not isinstance(value, Tensor) and isinstance(value, (Mapping, list, tuple)) for value in level):
        raise _hostile(path, f"values nested in each other more than {DEPTH} times")


def _check_tensor(path: Path, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise _hostile(path, f"a tensor that is {'quantised' if tensor.is_quantized else 'sparse or empty'}")
    claimed, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if claimed > stored:
        raise _hostile(path, f"a tensor of {claimed} bytes, of which {stored} are stored")


def _hostile(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} holds {what}",
        allowed="tensors of numbers that are all in the file, by name",
        do="get the same weights as .safetensors",
    )


def _damaged(path: Path, error: Exception) -> UserError:
    described = describe_bytes(path) if path.is_file() else None
    if described is not None:
        return UserError(
            f"{path} can not be read: it is {described.what}",
            allowed="a file of weights, as safetensors or as torch.save writes them",
            do=described.do,
        )
    reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
    return UserError(
        f"{path} can not be read: it is damaged, or no file of weights ({reason})",
        allowed="a whole file of weights, as safetensors or as torch.save writes them",
        do="fetch it again",
    )
