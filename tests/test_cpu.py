from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from cdvideo.cpu import wait_without_burning

SCRIPT = """
import torch
from cdvideo.cpu import keep_freed_memory

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


def test_a_setting_from_outside_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    wait_without_burning()
    assert os.environ["GOMP_SPINCOUNT"] == "10000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    wait_without_burning()
    assert os.environ["GOMP_SPINCOUNT"] == "7"


def test_every_script_sets_it_before_torch_is_loaded() -> None:
    script = """
import os, sys
from cdvideo.cli import run_main
print(run_main(lambda _: print(os.environ["GOMP_SPINCOUNT"], "torch" in sys.modules), []))
"""
    env = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.split() == ["10000", "False", "0"]
