"""scripts/evaluate.py from end to end: a judge trained for a few steps, and the tiny models measured with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from cdvideo.base.loader import load_base
from cdvideo.cli import run_main
from cdvideo.evaluation.judge.model import Judge, load_judge, save_judge
from cdvideo.evaluation.main import main
from cdvideo.motion.files import save_motion
from cdvideo.motion.modules import MotionModules

CPU = torch.device("cpu")
SMALL = [
    "prompts=3",
    "seeds=2",
    "films=2",
    "frames=3",
    "steps=2",
    "scenes=3",
    "judge_scenes=3",
    "clips=1",
    "speed_runs=0",
    "batch=2",
]


@pytest.fixture
def base_folder(tmp_path: Path, tiny_base_folder: Path) -> Path:
    """The tiny base with motion modules."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base_folder, folder)
    base = load_base(str(folder), device=CPU)
    options = {"motion_num_attention_heads": 2, "motion_max_seq_length": 8, "trained_for": base.hash}
    save_motion(MotionModules.for_unet(base.unet, **options), folder / "motion")
    return folder


@pytest.fixture
def flags(tmp_path: Path, base_folder: Path, sprites: Path) -> list[str]:
    """All that `base` needs, with an untrained judge."""
    save_judge(Judge(widths=(4, 4, 4, 8), blocks=(0, 0, 0, 1), side=32), tmp_path / "judge")
    paths = {"base": base_folder, "judge": tmp_path / "judge", "sprites": sprites, "out": tmp_path / "out"}
    given = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
    return ["base", *given, "--device", "cpu", *SMALL]


def test_the_report_has_every_figure_that_was_asked_for(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(main, [*flags, "--json", str(tmp_path / "figures.json")]) == 0
    results = json.loads((tmp_path / "figures.json").read_text())
    figures = {(figure["part"], figure["name"]): figure for figure in results["figures"]}
    stills = "Stills of held-out triples"
    assert figures[stills, "all three"]["n"] == 6
    assert figures[stills, "all three"]["asked"] == "at least 75 %"
    assert figures[stills, "all three"]["method"] == "Wilson"
    assert figures["Stills of triples that the base was trained on", "subject"]["asked"] == "at least 95 %"
    assert figures["The autoencoder", "PSNR"]["value"] < 29
    assert figures["The autoencoder", "PSNR"]["passed"] is False
    assert figures["Size and speed", "size of its folder"]["passed"] is True
    assert figures["Three unknown words in the prompt", "points lost"]["n"] == 3
    assert figures["Films", "all three right in 3 of 3 frames"]["n"] == 2
    assert figures["Films", "flow magnitude against real clips"]["value"] > 0
    assert figures["Films", "settings whose flow is 0.6 to 1.6 x"]["asked"] == ""
    assert 0 < figures["Films", "subject consistency"]["value"] <= 1
    assert len([figure for figure in results["figures"] if figure["passed"] is not None]) == 21
    assert sum(row["films"] for row in results["tables"]["Flow magnitude, by setting"].values()) == 2

    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("data:image/webp") == 3 + 2
    assert len(list((tmp_path / "out" / "films").glob("*.webp"))) == 2
    assert "wrote" in capsys.readouterr().out


def test_an_interrupted_report_goes_on_to_the_same_figures(flags: list[str], tmp_path: Path) -> None:
    flags = [*flags, "prompts=2", "films=1", "frames=2", "steps=1", "scenes=2"]
    assert run_main(main, [*flags, "--quiet"]) == 0
    first = json.loads((tmp_path / "out" / "results.json").read_text())
    kept, lost = (
        tmp_path / "out" / "pictures" / "film-00000.npy",
        tmp_path / "out" / "pictures" / "heldout-b2-00002.npy",
    )
    time_kept = kept.stat().st_mtime_ns
    lost.unlink()
    assert run_main(main, [*flags, "--quiet", "--resume"]) == 0
    assert lost.exists() and kept.stat().st_mtime_ns == time_kept
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == first

    assert run_main(main, [*flags, "--quiet"]) == 0
    assert kept.stat().st_mtime_ns != time_kept


def test_no_resuming_with_other_settings(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(main, [*flags, "--quiet"]) == 0
    assert run_main(main, [*flags, "steps=3", "--quiet", "--resume"]) == 2
    assert "drawn with another steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["prompts=0"], "prompts=0: must be from 1"),
        (["prompts=100000"], "all held-out ones"),
        (["--sprites", "nowhere"], "no sprites in nowhere"),
        (["--judge", "nowhere"], "no judge in nowhere"),
        (["--base", "nowhere"], "nowhere"),
        (["framez=3"], "did you mean"),
    ],
)
def test_bad_input(flags: list[str], change: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(main, [*flags, *change]) == 2
    assert message in capsys.readouterr().err


def test_a_base_without_motion_is_measured_without_films(flags: list[str], base_folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(base_folder / "motion")
    assert run_main(main, [*flags, "--quiet"]) == 2
    assert run_main(main, [*flags, "films=0", "--quiet"]) == 0
    parts = {figure["part"] for figure in json.loads((tmp_path / "out" / "results.json").read_text())["figures"]}
    assert "Films" not in parts and "Stills of held-out triples" in parts


@pytest.mark.slow
def test_the_seconds_of_animate(flags: list[str], tmp_path: Path) -> None:
    assert run_main(main, [*flags, "speed_runs=1", "--quiet"]) == 0
    figures = json.loads((tmp_path / "out" / "results.json").read_text())["figures"]
    (seconds,) = [figure for figure in figures if figure["name"].startswith("animate.py")]
    assert seconds["value"] > 0.5 and seconds["asked"] == "at most 30 s"


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["--nothing"]])
def test_no_command(argv: list[str]) -> None:
    assert run_main(main, argv) == 2


def test_a_judge_from_the_command_line(sprites: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "judge"
    small = [
        "scenes=12",
        "check_scenes=4",
        "workers=1",
        "dtype=fp32",
        "widths=[4,4,4,8]",
        "blocks=[0,0,0,0]",
        "side=32",
    ]
    small += ["loop.steps=2", "loop.batch=4", "loop.warmup=1", f"cache={tmp_path / 'stills'}"]
    argv = ["train-judge", "--sprites", str(sprites), "--out", str(out), "--device", "cpu", *small]
    assert run_main(main, argv) == 0
    assert {path.name for path in out.iterdir()} >= {"judge.safetensors", "training.json", "README.md"}
    assert load_judge(out, device=CPU).side == 32
    assert "renders (n = 2): subject" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--minutes", "0"], "--minutes 0"),
        (["--vae", "nowhere"], "no VAE in nowhere"),
        (["side=20"], "side=20: must be a multiple of 16"),
        (["--sprites", "nowhere"], "no sprites in nowhere"),
    ],
)
def test_bad_input_for_the_judge(
    change: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train-judge", "--out", str(tmp_path / "judge"), f"cache={tmp_path / 'stills'}", "workers=1", *change]
    assert run_main(main, argv) == 2
    assert message in capsys.readouterr().err
