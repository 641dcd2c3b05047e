"""The doctor: on this machine, on one where things are broken, and in its table of versions."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cdvideo import doctor
from cdvideo.cli import run_main
from cdvideo.doctor import Finding, examine, main, tried, write_and_read

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    return {finding.name: finding for finding in examine()}


def test_everything_that_the_tests_need_is_in_order(findings: dict[str, Finding]) -> None:
    assert [finding for finding in findings.values() if finding.state in ("missing", "broken")] == []
    for name in ("torch", "cpu", "SDPA cpu float32", "SDPA cpu bfloat16", "mp4", "gif", "webp", "embedded base"):
        assert findings[name].state == "ok"
    assert findings["torch"].detail == torch.__version__
    assert re.fullmatch(r"without --device and --dtype: (cpu, float32|cuda:0, b?float16)", findings["auto"].detail)
    assert re.search(r"\d+ cores, [\d.]+ GB memory, [\d.]+ GB free", findings["cpu"].detail)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_xformers_is_not_asked_for_without_a_gpu(findings: dict[str, Finding]) -> None:
    assert findings["xformers"].state == findings["cuda"].state == "unused"


@pytest.mark.gpu
def test_every_gpu_is_tried(findings: dict[str, Finding]) -> None:
    assert findings["cuda:0"].state == findings["SDPA cuda:0 float16"].state == "ok"


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(main, ["--json", str(tmp_path / "doctor.json")]) == 0
    said = capsys.readouterr().out
    assert said.endswith("\nall in order\n")
    written = json.loads((tmp_path / "doctor.json").read_text())
    assert all(finding["name"] in said and finding["detail"] in said for finding in written)


def test_an_old_and_an_absent_package_are_told_with_their_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", {"numpy": "99.0", "no-such-package": "1.0"})
    assert run_main(main, []) == 1
    said = capsys.readouterr().out
    assert re.search(r"missing +numpy +[\d.]+, at least 99\.0 is needed\n +-> pip install 'numpy>=99\.0'", said)
    assert re.search(r"missing +no-such-package +not installed\n +-> pip install 'no-such-package>=1\.0'", said)
    assert said.endswith("to be mended: numpy, no-such-package\n")


def test_it_speaks_without_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; from cdvideo.doctor import main; main([])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "torch can not be imported" in done.stdout and "no torch here" in done.stdout
    assert (done.returncode, done.stderr) == (1, "")


def test_a_film_that_does_not_come_back_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cdvideo.media import export

    whole = export.write_video
    monkeypatch.setattr(export, "write_video", lambda frames, *rest, **options: whole(frames[:5], *rest, **options))
    with pytest.raises(ValueError, match=r"\(5, 64, 64, 3\) came back"):
        write_and_read(tmp_path / "film.gif")


def test_what_a_trial_raises_is_the_finding() -> None:
    def trial() -> str:
        raise OSError("libsomething.so: no such file\nand more")

    expected = Finding("codecs", "mp4", "broken", "OSError: libsomething.so: no such file", "mend it")
    assert tried("codecs", "mp4", trial, mend="mend it") == expected


def test_versions_are_those_of_the_project_file() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    stated = dict(re.findall(r'^\s*"([\w-]+)>=([\d.]+)"', text, re.MULTILINE))
    assert stated == doctor.REQUIRED
    for name, (least, extra, _) in doctor.OPTIONAL.items():
        assert re.search(rf'^{extra} = \[.*"{name}>={re.escape(least)}"', text, re.MULTILINE)


@pytest.fixture
def wrong_torchvision(tmp_path: Path) -> dict[str, str]:
    """An environment with a torchvision that was built for another torch."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    about = tmp_path / "torchvision-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1.0\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def test_a_torchvision_that_does_not_fit_is_told(wrong_torchvision: dict[str, str], tmp_path: Path) -> None:
    minor = int(torch.__version__.split(".")[1]) + 15
    line = f"pip install 'torchvision==0.{minor}.*', or pip uninstall torchvision"
    said = f"torchvision 0.1.0 does not fit torch {torch.__version__.partition('+')[0]}"
    for script, code in (("doctor.py", 1), ("animate.py", 2)):
        arguments = [] if script == "doctor.py" else ["--prompt", "a dog"]
        done = subprocess.run(
            [sys.executable, ROOT / "scripts" / script, *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=wrong_torchvision,
        )
        told = done.stdout + done.stderr
        assert said in told and line in told and "operator torchvision::nms does not exist" in told, told
        assert done.returncode == code and "Traceback" not in told
