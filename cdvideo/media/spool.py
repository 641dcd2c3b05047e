"""A film's frames on the disk, so that several writers can read them while none of them is in memory."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Frame: TypeAlias = npt.NDArray[np.uint8]  # frame_HWC, RGB


class Spool(Sequence[Frame]):
    """Frames of one size, drawn from an iterator as it makes them and kept in a temporary file until the block ends.

    Read like a sequence: by index, in order, as often as wanted.
    """

    def __init__(self, frames: Iterable[Frame]) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the block ends)
        self._shape: tuple[int, ...] = ()
        self._count = 0
        for frame in frames:
            assert not self._shape or frame.shape == self._shape, f"a frame of {frame.shape} in a film of {self._shape}"
            self._shape = frame.shape
            self._file.write(np.ascontiguousarray(frame, dtype=np.uint8).data)
            self._count += 1

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        size = math.prod(self._shape)
        self._file.seek(int(index) * size)
        return np.frombuffer(self._file.read(size), dtype=np.uint8).reshape(self._shape)

    def __iter__(self) -> Iterator[Frame]:
        return (self[index] for index in range(self._count))

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
