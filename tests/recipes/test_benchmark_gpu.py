"""scripts/benchmark_gpu.sh and what it runs: every row, on the CPU with small models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cdvideo.cli import run_main
from cdvideo.evaluation.benchmark_gpu import as_text, main, run_rows
from cdvideo.evaluation.gpu_machine import Machine, Row, open_machine
from cdvideo.evaluation.memory_measurement import CLEAR_REFS

ROOT = Path(__file__).parents[2]
# In place of Python: notes what it is called with and where it looks for packages.
STAND_IN = """#!/bin/sh
echo "$PYTHONPATH|$*" >> "$NOTES"
"""


@pytest.fixture
def machine() -> Machine:
    return open_machine(dry=True)


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="the CPU's memory is measured under Linux alone")
def test_every_row_runs_without_ffmpeg_and_decord(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("decord", "imageio_ffmpeg"):
        monkeypatch.setitem(sys.modules, package, None)
    assert run_main(main, ["--dry-run", "--out", str(tmp_path)]) == 0
    rows = {row["row"]: row for row in map(json.loads, (tmp_path / "gpu.jsonl").read_text().splitlines())}
    assert [*rows][:5] == ["doctor", "rates", "film-exact", "training-kv_sd15_8gb", "training-lora_sd15_12gb"]
    assert {"waits", "windows", "wan-33-frames-checkpointing", "attention", "fp16-training", "group-norm"} < rows.keys()
    assert any("imageio_ffmpeg" in missing for missing in rows["doctor"]["wrong or missing"])
    film = rows["film-exact"]
    assert film["PSNR dB of the two films"] > 60, "the same weights and noise give another film"
    assert film["ours"]["TFLOP a step"] < film["diffusers"]["TFLOP a step"]
    assert 0 < film["ours"]["share of matrix peak"] < 1
    plain, again = (rows[f"wan-33-frames{kind}"]["TFLOP a step"] for kind in ("", "-checkpointing"))
    assert 1.2 * plain < again < 2 * plain, "the work is not counted that is done anew"
    assert rows["fp16-training"]["scales every 1 steps"][-1] < 2**16
    assert rows["film-compiled"]["largest difference of latents"] < 1e-3
    table = (tmp_path / "gpu.md").read_text()
    assert "| film-exact | ours, sampling s, median | " in table and "dry run" in table.splitlines()[0]


def test_a_row_that_fails_does_not_stop_the_others(tmp_path: Path, machine: Machine) -> None:
    def broken(_: Machine) -> Mapping[str, Any]:
        raise RuntimeError("no such kernel")

    rows = [Row("broken", 1, broken), Row("whole", 1, lambda _: {"found": 2.0})]
    first, second = run_rows(rows, machine, tmp_path / "lines", start=0, seconds=0)
    assert first["error"] == "RuntimeError: no such kernel" and second["found"] == 2
    assert [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()] == [first, second]
    assert "| broken | error | RuntimeError: no such kernel |" in as_text([first, second], where="here")


def test_rows_that_would_end_too_late_are_told(tmp_path: Path) -> None:
    machine = Machine(torch.device("cpu"), torch.float32, dry=False)
    rows = [Row(name, seconds, lambda _: {"found": 1}) for name, seconds in (("long", 60.0), ("short", 5.0))]
    long, short = run_rows(rows, machine, tmp_path / "lines", start=time.perf_counter(), seconds=20)
    assert "expected to take 60 s" in long["left out"] and "found" not in long
    assert short["found"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(main, ["--out", str(tmp_path)]) == 2
    assert "device 'cuda:0'" in capsys.readouterr().err


def test_rows_of_other_names_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(main, ["--dry-run", "--rows", "rates,wann", "--out", str(tmp_path)]) == 2
    assert "error: rows wann" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_the_script_takes_diffusers_from_the_folder_and_all_else_as_it_is(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    command = ["sh", str(ROOT / "scripts" / "benchmark_gpu.sh"), "wheels", "out", "--rows", "rates"]
    surroundings = {**os.environ, "PYTHON": str(python), "NOTES": str(tmp_path / "notes"), "PYTHONPATH": ""}
    subprocess.run(command, cwd=tmp_path, env=surroundings, check=True)
    install, run = ((tmp_path / "notes").read_text()).splitlines()
    site = install.partition("--target ")[2].partition(" ")[0]
    flags = "--quiet --no-index --no-deps --no-compile --find-links wheels"
    assert install == f"|-m pip install {flags} --target {site} diffusers"
    assert run == f"{site}:{ROOT}|-m cdvideo.evaluation.benchmark_gpu --out out --rows rates"
    assert not Path(site).exists()
