"""Weights that lie in a file that is mapped into memory, and are let go of as soon as they have been used.

A base whose file has the dtype that is asked for is not copied: its tensors are the file's own pages, which the kernel
reads when they are first touched and keeps in its cache for as long as nobody else wants the room. After a module has
worked, its pages are given back to that cache, so the process holds the weights of one block and not of the model.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Span = tuple[int, int]  # of addresses: from, to
_DONT_NEED = 4  # of madvise(2)
_HELD, _OF_A_FILE = 1 << 63 | 1 << 62, 1 << 61  # of an entry in /proc/self/pagemap: in memory or swapped out


@contextmanager
def letting_go(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block, whatever of these modules is called lets go of its weights when it has worked.

    Weights that are no pages of a file stay, and so do those that were written into since they were mapped.
    """
    files = mapped_files()
    hooks = []
    try:
        for part in (part for module in modules for part in module.modules()) if files else ():
            spans = [span for span in file_spans(part.parameters(), files) if not _is_written(span)]
            if spans:
                hooks.append(part.register_forward_hook(partial(let_go, spans)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def file_spans(tensors: Iterable[Tensor], files: Sequence[Span]) -> list[Span]:
    """The whole pages of those of the tensors that lie in files; neighbours are one span."""
    starts, merged = [start for start, _ in files], list[Span]()
    for start, end in sorted((each.data_ptr(), each.data_ptr() + each.nbytes) for each in tensors if each.nbytes):
        at = bisect_right(starts, start) - 1
        if at < 0 or end > files[at][1]:
            continue
        if merged and start - merged[-1][1] < mmap.PAGESIZE:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    size = mmap.PAGESIZE
    return [(-(-start // size) * size, end // size * size) for start, end in merged if end // size > -(-start // size)]


def mapped_files() -> list[Span]:
    """Where in this process's memory files are mapped (proc(5)), by address; other systems than Linux do not tell."""
    if sys.platform != "linux":
        return []
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _access, _offset, _device, inode = line.split()[:5]
        if inode != "0":
            start, _, end = addresses.partition("-")
            found.append((int(start, 16), int(end, 16)))
    return found


def _is_written(span: Span) -> bool:
    """Whether a page is this process's own copy by now, which would be lost; also where the system does not tell."""
    start, end = span
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(start // mmap.PAGESIZE * 8)
            entries = np.frombuffer(pagemap.read((end - start) // mmap.PAGESIZE * 8), dtype=np.uint64)
    except OSError:  # some containers keep it closed
        return True
    held, of_a_file = (entries & np.uint64(flag) != 0 for flag in (_HELD, _OF_A_FILE))
    return bool((held & ~of_a_file).any())


def let_go(spans: Sequence[Span], *_: object) -> None:
    """Gives pages of files back: what is read of them next comes from the kernel's cache, or from the disk."""
    if torch.compiler.is_compiling():  # a graph is called as a whole, and does not know its modules
        return
    for start, end in spans:
        if _MADVISE(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONT_NEED):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


_MADVISE: Any = ctypes.CDLL(None, use_errno=True).madvise if sys.platform == "linux" else None
