"""The settings of a conversion (no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cdvideo.config import as_path, check


def parse_files(text: str) -> tuple[tuple[Path, float], ...]:
    """Files with their weights: "a.safetensors:0.8,b.safetensors" is a at 0.8 and b at 1."""
    return tuple(_parse_file(name.strip()) for name in text.split(",") if name.strip())


def _parse_file(name: str) -> tuple[Path, float]:
    path, _, weight = name.rpartition(":")
    if not path:  # a file may be called 5
        return Path(name).expanduser(), 1.0
    try:
        strength = float(weight)
    except ValueError:  # no weight: a plain path, perhaps with a drive's colon in it
        path, strength = name, 1.0
    return as_path(path), strength


def check_files(files: tuple[tuple[Path, float], ...]) -> list[tuple[bool, str]]:
    """For `check`: every weight must be able to have an effect."""
    return [
        (math.isfinite(weight) and weight != 0, f"{path}:{weight:g}: the weight must be a number other than 0")
        for path, weight in files
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """What to convert, and into what."""

    file: str
    """A file or a folder, ours or another's; or several, separated by commas, each with a weight if wanted
    (a.safetensors:0.8), which become one."""
    to: Literal["", "kohya", "peft", "diffusers", "textual-inversion", "custom-diffusion", "cdvideo"] = ""
    """What to write. `kohya`: a LoRA for web UIs. `diffusers`: one for `load_lora_weights`. `peft`: a folder of PEFT.
    `textual-inversion`: the tokens alone. `custom-diffusion`: what diffusers' script writes. `cdvideo`: ours."""
    inspect: bool = False
    """Say what the file is, and write nothing."""
    base: str = "tiny"
    """The base that the file was made for: "tiny", a folder in diffusers' layout, a single file, or a hub id."""
    rank: int | None = None
    """The most rank of a layer of a LoRA; null keeps all of it. The error is told."""
    token: str = ""
    """What to call the token; empty keeps its name."""
    class_word: str = ""
    """What kind of thing it is, which files from elsewhere do not say."""
    out: Path | None = None
    """The folder to write into; null is runs/converted/<name>-<to>."""
    device: str = "auto"
    quiet: bool = False

    def __post_init__(self) -> None:
        check(
            (bool(self.files), "file is empty: name a file"),
            (self.inspect or self.to != "", "nothing to do: give --to kohya (or another), or --inspect"),
            (self.rank is None or self.rank >= 1, f"rank={self.rank}: must be at least 1"),
            (
                self.rank is None or self.to in ("", "kohya", "peft", "diffusers"),
                f"rank={self.rank} with to={self.to}, which is no LoRA",
            ),
            (len(self.token.split()) <= 1, f"token={self.token}: must be one word"),
            *check_files(self.files),
        )

    @property
    def files(self) -> tuple[tuple[Path, float], ...]:
        """The files and their weights."""
        return parse_files(self.file)
