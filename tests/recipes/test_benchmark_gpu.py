"""scripts/benchmark_gpu.sh: from a folder of wheels, without a network; and commands that the benchmarks know."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from cdvideo.cli import run_main
from cdvideo.evaluation.benchmark_main import COMMANDS, main

ROOT = Path(__file__).parents[2]
# In place of Python: notes what it is called with, makes no environment but itself, and fails where it is told to.
STAND_IN = """#!/bin/sh
echo "$@" >> "$NOTES"
case "$*" in
    "-m venv"*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    *"$FAILS"*) exit 1 ;;
esac
"""


def call(folder: Path, *, fails: str) -> tuple[int, str, list[str]]:
    """The script's exit code, what it complains of, and what it calls Python with."""
    python = folder / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    command = ["sh", str(ROOT / "scripts" / "benchmark_gpu.sh"), "wheels", "out"]
    surroundings = {**os.environ, "PYTHON": str(python), "NOTES": str(folder / "notes"), "FAILS": fails}
    ran = subprocess.run(command, cwd=folder, env=surroundings, capture_output=True, text=True)
    return ran.returncode, ran.stderr, (folder / "notes").read_text().splitlines()


@pytest.fixture
def called(tmp_path: Path) -> list[str]:
    """What the script calls Python with; decoding fails."""
    code, complaint, called = call(tmp_path, fails="decode")
    assert code == 1 and "failed: benchmark.py decode" in complaint
    return called


def test_packages_come_from_the_folder_alone(called: list[str]) -> None:
    venv, install, xformers, doctor, *_ = called
    assert venv == "-m venv --system-site-packages out/venv"
    assert install == f"-m pip install --quiet --no-index --find-links wheels {ROOT}"
    assert xformers == "-m pip install --quiet --no-index --find-links wheels xformers"
    assert doctor.endswith("scripts/doctor.py")


def test_without_xformers_all_else_is_measured(tmp_path: Path) -> None:
    code, complaint, called = call(tmp_path, fails="xformers")
    assert (code, complaint) == (0, "xformers is left out\n")
    assert sum("benchmark.py" in line for line in called) == len(COMMANDS)


def test_every_benchmark_is_run_and_its_settings_are_known(
    called: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each with a seed that can not be, which is all that is found wrong."""
    monkeypatch.chdir(tmp_path)
    benchmarks = [line.partition("benchmark.py ")[2].split() for line in called if "benchmark.py" in line]
    assert {argv[0] for argv in benchmarks} == COMMANDS.keys()
    for argv in benchmarks:
        assert run_main(main, [*argv, "--seed", "-1"]) == 2
        told = capsys.readouterr().err
        assert "error: 1 fault in the settings" in told and "seed=-1: must be at least 0" in told, (argv, told)
