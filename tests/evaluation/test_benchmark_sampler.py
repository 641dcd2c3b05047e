"""Benchmarks of films, on sides that answer at once: what is made of their answers, and of those that fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cdvideo.cli import run_main
from cdvideo.evaluation.benchmark_films import PEERS, Film, SamplerBenchmark
from cdvideo.evaluation.benchmark_main import main
from cdvideo.evaluation.benchmark_sampler import sampler, side

# In place of Python. FAILS: sides, or lengths, that do not start; ENDS: those that end at their second film.
SIDE = """
import json, os, shutil, sys
from pathlib import Path

def answer(**found):
    print(json.dumps(found), flush=True)

def among(variable):
    return bool({name, str(film["frames"])} & {*os.environ.get(variable, "").split(",")})

name, film = sys.argv[3], json.loads(sys.argv[4])
if among("FAILS"):
    answer(error="no such kernel")
    sys.exit()
dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(film["dtype"], "float32")
answer(seconds=1, peak_bytes=10, device="NVIDIA H200", threads=1, dtype=dtype, versions={})
seconds = (1 + film["frames"]) * (2 if name in ("documented", "best") else 1)
peaks = [900, 200, 300, 100]  # the first film compiles
for asked in map(json.loads, sys.stdin):
    if asked["do"] == "count":
        answer(flops=10**12)
        continue
    if among("ENDS") and len(peaks) < 4:
        sys.exit(3)
    shutil.copy(Path(__file__).with_name("film.npy"), asked["save"])
    peak = peaks.pop(0)
    answer(seconds=seconds, peak_bytes=peak, added_bytes=peak // 10, cuda_bytes=2 * peak)
"""


@pytest.fixture(autouse=True)
def _sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "film.npy", np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3))
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable} -S\n{SIDE}")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))


def bench(out: Path, *argv: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit code, and the groups of the results."""
    code = run_main(main, [*argv, "--pairs", "2", "--out", str(out)])
    return code, json.loads((out / f"results-{argv[0]}.json").read_text())["groups"]


@pytest.mark.parametrize("fails", ["balanced", "documented"])
def test_a_side_that_does_not_start_is_a_row_beside_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    monkeypatch.setenv("FAILS", fails)
    code, (group,) = bench(tmp_path, "sampler", "--peers", "documented", "--speed", "exact,balanced")
    rows = {row["side"]: row for row in group["rows"]}
    assert code == 1 and rows.keys() == {"documented", "exact", "balanced"}
    assert rows.pop(fails) == {"side": fails, "failed": f"{fails}: no such kernel"}
    assert {name: row["seconds"]["all"] for name, row in rows.items()} == {
        name: [34, 34] if name == "documented" else [17, 17] for name in rows
    }
    assert ("times_faster" in rows["exact"]) is ("documented" in rows)
    assert f"{fails}: no such kernel |" in (tmp_path / "results-sampler.md").read_text()


def test_nothing_that_failed_is_exit_code_0(tmp_path: Path) -> None:
    code, (group,) = bench(tmp_path, "sampler", "--peers", "documented")
    assert code == 0 and [row["side"] for row in group["rows"]] == ["documented", "exact"]
    assert group["rows"][1]["times_faster"]["all"] == [2, 2]


def test_a_side_that_ends_midway_costs_its_own_group_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENDS", "documented")
    code, (first, second) = bench(tmp_path, "sampler")
    assert code == 1 and first["failed"] == "documented: ended with code 3"
    assert [row["seconds"]["median"] for row in second["rows"]] == [34, 17]


def test_where_nothing_runs_the_group_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILS", "best,exact")
    code, (group,) = bench(tmp_path, "sampler", "--peers", "best")
    assert code == 1 and all(f"{name}: " in group["failed"] for name in ("best", "exact"))
    assert [row["side"] for row in group["rows"]] == ["best", "exact"]


def test_results_are_written_after_each_peer(tmp_path: Path) -> None:
    def interrupt(line: str) -> None:
        if PEERS["best"] in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler(SamplerBenchmark(peers="documented,best", pairs=2, out=tmp_path), interrupt)
    (group,) = json.loads((tmp_path / "results-sampler.json").read_text())["groups"]
    assert group["against"] == PEERS["documented"] and len(group["rows"]) == 2


def test_memory_of_the_first_film_does_not_count_for_runs() -> None:
    with side("exact", Film()) as one:
        assert (one.run_bytes, one.added_bytes, one.cuda_bytes) == (0, None, None)
        for seed in range(3):
            one.run(seed)
    assert (one.run_bytes, one.added_bytes, one.cuda_bytes) == (300, 30, 600), "the most over runs"
    assert one.peak_bytes == 900


@pytest.mark.parametrize(("dtype", "told"), [("bf16", True), ("fp16", True), ("fp32", False)])
def test_the_share_of_the_peak_is_told_of_16_bits_alone(tmp_path: Path, dtype: str, told: bool) -> None:
    _, (group,) = bench(tmp_path, "sampler", "--peers", "best", "--dtype", dtype)
    assert all(("share_of_peak" in row) is told for row in group["rows"])


def test_a_peak_that_is_given_holds_for_every_dtype(tmp_path: Path) -> None:
    _, (group,) = bench(tmp_path, "sampler", "--peers", "best", "--dtype", "fp32", "--peak-tflops", "2")
    assert [row["share_of_peak"] for row in group["rows"]] == pytest.approx([1 / 68, 1 / 34], abs=1e-4)


def test_the_shortest_film_is_the_measure(tmp_path: Path) -> None:
    code, (group,) = bench(tmp_path, "length", "lengths=[4,2]")
    assert code == 0 and [row["side"] for row in group["rows"]] == ["2 frames", "4 frames"]
    assert [row["linear"]["median"] for row in group["rows"]] == pytest.approx([1, 5 / 4 / (3 / 2)], abs=1e-4)


def test_lengths_that_can_not_be_made_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAILS", "4")
    code, (group,) = bench(tmp_path, "length", "lengths=[2,4]")
    failed, made = group["rows"]
    assert code == 1 and (failed["side"], made["side"]) == ("4 frames", "2 frames")

    monkeypatch.setenv("FAILS", "2,4")
    assert run_main(main, ["length", "lengths=[2,4]", "--out", str(tmp_path)]) == 2
    assert "exact: no such kernel" in capsys.readouterr().err
