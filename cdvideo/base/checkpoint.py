"""Files of tensors that others have made: mapped from the disk, not copied, and read without running any code."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cdvideo.errors import UserError

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *PICKLED)
PIECE = 2**27  # bytes of a file that are in memory at once while its tensors are cast; one tensor may be more


class _Inert:
    """Stands in for what trainers pickle beside the weights: takes everything, does nothing."""

    def __init__(self, *_args: object) -> None: ...


# Stable Diffusion's own .ckpt files carry the state of this callback.
_STAND_INS: list[Any] = [(_Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]
_HARMLESS: list[Any] = [*_STAND_INS, nn.ParameterDict]  # in which textual inversion first kept its rows


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
        UserError: a damaged file, or a pickle of more than tensors and plain values.
    """
    content, header = (_read_pickle(path), {}) if _is_pickle(path) else _read_safetensors(path)
    while isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if isinstance(content, Mapping):
        content = {str(name).removeprefix("module."): value for name, value in content.items()}
    return content, header


def read_metadata(path: Path) -> dict[str, str]:
    """The header's texts of a safetensors file; other files have none."""
    if path.suffix.lower() != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


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
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_mapped(path))
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


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
    return UserError(
        f"{path} can not be read: it is damaged, or no file of weights ({reason})",
        allowed="a whole file of weights, as safetensors or as torch.save writes them",
        do="fetch it again",
    )
