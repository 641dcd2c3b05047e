"""A watch for each fuzzed reader, in a room of its own, where all places are that a program may write into."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis.configuration import set_hypothesis_home_dir

from tests.fuzz.watch import Watch

FEW = 25  # inputs for each reader, the same ones each time, unless --fuzz-cases asks for more
_WATCHES = pytest.StashKey[list[Watch]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("fuzz")


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HOME", "TMPDIR", "TMP", "TEMP", "XDG_CACHE_HOME", "CDVIDEO_CACHE", "LOCALAPPDATA"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


@pytest.fixture
def watch(room: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    set_hypothesis_home_dir(tmp_path_factory.getbasetemp() / "hypothesis")
    cases = request.config.getoption("--fuzz-cases")
    watch = Watch(request.node.name.removeprefix("test_"), cases or FEW, cases is None, room)
    yield watch
    request.config.stash.setdefault(_WATCHES, []).append(watch)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The figure for each reader, after a long round."""
    watches = config.stash.get(_WATCHES, [])
    if config.getoption("--fuzz-cases") is None or not watches:
        return
    terminalreporter.section("fuzzed readers")
    for each in watches:
        terminalreporter.write_line(
            f"{each.name:32} {each.called:6} calls, {each.refused:6} refused, slowest {each.slowest:.2f} s, "
            f"growth {each.growth / 1e6:.0f} MB"
        )
