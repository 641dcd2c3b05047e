"""The C library's allocator, told to keep what it gets: on a CPU about a tenth of the sampling time."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_LARGEST_THRESHOLD = 32 * 2**20  # bytes; glibc takes no more


def keep_freed_memory() -> bool:
    """Lets glibc keep the memory of freed tensors of up to 32 MB for the next ones.

    By default every large tensor is mapped anew, and the kernel clears its pages at first touch; a denoising step makes
    hundreds of them, all of the same few sizes. Numbers do not change. Other C libraries are left as they are.

    Returns:
        Whether it was done.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another libc than glibc
        return False
    options = ((_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD), (_M_TRIM_THRESHOLD, 2**30), (_M_TOP_PAD, 2**26))
    return all(mallopt(option, value) for option, value in options)
