"""Files of tensors that others have made: mapped from the disk, not copied, and read without running any code."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cdvideo.base.signatures import describe_bytes
from cdvideo.errors import UserError

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *PICKLED)
LONGEST_NAME = 1000  # characters; those of layers have 150, and patterns are looked for in them
PIECE = 2**27  # bytes of a file that are in memory at once while its tensors are cast; one tensor may be more


class _Inert:
    """Stands in for what trainers pickle beside the weights: takes everything, does nothing."""

    def __init__(self, *_args: object) -> None: ...


# Stable Diffusion's own .ckpt files carry the state of this callback.
_STAND_INS: list[Any] = [(_Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]
# torch pickled tensors of a Mac's GPU as arrays of NumPy, which were at another place before NumPy 2.
_reconstruct = np.zeros(1).__reduce__()[0]
_ARRAYS: list[Any] = [np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8"))]
_ARRAYS += [(_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
# ParameterDict: in which textual inversion first kept its rows.
_HARMLESS: list[Any] = [*_STAND_INS, nn.ParameterDict, *_ARRAYS]
_DEEPEST, _MOST = 64, 200_000  # of what a pickle nests, and of all its entries together


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
        UserError: a damaged file, a pickle of more than tensors and plain values, or one that would unfold to more than
            the file holds.
    """
    content, header = (_plain(path, _read_pickle(path)), {}) if _is_pickle(path) else _read_safetensors(path)
    for _ in range(2):  # Lightning's wrapping, and one more around it
        if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
            content = content["state_dict"]
    if isinstance(content, Mapping):
        content = {str(name).removeprefix("module."): value for name, value in content.items()}
        longest = max(content, key=len, default="")
        if len(longest) > LONGEST_NAME:
            raise UserError(
                f"{path} holds a name of {len(longest)} characters, {longest[:40]}...",
                allowed=f"names of at most {LONGEST_NAME} characters",
                do="fetch it again, or get the same weights from elsewhere",
            )
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


def _plain(path: Path, content: Any) -> Any:
    """What a pickle holds, with dicts in place of `ParameterDict`.

    Raises:
        UserError: For what nests without an end, and for tensors of more numbers than the file has for them.
    """
    entries, size = 0, path.stat().st_size

    def plain(value: Any, depth: int) -> Any:
        nonlocal entries
        entries += 1
        if depth > _DEEPEST or entries > _MOST:
            raise _unbounded(path, f"its entries nest more than {_DEEPEST} deep, or are more than {_MOST:,}")
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise _unbounded(path, "it holds a tensor that is sparse, quantised or without numbers")
            if value.numel() * value.element_size() > min(size, value.untyped_storage().nbytes()):
                raise _unbounded(path, f"a tensor of shape {tuple(value.shape)} has fewer numbers in the file")
            return value
        if isinstance(value, nn.ParameterDict):
            value = _rows_of(value)
        if isinstance(value, Mapping):
            return {key: plain(inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(inner, depth + 1) for inner in value]
        return value

    return plain(content, 0)


def _rows_of(parameters: nn.ParameterDict) -> dict[str, Any]:
    """Its entries, as every version of torch pickled them: before 1.12 it kept no list of their names."""
    state = vars(parameters)
    kept: dict[str, Any] = dict(state.get("_parameters") or {})
    return kept | {name: state[name] for name in state.get("_keys", ()) if name not in kept and name in state}


def _unbounded(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} can not be read: {what}",
        allowed="pickles of plain tensors, each with all its numbers in the file",
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
