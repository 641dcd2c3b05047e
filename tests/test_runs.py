from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cdvideo.errors import UserError
from cdvideo.runs import atomic_path, create_run, ensure_writable, open_run


def test_a_run_makes_its_folder(tmp_path: Path) -> None:
    with create_run(tmp_path / "deep" / "runs", "rex") as run:
        assert run.folder == tmp_path / "deep" / "runs" / "rex"
        assert run.folder.is_dir()


def test_earlier_results_stay_whole(tmp_path: Path) -> None:
    first = create_run(tmp_path, "rex")
    first.write_text("result.txt", "mine")
    folders = [create_run(tmp_path, "rex").folder.name for _ in range(2)]
    assert folders == ["rex-2", "rex-3"]
    assert (first.folder / "result.txt").read_text() == "mine"


def test_an_empty_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "rex").mkdir()
    assert create_run(tmp_path, "rex").folder.name == "rex"


def test_numbers_only_grow(tmp_path: Path) -> None:
    (tmp_path / "rex-7").mkdir()
    (tmp_path / "rex-file-9").mkdir()
    (tmp_path / "rexy-9").mkdir()
    assert create_run(tmp_path, "rex").folder.name == "rex-8"


def test_resume_takes_the_newest(tmp_path: Path) -> None:
    for _ in range(10):
        create_run(tmp_path, "rex").close()
    with create_run(tmp_path, "rex", resume=True) as run:
        assert run.folder.name == "rex-10"


def test_an_older_run_is_opened_by_its_path(tmp_path: Path) -> None:
    for _ in range(2):
        create_run(tmp_path, "rex").close()
    with open_run(tmp_path / "rex") as run:
        assert run.folder == tmp_path / "rex"
        with open_run(tmp_path / "rex-2") as other:
            assert other.folder == tmp_path / "rex-2"
    with pytest.raises(UserError, match=r"no run 'rex-3'.*\n.*\(rex, rex-2\)"):
        open_run(tmp_path / "rex-3")
    with pytest.raises(UserError, match=r"no run 'rex'.*\n.*\(none yet\)"):
        open_run(tmp_path / "nowhere" / "rex")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rex", "rex-2"]


def test_resume_needs_a_run(tmp_path: Path) -> None:
    create_run(tmp_path, "max").close()
    with pytest.raises(UserError, match=r"no run 'rex'.*\n.*max"):
        create_run(tmp_path, "rex", resume=True)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp"])
def test_names_are_plain(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="run name"):
        create_run(tmp_path, name)


def test_one_writer_for_each_run(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from cdvideo.runs import create_run;"
        "create_run(pathlib.Path(sys.argv[1]), 'rex', resume=True)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = create_run(tmp_path, "rex")
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "in use by another process" in refused.stderr
    run.close()
    subprocess.run(command, check=True)


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib; from cdvideo.runs import create_run;"
        "run = create_run(pathlib.Path(sys.argv[1]), 'rex'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    create_run(tmp_path, "rex", resume=True).close()


def test_metrics_are_one_json_object_a_line(tmp_path: Path) -> None:
    with create_run(tmp_path, "rex") as run:
        run.log({"step": 1, "loss": 0.5, "phase": "warm"})
        run.log({"step": 2, "loss": 0.25})
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.5, "phase": "warm"},
        {"step": 2, "loss": 0.25},
    ]


def test_metrics_must_be_finite(tmp_path: Path) -> None:
    with create_run(tmp_path, "rex") as run, pytest.raises(ValueError, match="JSON compliant"):
        run.log({"loss": float("nan")})
    assert not (run.folder / "metrics.jsonl").exists()


def test_write_text_replaces(tmp_path: Path) -> None:
    with create_run(tmp_path, "rex") as run:
        run.write_text("config.yaml", "old")
        path = run.write_text("config.yaml", "new, März")
    assert path.read_text(encoding="utf-8") == "new, März"


def test_atomic_path_makes_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "film.mp4"
    with atomic_path(path) as part:
        assert part.parent == path.parent
        assert part.suffix == ".mp4"
        part.write_bytes(b"film")
        assert not path.exists()
    assert path.read_bytes() == b"film"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_path_leaves_the_earlier_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(b"earlier")
    with pytest.raises(error), atomic_path(path) as part:
        part.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_folders_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for attempt in (
        lambda folder: create_run(folder, "rex"),
        lambda folder: atomic_path(folder / "film.mp4").__enter__(),
        ensure_writable,
    ):
        with pytest.raises(UserError, match="can not write into .*file/deep: Not a directory"):
            attempt(tmp_path / "file" / "deep")


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (happened.append("fsync"), real_sync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (happened.append("replace"), real_replace(a, b)))
    with atomic_path(tmp_path / "a.txt") as part:
        part.write_text("whole")
    assert happened == ["fsync", "replace"] and (tmp_path / "a.txt").read_text() == "whole"


def test_what_killed_processes_left_is_cleared_away(tmp_path: Path) -> None:
    """In a run's folder at once, since it is locked; elsewhere another process may be writing, for a day at most."""
    run, old, new = tmp_path / "run", tmp_path / ".a.01234567.part.txt", tmp_path / ".a.89abcdef.part.txt"
    run.mkdir()
    torn = run / ".state.01234567.part.safetensors"
    others = [tmp_path / ".other.01234567.part.txt", tmp_path / ".a.part.txt", tmp_path / "a.01234567.part.txt"]
    for file in (old, new, torn, *others):
        file.write_text("torn")
    for file in (old, *others):
        os.utime(file, (0, 0))
    with atomic_path(tmp_path / "a.txt") as part:
        part.write_text("whole")
    open_run(run).close()
    assert not old.exists() and not torn.exists()
    assert new.exists() and all(file.exists() for file in others)
