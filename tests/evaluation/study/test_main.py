from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from cdvideo.cli import run_main
from cdvideo.evaluation.main import main


def test_without_matplotlib_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec

    def without_matplotlib(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "matplotlib" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_matplotlib)
    folders = [text for name in ("out", "cache") for text in (f"--{name}", str(tmp_path / name))]
    assert run_main(main, ["study", *folders]) == 2
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
