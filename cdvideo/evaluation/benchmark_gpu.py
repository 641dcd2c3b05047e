"""All that is to be known of a GPU, by one process: rows in order of worth, each written as soon as it is known.

    python -m cdvideo.evaluation.benchmark_gpu --out runs/benchmark

Weights are random, of the real sizes. With --dry-run every row runs on the CPU, with models of a few weights: that
proves the rows, and measures nothing. Imports no torch before its flags are read.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdvideo.cli import run_main
from cdvideo.errors import EXIT_FAILURE, UserError
from cdvideo.runs import atomic_path, ensure_writable

if TYPE_CHECKING:
    from cdvideo.evaluation.gpu_machine import Machine, Row

SECONDS = 420.0
LINES, TABLE = "gpu.jsonl", "gpu.md"


def main(argv: Sequence[str]) -> None:
    """Runs the rows; ends with 1 where one has failed.

    Raises:
        UserError: no GPU, or rows of a name that there is not.
    """
    args = _parse(argv)
    ensure_writable(args.out)
    start = time.perf_counter()

    from cdvideo.evaluation.gpu_machine import open_machine
    from cdvideo.evaluation.gpu_rows import ROWS

    chosen = [row for row in ROWS if args.rows is None or row.name in args.rows]
    unknown = set(args.rows or ()) - {row.name for row in ROWS}
    if unknown:
        raise UserError(
            f"rows {', '.join(sorted(unknown))}",
            allowed=", ".join(row.name for row in ROWS),
            do="name some of these with --rows, separated by commas",
        )
    machine = open_machine(dry=args.dry_run)
    results = list(run_rows(chosen, machine, args.out / LINES, start=start, seconds=args.seconds))
    table = as_text(results, where=machine.where)
    with atomic_path(args.out / TABLE) as part:
        part.write_text(table, encoding="utf-8")
    print(f"\n{table}\n{time.perf_counter() - start:.0f} s; wrote {args.out / LINES} and {args.out / TABLE}")
    if any("error" in result for result in results):
        raise SystemExit(EXIT_FAILURE)


def _parse(argv: Sequence[str]) -> Namespace:
    parser = ArgumentParser(description="Measure a GPU, row by row.", allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), metavar="DIR", help="(runs/benchmark)")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="S", help="rows that would end later are left out (420)"
    )
    parser.add_argument("--rows", type=lambda text: text.split(","), metavar="A,B", help="these alone")
    parser.add_argument("--dry-run", action="store_true", help="every row on the CPU, at small sizes")
    return parser.parse_args(argv)


def run_rows(
    rows: Sequence[Row], machine: Machine, lines: Path, *, start: float, seconds: float
) -> Iterator[dict[str, Any]]:
    """What each row has found, appended to `lines` and printed at once: a row that fails tells it, and the rest go on.

    Args:
        start, seconds: on the clock of time.perf_counter; rows that are not expected to end by then are left out.
    """
    with lines.open("w", encoding="utf-8") as file:
        for row in rows:
            began = time.perf_counter()
            result: dict[str, Any] = {"row": row.name}
            if not machine.dry and began - start + row.seconds > seconds:
                result["left out"] = f"expected to take {row.seconds:.0f} s, and {began - start:.0f} s are gone"
            else:
                try:
                    result |= row.measure(machine)
                except Exception as error:  # whatever it is, it is this row's result
                    traceback.print_exc()
                    result["error"] = f"{type(error).__name__}: {str(error).strip() or 'no reason given'}"
                result |= {"row seconds": round(time.perf_counter() - began, 1), "expected": row.seconds}
            gc.collect()  # models and tracebacks hold each other in circles
            machine.clear()
            line = json.dumps(result)
            file.write(line + "\n")
            file.flush()
            print(line, flush=True)
            yield result


def as_text(results: Sequence[Mapping[str, Any]], *, where: str) -> str:
    """A table of all rows, a line for each figure."""
    told = [f"# {where}, {time.strftime('%Y-%m-%d')}", "", "| row | what | found |", "| --- | --- | --- |"]
    for result in results:
        for name, found in _flat({key: value for key, value in result.items() if key != "row"}):
            told.append(f"| {result['row']} | {name} | {_short(found)} |")
    return "\n".join(told) + "\n"


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}, ")
        else:
            yield above + name, value


def _short(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(_short(each) for each in value)
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "/").split())[:400]


if __name__ == "__main__":
    sys.exit(run_main(main))
