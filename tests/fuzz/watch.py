"""Readers called with hostile inputs: they may return, warn, or raise UserError; quickly, in little memory, and without
a file written."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from cdvideo.errors import UserError

T = TypeVar("T")
SECONDS = 5.0  # of work that a reader may take, whatever else the machine does; after five times as long it hangs
GROWTH = 500_000_000  # bytes that this process, or one that the reader starts, may grow by
_ON_LINUX = sys.platform == "linux"


class TooSlowError(BaseException):
    """No Exception, which a reader might take for what a damaged file makes of a library."""


@dataclass
class Watch:
    """Calls one reader with many inputs, and keeps what the worst of them took.

    Args:
        cases: how many inputs.
        steady: whether they are the same in each run.
        room: the folder in which there is the input, and all that a program may take for a place to write into.
    """

    name: str
    cases: int
    steady: bool
    room: Path
    refused: int = 0
    called: int = 0
    slowest: float = 0.0
    growth: int = 0

    def check(self, inputs: SearchStrategy[T], read: Callable[[T], Callable[[], object]]) -> None:
        """Fails for the first input, made as small as it can be, that the reader does not take as it should.

        Args:
            read: lays an input down, and returns the call that reads it.
        """

        @settings(
            max_examples=self.cases,
            derandomize=self.steady,
            database=None,
            deadline=None,  # `_call` has a clock of its own, which also ends what hangs
            phases=(Phase.generate, Phase.shrink),  # to explain a failure, every line would be traced
            suppress_health_check=list(HealthCheck),
        )
        @given(inputs)
        def each(value: T) -> None:
            self.call(read(value))

        each()

    def accept(self, read: Callable[[], object]) -> None:
        """Fails for an undamaged input that is not read, from which others are made."""
        result = self.call(read)
        assert not isinstance(result, UserError), result

    def call(self, read: Callable[[], object]) -> object:
        """What the reader returns, or the UserError that it raises."""
        before, self.called = _listing(self.room), self.called + 1
        with _memory() as grown, _clock() as taken, _written_files() as written:
            try:
                result = read()
            except UserError as error:
                result, self.refused = error, self.refused + 1
                assert error.allowed and error.do, "an error that does not help"
        self.slowest, self.growth = max(self.slowest, taken()), max(self.growth, grown())
        assert taken() < SECONDS, f"it took {taken():.1f} s"
        assert grown() < GROWTH, f"it grew by {grown() / 1e6:.0f} MB"
        assert not written, f"it wrote {written}"
        assert _listing(self.room) == before, "it wrote files"
        return result


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of all that lies in a folder, however deep."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            stat = os.lstat(os.path.join(place, name))
            found[os.path.join(place, name)] = (stat.st_size, stat.st_mtime_ns)
    return found


_opened: list[str] | None = None


def _hear(event: str, args: tuple[Any, ...]) -> None:
    if _opened is None or event != "open":
        return
    path, mode, flags = args
    writes = set(mode or "") & set("wax+") or (mode is None and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if writes and isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path) not in (os.devnull, _CLEAR):
        _opened.append(os.fsdecode(path))


sys.addaudithook(_hear)  # which can not be taken away again, so it is told when to listen


@contextmanager
def _written_files() -> Iterator[list[str]]:
    """The files, wherever they are, that Python opens within the block in order to write."""
    global _opened
    _opened = written = []
    try:
        yield written
    finally:
        _opened = None


@contextmanager
def _clock() -> Iterator[Callable[[], float]]:
    """The seconds of work that the block took, of this process and those it started; where the system can, a block that
    hangs is ended."""
    begun, ended = _work(), 0.0

    def ring(*_: object) -> None:
        raise TooSlowError(f"it did not end within {5 * SECONDS} s")

    can_ring = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if can_ring:
        former = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 5 * SECONDS)
    try:
        yield lambda: ended - begun
    finally:
        ended = _work()
        if can_ring:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, former)


def _work() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


_CLEAR = "/proc/self/clear_refs"


@contextmanager
def _memory() -> Iterator[Callable[[], int]]:
    """The bytes that this process grew by within the block, or that one it started had; 0 where no system tells."""
    if not _ON_LINUX:
        yield lambda: 0
        return
    grown, done = 0, threading.Event()
    Path(_CLEAR).write_text("5", encoding="ascii")  # the peak begins anew: proc(5)
    before = _status("/proc/self/status", "VmRSS")

    def look_at_children() -> None:
        nonlocal grown
        while not done.wait(0.01):
            for pid in _children():
                grown = max(grown, _status(f"/proc/{pid}/status", "VmHWM"))

    looker = threading.Thread(target=look_at_children, daemon=True)
    looker.start()
    try:
        yield lambda: grown
    finally:
        done.set()
        looker.join()
        grown = max(grown, _status("/proc/self/status", "VmHWM") - before)


def _children() -> list[str]:
    """Processes that this one has started, from when they are no copies of it any more."""
    try:
        started = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()
        return [pid for pid in started if os.readlink(f"/proc/{pid}/exe") != os.readlink("/proc/self/exe")]
    except OSError:  # a kernel without it, or one that has ended
        return []


def _status(file: str, name: str) -> int:
    """Bytes; 0 of a process that has ended."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError:
        return 0
    _, found, rest = text.partition(f"{name}:")
    return int(rest.split()[0]) * 1024 if found else 0
