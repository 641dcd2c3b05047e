"""Files of tensors by others: their wrappings, and what is refused in them."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cdvideo.base import checkpoint
from cdvideo.base.checkpoint import read_metadata, read_tensors
from cdvideo.errors import UserError


class Stranger:
    """Something that is not a tensor."""


def test_safetensors_and_their_header(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"weight": torch.arange(3.0)}, path, metadata={"modelspec.prediction_type": "v"})
    assert torch.equal(read_tensors(path)["weight"], torch.arange(3.0))
    assert read_metadata(path) == {"modelspec.prediction_type": "v"}
    assert read_metadata(tmp_path / "a.ckpt") == {}


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_unwrapped(tmp_path: Path, zipped: bool) -> None:
    content = {
        "state_dict": {"module.weight": torch.nn.Parameter(torch.ones(2))},
        "global_step": 3,
        "config": {"a": "b"},
    }
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    (name, tensor), *others = read_tensors(tmp_path / "a.ckpt").items()
    assert (name, others) == ("weight", [])
    assert torch.equal(tensor, torch.ones(2)) and not tensor.requires_grad


def test_changing_what_was_read_leaves_the_file_alone(tmp_path: Path) -> None:
    for path in (tmp_path / "a.ckpt", tmp_path / "a.safetensors"):
        save = save_file if path.suffix == ".safetensors" else torch.save
        save({"weight": torch.ones(2)}, path)
        read_tensors(path)["weight"].mul_(5)
        assert torch.equal(read_tensors(path)["weight"], torch.ones(2))


@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "old ckpt"])
def test_tensors_are_cast_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Each piece out of a mapping of its own; what has its type already, and what is no number to cast, stays."""
    content = {f"{i}": torch.randn(4, 8) for i in range(5)} | {"half": torch.ones(3).half(), "ids": torch.arange(4)}
    path = tmp_path / f"a.{kind.split()[-1]}"
    if kind == "safetensors":
        save_file(content, path)
    else:
        torch.save({"state_dict": content}, path, _use_new_zipfile_serialization=kind == "ckpt")
    opened: list[Path] = []
    read = checkpoint.read_content
    monkeypatch.setattr(checkpoint, "PIECE", 2 * content["0"].nbytes)
    monkeypatch.setattr(checkpoint, "read_content", lambda path: (opened.append(path), read(path))[1])
    found = read_tensors(path, dtype_of=lambda name: torch.float32 if name == "4" else torch.float16)
    assert found.keys() == content.keys() and found["4"].dtype == torch.float32 and found["ids"].dtype == torch.int64
    assert all(torch.equal(found[name], content[name].half()) for name in ("0", "1", "2", "3", "half"))
    assert len(opened) == (1 if kind == "old ckpt" else 3), "what can not be mapped is read once"


def test_the_callback_in_stable_diffusions_own_files_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "pytorch_lightning.callbacks.model_checkpoint"
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", place):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    callback: Any = type("ModelCheckpoint", (), {"__module__": place})
    sys.modules[place].ModelCheckpoint = callback  # type: ignore[attr-defined]
    torch.save({"state_dict": {"w": torch.ones(1)}, "callbacks": {callback: {"best": None}}}, tmp_path / "sd.ckpt")
    monkeypatch.undo()
    assert read_tensors(tmp_path / "sd.ckpt").keys() == {"w"}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def whole(folder: Path, content: object) -> bytes:
    torch.save(content, folder / "whole.ckpt")
    return (folder / "whole.ckpt").read_bytes()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder / "absent.ckpt", "is no file"),
        (lambda folder: write(folder / "a.txt", b"text"), "another kind"),
        (lambda folder: write(folder / "a.ckpt", b""), r"a\.ckpt can not be read"),
        (lambda folder: write(folder / "a.ckpt", b"abc"), r"a\.ckpt can not be read"),
        (lambda folder: write(folder / "a.safetensors", b"abc"), r"a\.safetensors can not be read"),
        (lambda folder: write(folder / "a.ckpt", whole(folder, {"a": torch.ones(9999)})[:20000]), "can not be read"),
        (
            lambda folder: write(folder / "a.ckpt", whole(folder, {"a": Stranger()})),
            r"more than tensors: [\w.]*Stranger",
        ),
        (lambda folder: write(folder / "a.ckpt", whole(folder, {"step": 3})), "no tensors"),
        (lambda folder: write(folder / "a.ckpt", whole(folder, torch.ones(3))), "no tensors"),
    ],
)
def test_what_can_not_be_read_is_told(tmp_path: Path, make: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_tensors(make(tmp_path))
