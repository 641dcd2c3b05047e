"""scripts/evaluate.py study from end to end, on tiny models: two methods, two concepts, a few steps."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from cdvideo.base.loader import load_base
from cdvideo.cli import run_main
from cdvideo.evaluation.identity.model import IdentityNet, save_identity
from cdvideo.evaluation.judge.model import Judge, save_judge
from cdvideo.evaluation.main import main
from cdvideo.motion.files import save_motion
from cdvideo.motion.modules import MotionModules

SMALL = """# A tiny study.
choose_on: [dog]
report_on: [robot]
training: [steps=2, optim.batch_size=1, data.variants=1, semantic.phrases=2]
methods:
  - {name: base, source: base}
  - {name: drawn, source: renders}
  - {name: plain, settings: [semantic.weight=0, preserve.prior_weight=1, preserve.prior_images=2]}
  - {name: spl, settings: [semantic.weight=1], checkpoints: [1]}
against: plain
prompts: 2
seeds: 2
steps: 1
dtype: fp32
"""


@pytest.fixture
def flags(tmp_path: Path, tiny_base_folder: Path, sprites: Path) -> list[str]:
    """The study's file and all that it needs, with an untrained judge."""
    (tmp_path / "study.yaml").write_text(SMALL)
    save_judge(Judge(widths=(4, 4, 4, 8), blocks=(0, 0, 0, 1), side=32), tmp_path / "judge")
    save_identity(IdentityNet(widths=(4, 4, 4, 8), blocks=(0, 0, 0, 1), width=6, side=32), tmp_path / "identity")
    paths = {"base": tiny_base_folder, "sprites": sprites} | {n: tmp_path / n for n in ("judge", "identity")}
    paths |= {"out": tmp_path / "out", "cache": tmp_path / "cache"}
    given = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
    return ["study", str(tmp_path / "study.yaml"), *given, "--device", "cpu"]


def test_a_study_from_the_command_line(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(main, [*flags, "--json", str(tmp_path / "results.json")]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    table = results["tables"]["all concepts"]
    assert list(table) == ["base", "drawn", "plain", "spl"]
    assert table["spl"]["composition"]["n"] == 2 * 8 * 2
    assert table["spl"]["worn"]["of"] == "pictures, 2 concepts x 4 prompts x 2 seeds"
    assert results["tables"]["report on"]["spl"]["composition"]["n"] == 16
    assert set(results["kinds"]["report on"]["plain"]) == {
        "worn", "scene", "doing", "worn and doing", "held-out triples",
    }  # fmt: skip
    assert -1 <= table["drawn"]["identity"]["value"] <= 1.0001
    assert list(results["checkpoints"]) == ["spl"] and list(results["checkpoints"]["spl"]) == ["1", "2"]
    assert results["against"]["report on"]["spl"]["identity / plain"]["unit"] == "x"
    assert len(list((tmp_path / "cache" / "concepts").iterdir())) == 4
    low, high = table["base"]["composition"]["interval_95"]
    assert table["base"]["composition"]["value"] == low == 0 < high  # all wrong: Wilson's interval
    assert len(list((tmp_path / "cache" / "prior").rglob("*.png"))) == 2 * 2
    rows = list(csv.DictReader((tmp_path / "out" / "pictures.csv").open()))
    assert len(rows) == 5 * 2 * 8 * 2
    assert {row["setting"] for row in rows if row["kind"] == "worn"} == {"nan"}
    last = [row for row in rows if row["method"] == "spl" and row["concept"] == "robot" and row["step"] == "last"]
    right = [float(row["composition"]) for row in last]
    assert 100 * sum(right) / 16 == pytest.approx(results["tables"]["report on"]["spl"]["composition"]["value"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("data:image/webp") == 2 * (5 + 4 * 6) + 2 * 2  # and the class, before and after two methods
    assert page.count("data:image/svg+xml") == 3 + 2 + 2 * (1 + 2 * 2)
    assert "Text space, robot" in page and "Attention, plain, dog" in page
    assert "a dog, before and after spl learned the dog" in page and "Where each word is read, spl, robot" in page
    assert "class pull" in table["spl"] and "class pull" not in table["base"]
    assert page.count("<td>spl</td>") == 3 * 3
    svg = (tmp_path / "out" / "pareto-report-on.svg").read_text()
    assert "composition: all that was asked for" in svg and "<!-- spl -->" in svg
    assert "report on (robot)" in capsys.readouterr().out


def test_what_is_there_is_not_made_again(flags: list[str], tmp_path: Path) -> None:
    flags = [*flags, "choose_on=[]", "prompts=1"]
    assert run_main(main, [*flags, "--quiet"]) == 0
    first = json.loads((tmp_path / "out" / "results.json").read_text())
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.*") if path.is_file()}
    gone = sorted((tmp_path / "cache" / "pictures").glob("robot-*.npy"))[0]
    gone.unlink()
    assert run_main(main, [*flags, "--quiet"]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == first
    again = {path for path, time in made.items() if path.stat().st_mtime_ns != time and path.suffix != ".lock"}
    assert again == {gone, gone.with_suffix(".json")}

    assert run_main(main, [*flags, "--quiet", "seeds=1"]) == 0
    concepts = {path for path in made if path.name == "concept.safetensors"}
    assert len(concepts) == 2 and all(path.stat().st_mtime_ns == made[path] for path in concepts)


def test_the_same_on_films(flags: list[str], tiny_base_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base_folder, folder)
    base = load_base(str(folder), device=torch.device("cpu"))
    motion = MotionModules.for_unet(base.unet, motion_num_attention_heads=2, motion_max_seq_length=8)
    save_motion(motion, folder / "motion")
    flags[flags.index("--base") + 1] = str(folder)
    films = "films={methods: [base, drawn, plain], frames: 3}"
    assert run_main(main, [*flags, "report_on=[]", "prompts=1", "seeds=1", films, "--quiet"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    table = results["films"]["choose on"]
    assert list(table) == ["base", "drawn", "plain"]
    assert set(table["plain"]) == {"composition", "right frames", "identity", "flow", "consistency"}
    assert (
        table["plain"]["flow"]["of"] == "films, 1 concepts x 4 prompts x 1 seeds" and table["plain"]["flow"]["n"] == 4
    )
    assert "flow / base" in results["films_against"]["choose on"]["plain"]
    assert len(list((tmp_path / "out" / "films").glob("*.webp"))) == 3 * 2
    rows = list(csv.DictReader((tmp_path / "out" / "films.csv").open()))
    flow = [float(row["flow"]) for row in rows if row["method"] == "plain"]
    assert sum(flow) / 4 == pytest.approx(table["plain"]["flow"]["value"], rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["choose_on=[wolf]"], "concepts wolf: must be some of dog"),
        (["choose_on=[robot]"], "each only once"),
        (["against=nothing"], "against=nothing: must be one of base"),
        (["training=[stepz=3]"], "did you mean steps"),
        (["training=[token=abc]"], "token: is set by the study itself"),
        (["methods=[{name: a, checkpoints: [500]}]", "against="], "must be from 1 to below"),
        (["methods=[{name: a, source: base, settings: [steps=3]}]", "against="], "trains nothing"),
        (["films={methods: [none]}"], "films.methods none"),
        (["prompts=9"], "prompts=9"),
        (["--sprites", "nowhere"], "no sprites in nowhere"),
        (["films={methods: [plain]}"], "no motion modules"),
        (["another.yaml"], "2 files of settings"),
    ],
)
def test_bad_input(flags: list[str], change: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(main, [*flags, *change]) == 2
    assert message in capsys.readouterr().err
