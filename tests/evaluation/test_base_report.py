"""The base's report."""

from __future__ import annotations

import json
from pathlib import Path

from cdvideo.cli import run_main
from cdvideo.evaluation.judge.model import Judge, save_judge
from cdvideo.evaluation.main import main

SMALL = "prompts=1 seeds=1 films=0 steps=1 scenes=1 judge_scenes=1 speed_runs=1".split()


def test_a_base_that_can_not_film_is_not_timed(tiny_base_folder: Path, sprites_folder: Path, tmp_path: Path) -> None:
    save_judge(Judge(widths=(4, 4, 4, 8), blocks=(0, 0, 0, 1), side=32), tmp_path / "judge")
    paths = {"base": tiny_base_folder, "judge": tmp_path / "judge", "sprites": sprites_folder, "out": tmp_path / "out"}
    given = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
    assert run_main(main, ["base", *given, *SMALL, "--device", "cpu", "--quiet"]) == 0
    figures = json.loads((tmp_path / "out" / "results.json").read_text())["figures"]
    assert [figure["name"] for figure in figures if figure["part"] == "Size and speed"] == ["size of its folder"]
