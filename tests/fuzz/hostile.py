"""Hostile inputs: whole files of the project's own writers, damaged in their bytes or wrong in what they say."""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from safetensors.torch import save
from torch import Tensor, nn

Named = Mapping[str, Tensor]


class Long(str):
    """A long text, shown by its beginning."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{self[:8]}... {len(self)}>"


_SHORT = ["", " ", ".", "..", "/", "a/../../b", "\0", "*", "<s0>", "<new1>", "${x}", "%s", "{0}", "é", "\ud800"]
_SHORT += ["nan", "null", "true", "-1", "1e999"]
_LONG = ["a" * 100_000, "a." * 5_000, "[" * 50_000, "9" * 5_000, "0x" + "f" * 9000, "𝔘" * 300]
TEXTS = st.one_of(st.text(max_size=30), st.text(max_size=30), st.sampled_from([*_SHORT, *map(Long, _LONG)]))
NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([10**4, 10**6, 10**9, 2**31, 2**32, 2**63 - 1, 2**64, 10**30, -(2**63)]),
    st.sampled_from([0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")]),
)
VALUES: SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=6,
)


# Bytes


@dataclass(frozen=True)
class ByteEdit:
    """One change to a file's bytes. `at`, `to`: places, counted around its end."""

    kind: str
    at: int
    to: int
    length: int
    put: bytes

    def apply(self, content: bytes) -> bytes:
        size = len(content) or 1
        at, to = self.at % size, self.to % size
        piece = content[at : at + self.length]
        if self.kind == "flip":
            return content[:at] + bytes(byte ^ (1 << self.to % 8) for byte in content[at : at + 1]) + content[at + 1 :]
        if self.kind == "put":
            return content[:at] + self.put + content[at + len(self.put) :]
        if self.kind == "insert":
            return content[:at] + self.put + content[at:]
        if self.kind == "cut":
            return content[:at]
        if self.kind == "drop":
            return content[:at] + content[at + self.length :]
        if self.kind == "zero":
            return content[:at] + bytes(len(piece)) + content[at + len(piece) :]
        if self.kind == "double":
            return content[:to] + piece + content[to:]
        rest = content[:at] + content[at + self.length :]  # move
        return rest[:to] + piece + rest[to:]


_PLACES = st.one_of(st.integers(0, 64), st.integers(0, 4096), st.integers(0, 2**31), st.integers(-64, -1))
BYTE_EDITS = st.lists(
    st.builds(
        ByteEdit,
        st.sampled_from(["flip", "put", "insert", "cut", "drop", "zero", "double", "move"]),
        _PLACES,
        _PLACES,
        st.one_of(st.integers(1, 16), st.integers(1, 5000)),
        st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(8)])),
    ),
    min_size=1,
    max_size=5,
)


def damaged(content: bytes, edits: Sequence[ByteEdit]) -> bytes:
    for edit in edits:
        content = edit.apply(content)
    return content


# JSON


@dataclass(frozen=True)
class JsonEdit:
    """One change somewhere in a tree of JSON: `steps` leads there, each counted around the end of what there is."""

    kind: str
    steps: tuple[int, ...]
    value: Any

    def apply(self, tree: Any) -> Any:
        tree = json.loads(json.dumps(tree))
        place: Any = {"": tree}
        key: Any = ""
        for step in self.steps:
            inner = place[key]
            if not isinstance(inner, (dict, list)) or not inner:
                break
            place, key = inner, [*inner][step % len(inner)] if isinstance(inner, dict) else step % len(inner)
        if place == {"": tree}:
            return self.value
        if self.kind == "value":
            place[key] = self.value
        elif self.kind == "drop":
            del place[key]
        elif self.kind == "nest":
            place[key] = [place[key]]
        elif isinstance(place, dict):  # rename
            place[str(self.value)[:200]] = place.pop(key)
        return tree


JSON_EDITS = st.lists(
    st.builds(
        JsonEdit,
        st.sampled_from(["value", "value", "value", "drop", "nest", "rename"]),
        st.lists(st.integers(0, 200), min_size=1, max_size=4).map(tuple),
        VALUES,
    ),
    min_size=1,
    max_size=3,
)


def as_json(tree: Any) -> str:
    """With NaN, and with texts that are no Unicode, as Python has them."""
    return json.dumps(tree)


# Tensors by name


DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]
DTYPES += [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.uint16, torch.uint64]
_SHAPES: list[Callable[[Tensor], Tensor]] = [
    lambda each: each.flatten(),
    lambda each: each[None],
    lambda each: each.transpose(0, -1) if each.ndim else each,
    lambda each: each[:0] if each.ndim else each,
    lambda each: each[:1] if each.ndim else each,
    lambda each: each[..., :-1] if each.ndim else each,
    lambda each: each[..., None, None],
    lambda each: each.flatten()[0] if each.numel() else each,
    lambda each: torch.cat([each, each]) if each.ndim else each,
    lambda each: torch.zeros(0),
    lambda each: torch.zeros(0, 10**9),
    lambda each: torch.ones(3, 0, 2, 1),
    lambda each: torch.ones(()),
    lambda each: torch.ones(1, 2, 3, 4, 5, 6),
]
_NUMBERS_IN_NAMES = [0, 1, 7, 99, 10**6, 10**9, 10**30, 10**4999]
_FILLS = [0.0, 1.0, -1.0, 1e-30, 1e30, float("nan"), float("inf")]


@dataclass(frozen=True)
class TensorEdit:
    """One change to tensors by name. `at`: which of them, counted around the end; `to`: how, or which other one."""

    kind: str
    at: int
    to: int
    text: str

    def apply(self, tensors: dict[str, Any]) -> dict[str, Any]:
        if not tensors:
            return tensors
        name = [*tensors][self.at % len(tensors)]
        other = [*tensors][self.to % len(tensors)]
        value = tensors[name]
        if self.kind == "drop":
            return {key: each for key, each in tensors.items() if key != name}
        if self.kind == "keep":  # few of many
            return dict([*tensors.items()][self.at % len(tensors) :][: 1 + self.to % 4])
        if self.kind == "swap":
            return {**tensors, name: tensors[other], other: value}
        if self.kind == "rename":
            return {self.text if key == name else key: each for key, each in tensors.items()}
        if self.kind == "add":
            return {**tensors, self.text: torch.ones(2, 3)}
        if self.kind == "begin":
            return {f"{self.text}.{key}" if self.to % 2 else f"{self.text}{key}": each for key, each in tensors.items()}
        if self.kind == "part":
            parts = name.split(".")
            del parts[self.to % len(parts)]
            return {".".join(parts) if key == name else key: each for key, each in tensors.items()}
        if self.kind == "number":
            numbers = [*re.finditer(r"\d+", name)]
            if not numbers:
                return tensors
            found = numbers[self.to % len(numbers)]
            number = _NUMBERS_IN_NAMES[(self.at + self.to) % len(_NUMBERS_IN_NAMES)]
            new = f"{name[: found.start()]}{'1' + '0' * 4999 if number >= 10**4999 else number}{name[found.end() :]}"
            return {**tensors, new: value}
        if not isinstance(value, Tensor):
            return tensors
        if self.kind == "shape":
            return {**tensors, name: _SHAPES[self.to % len(_SHAPES)](value)}
        if self.kind == "dtype":
            return {**tensors, name: value.to(DTYPES[self.to % len(DTYPES)])}
        fill = _FILLS[self.to % len(_FILLS)] if value.is_floating_point() else self.to % 2
        return {**tensors, name: torch.full_like(value, fill)}


_KINDS = [
    "drop",
    "keep",
    "swap",
    "rename",
    "add",
    "begin",
    "part",
    "number",
    "number",
    "shape",
    "shape",
    "dtype",
    "fill",
]
TENSOR_EDITS = st.lists(
    st.builds(TensorEdit, st.sampled_from(_KINDS), st.integers(0, 2000), st.integers(0, 200), TEXTS),
    min_size=1,
    max_size=3,
)


def changed(tensors: Named, edits: Sequence[TensorEdit]) -> dict[str, Any]:
    content: dict[str, Any] = dict(tensors)
    for edit in edits:
        content = edit.apply(content)
    return content


# Safetensors


def packed(header: str | bytes, body: bytes, *, length: int | None = None) -> bytes:
    """A safetensors file of any header."""
    raw = header if isinstance(header, bytes) else header.encode("utf-8", errors="surrogatepass")
    return struct.pack("<Q", (len(raw) if length is None else length) & (2**64 - 1)) + raw + body


def unpacked(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def as_safetensors(tensors: Mapping[str, Any], header: Mapping[str, str] | None = None) -> bytes:
    whole = {
        name.encode("utf-8", errors="replace").decode(): each.contiguous().clone()
        for name, each in tensors.items()
        if isinstance(each, Tensor)
    }
    texts = {key.encode("utf-8", errors="replace").decode(): value for key, value in (header or {}).items()}
    return save(whole, metadata={k: v.encode("utf-8", errors="replace").decode() for k, v in texts.items()} or None)


def _header_edited(content: bytes, edits: Sequence[JsonEdit]) -> bytes:
    header, body = unpacked(content)
    for edit in edits:
        header = edit.apply(header)
    return packed(as_json(header), body)


def _told_length(content: bytes, length: int) -> bytes:
    return struct.pack("<Q", length & (2**64 - 1)) + content[8:]


@dataclass(frozen=True)
class Damage:
    """What is done to one of several whole files, and which of them."""

    kind: str
    file: int
    edits: Sequence[Any]


def safetensors_damage() -> SearchStrategy[Damage]:
    files = st.integers(0, 50)
    lengths = st.lists(st.sampled_from([0, 1, 2, 2**20, 2**31, 2**40, -1, 100_000_001]), min_size=1, max_size=1)
    return st.one_of(
        st.builds(Damage, st.just("tensors"), files, TENSOR_EDITS),
        st.builds(Damage, st.just("tensors"), files, TENSOR_EDITS),
        st.builds(Damage, st.just("header"), files, JSON_EDITS),
        st.builds(Damage, st.just("texts"), files, JSON_EDITS),
        st.builds(Damage, st.just("bytes"), files, BYTE_EDITS),
        st.builds(Damage, st.just("length"), files, lengths),
        st.builds(Damage, st.just("random"), files, st.lists(st.binary(max_size=300), min_size=1, max_size=1)),
    )


def damaged_safetensors(files: Sequence[tuple[Named, Mapping[str, str]]], damage: Damage) -> bytes:
    """A file of these tensors and texts of the header, damaged."""
    tensors, header = files[damage.file % len(files)]
    if damage.kind == "tensors":
        return as_safetensors(changed(tensors, damage.edits), header)
    if damage.kind == "texts":
        texts: Any = {key: _parsed(text) for key, text in header.items()}
        for edit in damage.edits:
            texts = edit.apply(texts)
        texts = texts if isinstance(texts, dict) else {}
        return as_safetensors(
            tensors, {key: value if isinstance(value, str) else as_json(value) for key, value in texts.items()}
        )
    content = as_safetensors(tensors, header)
    if damage.kind == "header":
        return _header_edited(content, damage.edits)
    if damage.kind == "bytes":
        return damaged(content, damage.edits)
    if damage.kind == "length":
        return _told_length(content, damage.edits[0])
    return damage.edits[0]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


# Pickles


@dataclass(frozen=True)
class Odd:
    """Something in a pickle that is no plain tensor, by number."""

    number: int

    def made(self, value: Any) -> Any:
        like = value if isinstance(value, Tensor) else torch.ones(2, 2)
        kinds: list[Callable[[], Any]] = [
            lambda: None,
            lambda: 3,
            lambda: "text",
            lambda: b"bytes",
            lambda: [like, like],
            lambda: (like,),
            lambda: {"weight": like},
            lambda: {"a": {"b": {"c": like}}},
            lambda: nn.Parameter(like) if like.is_floating_point() else like,
            lambda: torch.zeros(1).expand(10**6, 10**6),
            lambda: torch.zeros(4).as_strided((2, 2), (0, 0)),
            lambda: like.to_sparse() if like.numel() < 10**5 else None,
            lambda: torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8),
            lambda: torch.empty(3, 3, device="meta"),
            lambda: torch.ones(2, dtype=torch.complex64),
            lambda: torch.Size([1, 2]),
            lambda: _nested(40),
            lambda: _nested(3000),
            lambda: _itself(),
            lambda: bytearray(10),
            lambda: {3: like, (1, 2): like, None: like, True: like},
            lambda: torch.ones(2, 3).t(),
            lambda: like.clone().requires_grad_() if like.is_floating_point() else like,
            lambda: torch.float16,
            lambda: print,
            lambda: set("ab"),
            lambda: torch.ones(2, 2).to(torch.float8_e4m3fn),
        ]
        return kinds[self.number % len(kinds)]()


def _nested(depth: int) -> Any:
    value: Any = torch.ones(1)
    for _ in range(depth):
        value = [value]
    return value


def _itself() -> Any:
    value: list[Any] = [torch.ones(1)]
    value.append(value)
    return value


@dataclass(frozen=True)
class PickleDamage:
    """`edits` of tensors by name, then odd things in place of some; then of the bytes, of the file or of its pickle."""

    file: int
    tensors: Sequence[TensorEdit]
    odd: Sequence[tuple[int, Odd]]
    whole: Odd | None
    form: str
    inner: Sequence[ByteEdit]
    outer: Sequence[ByteEdit]


def pickle_damage() -> SearchStrategy[PickleDamage]:
    def few(strategy: SearchStrategy[Any]) -> SearchStrategy[Any]:
        return st.one_of(st.just([]), st.just([]), strategy)

    return st.builds(
        PickleDamage,
        st.integers(0, 50),
        few(TENSOR_EDITS),
        few(st.lists(st.tuples(st.integers(0, 500), st.builds(Odd, st.integers(0, 26))), min_size=1, max_size=2)),
        st.one_of(st.none(), st.none(), st.none(), st.builds(Odd, st.integers(0, 26))),
        st.sampled_from(["zip", "zip", "legacy", "deflated"]),
        few(BYTE_EDITS),
        few(BYTE_EDITS),
    )


def damaged_pickle(files: Sequence[Mapping[str, Any]], damage: PickleDamage) -> bytes:
    content: Any = changed(files[damage.file % len(files)], damage.tensors)
    for at, odd in damage.odd:
        if content:
            name = [*content][at % len(content)]
            content = {**content, name: odd.made(content[name])}
    if damage.whole is not None:
        content = damage.whole.made(content)
    buffer = io.BytesIO()
    try:
        torch.save(content, buffer, _use_new_zipfile_serialization=damage.form != "legacy")
    except (RecursionError, RuntimeError, TypeError, pickle.PicklingError, NotImplementedError, UnicodeError):
        return b""  # nothing that torch.save would write
    raw = buffer.getvalue()
    if damage.form != "legacy" and (damage.inner or damage.form == "deflated"):
        raw = _repacked(raw, damage)
    return damaged(raw, damage.outer)


def _repacked(raw: bytes, damage: PickleDamage) -> bytes:
    """The same zip with its pickle changed, in which torch.load would see the change before any checksum does."""
    packed_anew = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if damage.form == "deflated" else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(packed_anew, "w", kind) as new:
        for name in old.namelist():
            entry = old.read(name)
            new.writestr(name, damaged(entry, damage.inner) if name.endswith("data.pkl") else entry)
    return packed_anew.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    """Writes a new file in place of a former one, which may still be mapped into memory."""
    path.unlink(missing_ok=True)
    if isinstance(content, str):
        content = content.encode("utf-8", errors="surrogatepass")
    path.write_bytes(content)
    return path
