from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from cdvideo.sampling.allocator import keep_freed_memory

def faults():
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def passes(count):
    for _ in range(count):
        torch.ones(4 * 2**20)  # 16 MB, freed at once
before = faults()
passes(20)
between = faults()
assert keep_freed_memory()
passes(2)
start = faults()
passes(20)
print(between - before, faults() - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_memory_is_mapped_once() -> None:
    """Page faults of twenty equal allocations, before and after; in a process of its own, since it stays set."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 20 * 100, "without it, every allocation faults its pages in anew"
    assert after < before / 10
