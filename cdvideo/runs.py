"""A run's folder: what was asked (config.yaml), what happened (metrics.jsonl), what came out. Imports no torch.

Nothing is ever half written: a result appears under its name only once it is whole.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from cdvideo.errors import UserError

ABANDONED = 24 * 3600  # seconds after which a temporary file is one that a process left behind when it was killed


_PARTS = ".{}.????????.part{}"  # the temporary names of a file, by its stem and its suffix


@dataclass(frozen=True, slots=True)
class Run:
    """One run's own folder, locked against other processes until `close` or the end of the process."""

    folder: Path
    lock: FileLock

    def log(self, metrics: Mapping[str, float | int | str]) -> None:
        """Appends one line to metrics.jsonl.

        Raises:
            ValueError: For a number that is not finite; the caller stops such a run before it logs.
        """
        line = json.dumps(dict(metrics), allow_nan=False)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def write_text(self, name: str, text: str) -> Path:
        """Writes a text file into the folder, whole or not at all; returns its path."""
        path = self.folder / name
        with atomic_path(path) as part:
            part.write_text(text, encoding="utf-8")
        return path

    def close(self) -> None:
        """Frees the folder for other processes."""
        self.lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def create_run(parent: Path, name: str, *, resume: bool = False) -> Run:
    """Makes and locks a folder for a run.

    Args:
        parent: Where runs are kept, for instance `runs/`; made where it is missing.
        name: The run's name. Where parent/name holds something already, the new folder is parent/name-2, then name-3,
            ..., so that earlier results stay whole.
        resume: Take the newest existing folder of that name instead of making one (`open_run` takes one by its path).

    Raises:
        UserError: For a name that is no plain file name, a folder that can not be written, a run to resume that does
            not exist, or one that another process is writing.
    """
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(f"run name {name!r}", allowed="a plain file name", do="choose a name without slashes")
    ensure_writable(parent)
    return open_run(_newest_folder(parent, name) if resume else _make_folder(parent, name))


def open_run(folder: Path) -> Run:
    """Locks the folder of a run that exists, and clears away what a process that was killed left half written there.

    Raises:
        UserError: For a folder that does not exist, can not be written, or is being written by another process.
    """
    if not folder.is_dir():
        raise _no_run(folder.parent, folder.name)
    ensure_writable(folder)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(
            f"{folder} is in use by another process",
            allowed="one writer for each run",
            do="wait until it has ended, or start a run of another name",
        ) from error
    for part in folder.glob(_PARTS.format("*", "*")):  # nobody else writes here
        part.unlink(missing_ok=True)
    return Run(folder=folder, lock=lock)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; when the block ends well, the file made there takes the name `path`.

    A failure or an interrupt removes the temporary file and leaves an earlier `path` as it was. So does a loss of
    power, since the bytes are on the disk before the name is. The temporary name keeps the suffix, for writers that
    choose the format by it. Temporary files of that name that are a day old are what killed processes left, and go.

    Raises:
        UserError: When the folder can not be made or written.
    """
    ensure_writable(path.parent)
    for left in path.parent.glob(_PARTS.format(glob.escape(path.stem), glob.escape(path.suffix))):
        with suppress(FileNotFoundError):  # another process clears away too
            if left.stat().st_mtime < time.time() - ABANDONED:
                left.unlink()
    part = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def legal_name(text: str) -> str:
    """A text as a file's name on every system: Windows forbids some characters, some names, and dots at the end."""
    name = re.sub(r'[<>:"/\\|?*\x00-\x1f]+', "-", text).rstrip(". ")
    device = re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name, re.IGNORECASE)
    return f"_{name}" if device or not name else name


def ensure_writable(folder: Path) -> None:
    """Makes the folder where it is missing, and tries that files can be made in it.

    Raises:
        UserError: When they can not.
    """
    probe = folder / f".write-test-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"can not write into {folder}: {error.strerror}",
            allowed="a folder that you may write, on a disk with free space",
            do="name another folder with --out",
        ) from error


def _numbered(parent: Path, name: str) -> dict[int, Path]:
    """The folders name, name-2, name-3, ... that exist, by number."""
    folders = {}
    for path in parent.iterdir():
        match = re.fullmatch(re.escape(name) + r"(?:-(\d+))?", path.name)
        if match and path.is_dir():
            folders[int(match[1] or 1)] = path
    return folders


def _make_folder(parent: Path, name: str) -> Path:
    if (parent / name).is_dir() and not any((parent / name).iterdir()):
        return parent / name
    for number in itertools.count(max(_numbered(parent, name), default=0) + 1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:  # made by another process in this very moment
            continue
        return folder
    raise AssertionError("there is always a next number")


def _newest_folder(parent: Path, name: str) -> Path:
    folders = _numbered(parent, name)
    if not folders:
        raise _no_run(parent, name)
    return folders[max(folders)]


def _no_run(parent: Path, name: str) -> UserError:
    runs = ", ".join(sorted(path.name for path in parent.glob("*") if path.is_dir())) or "none yet"
    return UserError(
        f"no run {name!r} in {parent} to resume",
        allowed=f"the name of a run that was started ({runs})",
        do="start it without --resume, or correct --out",
    )
