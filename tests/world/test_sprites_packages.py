"""The releases that the world is drawn with."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cdvideo.errors import UserError
from cdvideo.world import sprites
from cdvideo.world.sprites import FLUENT_PACKAGE, NOTO_PACKAGE, WORDS_PACKAGE, Package, check_package, fetch_sprites


def test_every_release_is_fixed() -> None:
    for package in (FLUENT_PACKAGE, NOTO_PACKAGE, WORDS_PACKAGE):
        assert package.version and len(package.sha256) == 64


def test_other_bytes_are_told(tmp_path: Path) -> None:
    file = tmp_path / "a.tgz"
    file.write_bytes(b"drawings")
    package = Package("drawings", "1.0", hashlib.sha256(b"drawings").hexdigest())
    assert check_package(file, package) == file
    file.write_bytes(b"other drawings")
    with pytest.raises(UserError, match=r"drawings 1\.0 has other bytes"):
        check_package(file, package)


def test_the_clients_are_asked_for_that_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def absent(command: Any, **_: Any) -> Any:
        asked.append(command[-1])
        raise subprocess.CalledProcessError(1, command, stderr="no such release\n")

    monkeypatch.setattr(sprites.subprocess, "run", absent)
    with pytest.raises(UserError, match=r"can not be fetched \(no such release\)"):
        fetch_sprites(tmp_path)
    assert asked == [f"{FLUENT_PACKAGE.name}@{FLUENT_PACKAGE.version}"]
