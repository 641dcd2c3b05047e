"""Hashes of weights, and a note of them in the user's cache, so that gigabytes are not read anew at every start."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from cdvideo.errors import UserError
from cdvideo.runs import atomic_path

logger = logging.getLogger(__name__)

NOTED_FROM = 2**28  # bytes; less is read in a fraction of a second
MOST_NOTES = 1000
SETTLED = 2.0  # seconds that a file must have been left alone: clocks of file systems tick slowly


def cache_folder() -> Path:
    """Where the system keeps what can be made again; the variable CDVIDEO_CACHE names another folder."""
    if own := os.environ.get("CDVIDEO_CACHE"):
        return Path(own)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "cdvideo"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "cdvideo"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cdvideo"


def kept_hash(files: Mapping[str, Path]) -> str:
    """16 hex digits of the SHA-256 over files, each with its name before it.

    Large files are read once: as long as their size and the times of their last change are the same, the note holds. A
    note that can not be read or written is done without.
    """
    stats = {name: path.stat() for name, path in files.items()}
    key = hashlib.sha256(json.dumps([[name, str(path.resolve())] for name, path in files.items()]).encode()).hexdigest()
    state = [[stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for stat in stats.values()]
    is_large = sum(stat.st_size for stat in stats.values()) >= NOTED_FROM
    notes = _read_notes() if is_large else {}
    noted = notes.get(key)
    if isinstance(noted, list) and len(noted) == 2 and noted[0] == state and isinstance(noted[1], str):
        return noted[1]
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(name.encode())
        _digest_file(digest, path)
    found = digest.hexdigest()[:16]
    last_change = max(max(stat.st_mtime, stat.st_ctime) for stat in stats.values())
    if is_large and last_change + SETTLED < time.time():
        notes.pop(key, None)
        _write_notes({**dict([*notes.items()][-MOST_NOTES + 1 :]), key: [state, found]})
    return found


def _notes_file() -> Path:
    return cache_folder() / "hashes.json"


def _read_notes() -> dict[str, object]:
    try:
        notes = json.loads(_notes_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return notes if isinstance(notes, dict) else {}


def _write_notes(notes: Mapping[str, object]) -> None:
    try:
        with atomic_path(_notes_file()) as part:
            part.write_text(json.dumps(notes), encoding="utf-8")
    except (OSError, UserError) as error:
        logger.debug("the hash of the weights is not noted: %s", error)


def _digest_file(digest: hashlib._Hash, file: Path) -> None:
    """Piece by piece: the whole file would be a second copy of the weights in memory."""
    with file.open("rb") as opened:
        while piece := opened.read(2**20):
            digest.update(piece)
