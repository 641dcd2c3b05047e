"""The C libraries below torch, told how to behave on a CPU. No number changes. Imports no torch."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_LARGEST_THRESHOLD = 32 * 2**20  # bytes; glibc takes no more


def prepare_cpu() -> None:
    """To be called before torch is imported, since GNU OpenMP reads its settings when it is loaded."""
    wait_without_burning()
    keep_freed_memory()


def wait_without_burning() -> None:
    """Lets a thread that waits for the others spin for microseconds only, then sleep.

    GNU OpenMP's default spins for milliseconds. On a machine with other work to do, the waiting thread then takes the
    core that the thread it waits for needs: sampling took twice as long beside one busy process for each core, and as
    long as before with nothing beside it. A setting from outside is left alone.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def keep_freed_memory() -> bool:
    """Lets glibc keep the memory of freed tensors of up to 32 MB for the next ones; saves a tenth of the sampling time.

    By default every large tensor is mapped anew, and the kernel clears its pages at first touch; a denoising step makes
    hundreds of them, all of the same few sizes. Other C libraries are left as they are.

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
