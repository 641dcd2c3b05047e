"""Benchmarks of films: every side in a process of its own, runs alternating, ratios of runs that stood side by side."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from cdvideo.errors import UserError
from cdvideo.evaluation.benchmark_films import (
    PEERS,
    RANDOM_SD15,
    DecodeBenchmark,
    Film,
    FilmBenchmark,
    LengthBenchmark,
    SamplerBenchmark,
)
from cdvideo.evaluation.metrics import psnr
from cdvideo.runs import atomic_path

# Dense bf16 peaks of matrix units, in 10^12 operations a second, from NVIDIA's data sheets; by the name torch tells.
PEAK_TFLOPS = {"NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H200": 989.4, "NVIDIA A100-SXM4-80GB": 312.0}
WHERE = ("device", "threads", "dtype", "versions")
GIB = 2**30

Row = dict[str, Any]
Progress = Callable[[str], object]  # is told a line at a time


class SideError(RuntimeError):
    """A side could not do what it was asked, and says why."""


@dataclass
class Side:
    """What one side has shown so far. Bytes are peaks: `peak_bytes` of the whole process, `run_bytes` of its runs."""

    name: str
    film: Film
    process: subprocess.Popen[str]
    where: dict[str, Any] = field(default_factory=dict)
    load_seconds: float = 0.0
    first_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    run_bytes: int = 0
    added_bytes: int | None = None
    cuda_bytes: int | None = None
    flops: int | None = None
    made: list[npt.NDArray[Any]] = field(default_factory=list)
    """What each run gave: frames_FHWC, or of several films latents_BFCHW."""

    def ask(self, **request: str | int) -> dict[str, Any]:
        """Raises SideError with what the side says has gone wrong."""
        assert self.process.stdin and self.process.stdout
        if request:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"ended with code {self.process.wait()}"}
        if "error" in answer:
            raise SideError(f"{self.name}: {answer['error']}")
        return answer

    def load(self) -> None:
        """Loads, and makes a first film, which compiles what is to be compiled."""
        loaded = self.ask()
        self.where = {name: loaded[name] for name in WHERE}
        self.load_seconds, self.peak_bytes = loaded["seconds"], loaded["peak_bytes"]
        self.run(self.film.seed)
        self.first_seconds = self.seconds.pop()
        self.made.clear()
        self.run_bytes, self.added_bytes, self.cuda_bytes = 0, None, None  # what compiling took is in peak_bytes

    def run(self, seed: int) -> None:
        """Makes the film of a seed once."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "frames.npy"
            ran = self.ask(do="run", seed=seed, save=str(file))
            self.made.append(np.load(file))
        self.seconds.append(ran["seconds"])
        self.peak_bytes = max(self.peak_bytes, ran["peak_bytes"])
        self.run_bytes = max(self.run_bytes, ran["peak_bytes"])
        if ran["added_bytes"] is not None:
            self.added_bytes = max(self.added_bytes or 0, ran["added_bytes"])
        if ran["cuda_bytes"] is not None:
            self.cuda_bytes = max(self.cuda_bytes or 0, ran["cuda_bytes"])


@contextmanager
def side(name: str, film: Film) -> Iterator[Side]:
    """Starts a side and lets it load; its process ends with the block. Raises SideError where it can not."""
    command = [sys.executable, "-m", "cdvideo.evaluation.benchmark_side", name, json.dumps(dataclasses.asdict(film))]
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env={**os.environ, **quiet}, **pipes) as process:
        try:
            started = Side(name, film, process)
            started.load()
            yield started
        finally:
            process.kill()


def alternate(sides: Sequence[Side], pairs: int, progress: Progress) -> None:
    """Runs all sides `pairs` times, each round in the opposite order of the last and of another seed."""
    for index in range(pairs):
        for one in sides if index % 2 else reversed(sides):
            one.run(one.film.seed + index)
        progress(f"  {index + 1} of {pairs}: " + ", ".join(f"{one.name} {one.seconds[-1]:.2f} s" for one in sides))


def sampler(config: SamplerBenchmark, progress: Progress = print) -> dict[str, Any]:
    """Our presets against each way to use diffusers; results-sampler.json and .md in config.out."""
    require_base(config.base)
    groups: list[dict[str, Any]] = []
    for peer in config.peer_names:
        groups.append(_against(peer, config, progress))
        result = write_results("sampler", config, groups)  # after each: what is measured is not lost with the next
    return result


def _against(peer: str, config: SamplerBenchmark, progress: Progress) -> dict[str, Any]:
    """One peer and our presets. Each group loads anew, so that no more than one peer is in memory at a time."""
    progress(f"against {PEERS[peer]}")
    with ExitStack() as stack:
        sides: list[Side] = []
        failed: list[Row] = []
        for name in (peer, *config.speeds):
            try:
                sides.append(stack.enter_context(side(name, config.film)))
            except SideError as error:  # what does not run here is a finding
                progress(f"  failed: {error}")
                failed.append({"side": name, "failed": str(error)})
        if not sides:
            reasons = "; ".join(str(each["failed"]) for each in failed)
            return {"against": PEERS[peer], "failed": reasons, "rows": failed}
        try:
            alternate(sides, config.pairs, progress)
            for one in sides:
                one.flops = one.ask(do="count", seed=config.seed)["flops"]
        except SideError as error:
            progress(f"  failed: {error}")
            return {"against": PEERS[peer], "failed": str(error), "rows": failed}
        where, theirs = sides[0].where, sides[0] if sides[0].name == peer else None
        known = PEAK_TFLOPS.get(where["device"]) if where["dtype"] in ("bfloat16", "float16") else None
        rows = [row(one, theirs, peak_tflops=config.peak_tflops or known) for one in sides]
        return {"against": PEERS[peer], **where, "rows": [*rows, *failed]}


def decode(config: DecodeBenchmark, progress: Progress = print) -> dict[str, Any]:
    """Latents to frames; results-decode.json and .md in config.out."""
    require_base(config.base)
    with side("decode-diffusers", config.film) as theirs, side("decode", config.film) as own:
        alternate([theirs, own], config.pairs, progress)
        rows = [row(one, theirs) for one in (theirs, own)]
        group = {"against": "diffusers' decode_latents and postprocess_video", **theirs.where, "rows": rows}
    return write_results("decode", config, [group])


def length(config: LengthBenchmark, progress: Progress = print) -> dict[str, Any]:
    """Films of several lengths, the shortest being the measure; results-length.json and .md in config.out.

    `linear`: the time for a frame over that of the shortest film.

    Raises:
        UserError: none of them could be made.
    """
    require_base(config.base)
    rows: list[Row] = []
    where: dict[str, Any] = {}
    with ExitStack() as stack:
        running: list[Side] = []
        for frames in sorted(config.lengths):
            try:
                film = dataclasses.replace(config.film, frames=frames)
                running.append(stack.enter_context(side("exact", film)))
            except SideError as error:
                progress(f"  {frames} frames: {error}")
                rows.append({"side": f"{frames} frames", "failed": str(error)})
        if not running:
            reasons = "; ".join(str(each["failed"]) for each in rows)
            raise UserError(reasons, allowed="films that can be made", do="choose other lengths or sizes")
        alternate(running, config.pairs, progress)
        for one in running:
            shortest = running[0]
            ratios = [
                seconds / one.film.frames * shortest.film.frames / least
                for seconds, least in zip(one.seconds, shortest.seconds, strict=True)
            ]
            rows.append({**row(one, None), "side": f"{one.film.frames} frames", "linear": spread(ratios)})
            where = one.where
    return write_results("length", config, [{"against": "the shortest film", **where, "rows": rows}])


def row(one: Side, peer: Side | None, *, peak_tflops: float | None = None) -> Row:
    """What one side took; beside a peer, how many times faster it is, run by run, and how near its film is."""
    found: Row = {
        "side": one.name,
        "load_seconds": round(one.load_seconds, 2),
        "first_seconds": round(one.first_seconds, 3),
        "seconds": spread(one.seconds),
        "peak_bytes": one.peak_bytes,
        "run_bytes": one.run_bytes,
        "added_bytes": one.added_bytes,
        "cuda_bytes": one.cuda_bytes,
        "flops": one.flops,
    }
    if one.flops is not None:
        found["tflops"] = round(one.flops / median(one.seconds) / 1e12, 4)
        if peak_tflops is not None:
            found["share_of_peak"] = round(one.flops / median(one.seconds) / 1e12 / peak_tflops, 4)
    if peer is not None and peer is not one:
        found["times_faster"] = spread([theirs / own for theirs, own in zip(peer.seconds, one.seconds, strict=True)])
        found["peak_ratio"] = round(one.peak_bytes / peer.peak_bytes, 3)
        found["run_ratio"] = round(one.run_bytes / peer.run_bytes, 3)
        if one.cuda_bytes and peer.cuda_bytes:
            found["cuda_ratio"] = round(one.cuda_bytes / peer.cuda_bytes, 3)
        found["psnr_db"] = spread([_psnr(*films) for films in zip(peer.made, one.made, strict=True)])
        found["contrast"] = round(median(float(frames_FHWC.std()) for frames_FHWC in peer.made), 1)
    return found


def _psnr(first_FHWC: npt.NDArray[np.uint8], second_FHWC: npt.NDArray[np.uint8]) -> float:
    """One figure for the film, not the mean over its frames."""
    first, second = (frames.reshape(1, -1, *frames.shape[2:]) for frames in (first_FHWC, second_FHWC))
    return float(psnr(first, second)[0])


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and greatest, and all."""
    rounded = [round(value, 4) for value in values]
    return {"median": round(median(values), 4), "min": min(rounded), "max": max(rounded), "all": rounded}


def require_base(name: str) -> None:
    """Raises UserError for a base that not every side can load."""
    if name not in ("tiny", RANDOM_SD15) and not (Path(name).expanduser() / "motion").is_dir():
        raise UserError(
            f"base {name!r}",
            allowed=f"tiny, {RANDOM_SD15}, or a folder in diffusers' layout with motion modules in its folder `motion`",
            do="correct --base",
        )


def write_results(name: str, config: FilmBenchmark, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The result as JSON, and as a table for people."""
    film = dataclasses.asdict(config.film)
    film["base"] = Path(config.base).name  # no folders of a machine
    if "concepts" in film:
        film["concepts"] = ", ".join(Path(name).name for name in film["concepts"]) or None
    result = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d"),
        "film": film,
        "pairs": config.pairs,
        "groups": groups,
    }
    with atomic_path(config.out / f"results-{name}.json") as part:
        part.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    with atomic_path(config.out / f"results-{name}.md") as part:
        part.write_text(as_markdown(result), encoding="utf-8")
    return result


def as_markdown(result: Mapping[str, Any]) -> str:
    """The result as tables; a column that no row fills is left out."""
    film = ", ".join(f"{key} {value}" for key, value in result["film"].items() if value is not None)
    lines = [f"# {result['benchmark']}", "", f"{film}; {result['pairs']} pairs; {result['date']}"]
    for group in result["groups"]:
        lines += ["", f"## against {group['against']}", ""]
        if "failed" in group:
            lines.append(f"failed: {group['failed']}")
            continue
        versions = ", ".join(f"{name} {version}" for name, version in group["versions"].items())
        lines += [f"{group['device']}, {group['threads']} threads, {group['dtype']}; {versions}", ""]
        cells = [_cells(row) for row in group["rows"]]
        columns = [name for name in _COLUMNS if any(cell.get(name) for cell in cells)]
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(cell.get(name, '') for name in columns)} |" for cell in cells]
    return "\n".join(lines) + "\n"


_COLUMNS = (
    "side",
    "load, s",
    "first film, s",
    "film, s",
    "times faster",
    "time of a frame, x",
    "time, x",
    "PSNR, dB",
    "peak RSS, GiB",
    "peak RSS, x",
    "while running, GiB",
    "while running, x",
    "x",
    "added, GiB",
    "GPU peak, GiB",
    "TFLOP",
    "TFLOP/s",
    "share of peak",
    "from one by one",
    "from one concept",
    "failed",
)


def _cells(row: Row) -> dict[str, str]:
    """The row's numbers as they are shown, by column."""
    if "failed" in row:
        return {"side": row["side"], "failed": row["failed"]}
    cells = {
        "side": row["side"],
        "load, s": f"{row['load_seconds']:.1f}",
        "first film, s": f"{row['first_seconds']:.2f}",
    }
    for column, key in (
        ("film, s", "seconds"),
        ("times faster", "times_faster"),
        ("time of a frame, x", "linear"),
    ):
        if key in row:
            cells[column] = f"{row[key]['median']:.2f} [{row[key]['min']:.2f}, {row[key]['max']:.2f}]"
    for column, key in (
        ("peak RSS, GiB", "peak_bytes"),
        ("while running, GiB", "run_bytes"),
        ("added, GiB", "added_bytes"),
        ("GPU peak, GiB", "cuda_bytes"),
    ):
        if row[key] is not None:
            cells[column] = f"{row[key] / GIB:.2f}"
    if "time_ratio" in row:
        ratio = row["time_ratio"]
        cells["time, x"] = f"{ratio['median']:.3f} [{ratio['min']:.3f}, {ratio['max']:.3f}]"
        cells |= {"peak RSS, x": f"{row['peak_ratio']:.3f}", "while running, x": f"{row['run_ratio']:.3f}"}
    for column, key in (("from one by one", "from_one_by_one"), ("from one concept", "from_one_concept")):
        if key in row:
            cells[column] = f"{row[key]:.1e}"
    if row["flops"] is not None:
        cells |= {"TFLOP": f"{row['flops'] / 1e12:.3f}", "TFLOP/s": f"{row['tflops']:.3f}"}
    if "share_of_peak" in row:
        cells["share of peak"] = f"{row['share_of_peak']:.1%}"
    if "psnr_db" in row:
        near = row["psnr_db"]
        cells["PSNR, dB"] = f"{near['median']:.1f} [{near['min']:.1f}, {near['max']:.1f}]"
        cells |= {"x": f"{row.get('cuda_ratio', row['run_ratio']):.2f}"}
    return cells
