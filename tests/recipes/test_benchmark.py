"""scripts/benchmark.py from end to end, on the tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cdvideo.cli import run_main
from cdvideo.evaluation.benchmark_main import main


def test_a_training_step_is_timed_against_its_peer(
    tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--base", str(tiny_base_folder), "--pairs", "2", "--out", str(tmp_path), "steps=20"]
    assert run_main(main, ["training-step", *flags]) == 0
    result = json.loads((tmp_path / "results-training-step.json").read_text())
    assert len(result["ratios"]) == 2 and all(0.2 < ratio < 5 for ratio in result["ratios"])
    assert result["seconds"]["asked"] > 0 and result["base"] == tiny_base_folder.name
    assert f"{result['ratio']:.3f} x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["training-step", "pairs=1"], "pairs=1"),
        (["training-step", "settings=[semantic.wieght=1]"], "semantic.weight"),
        (["memory", "steps=1"], "steps=1"),
        (["memory", "settings=[optim.btch_size=1]"], "optim.batch_size"),
        (["nothing"], "training-step"),
        ([], "training-step"),
    ],
)
def test_wrong_settings_are_told_with_exit_code_2(
    argv: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(main, argv) == 2
    assert told in capsys.readouterr().err


def test_memory_is_measured_beside_its_estimate(
    tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--base", str(tiny_base_folder), "--device", "cpu", "--dtype", "fp32", "--out", str(tmp_path)]
    settings = ["steps=4", "film_steps=4", "frames=2", "settings=[optim.batch_size=1]", "--offload"]
    assert run_main(main, ["memory", *flags, *settings]) == 0
    result = json.loads((tmp_path / "results-memory.json").read_text())
    assert (result["batch"], result["frames"], result["resolution"], result["offload"]) == (1, 2, 64, True)
    for part in ("training", "film"):
        assert 0 < result[part]["peak"] < 1e9 and result[part]["seconds_a_step"] > 0
        assert result[part]["estimate"] > max(result[part]["phases"].values()) > 0
    told = capsys.readouterr().out
    assert "training: " in told and "film: " in told and "estimated" in told


def test_a_training_that_fails_does_not_leave_its_peer_waiting(
    tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--base", str(tiny_base_folder), "--pairs", "2", "--out", str(tmp_path), "steps=20"]
    assert run_main(main, ["training-step", *flags, "settings=[optim.lr=1e30,optim.token_lr=1e30]"]) == 2
    assert "diverged" in capsys.readouterr().err and not list(tmp_path.glob("*.json"))
