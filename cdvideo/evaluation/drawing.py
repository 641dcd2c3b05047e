"""The pictures that are measured: drawn in batches, and kept in a folder so that an interrupted report goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cdvideo.base.loader import Base
from cdvideo.errors import UserError
from cdvideo.evaluation.config import ReportConfig
from cdvideo.evaluation.prompts import Ask
from cdvideo.motion.modules import MotionModules
from cdvideo.runs import atomic_path
from cdvideo.sampling.image import sample_images
from cdvideo.sampling.video import sample_video, to_uint8

Pictures = NDArray[np.uint8]  # images_BHWC, or films_BFHWC


def open_store(folder: Path, settings: Mapping[str, Any], *, resume: bool) -> Path:
    """The folder for drawn pictures; emptied of earlier ones unless they are to be used again.

    Raises:
        UserError: to resume, but the earlier pictures were drawn with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, text = folder / "settings.json", json.dumps(dict(settings), indent=2)
    if resume and file.exists() and file.read_text() != text:
        earlier = json.loads(file.read_text())
        other = sorted(key for key in {*earlier, *settings} if earlier.get(key) != settings.get(key))
        raise UserError(
            f"{folder} holds pictures drawn with another {', '.join(other)}",
            allowed="--resume with the settings of the interrupted call",
            do="give the same settings, another --out, or leave out --resume to begin anew",
        )
    if not resume:
        for stale in folder.glob("*.npy"):
            stale.unlink()
    with atomic_path(file) as part:
        part.write_text(text)
    return folder


def draw_stills(
    base: Base, asks: Sequence[Ask], seeds: Sequence[int], store: Path, name: str, config: ReportConfig
) -> Pictures:
    """One picture for each prompt and seed beside it: images_BHWC."""
    batch = config.batch or (16 if base.device.type == "cpu" else 150)

    def draw(start: int) -> Pictures:
        part = slice(start, start + batch)
        prompts = [ask.prompt for ask in asks[part]]
        options: dict[str, Any] = {"steps": config.steps, "guidance": config.guidance}
        return to_uint8(sample_images(base, prompts, seeds=seeds[part], **options))

    starts = range(0, len(asks), batch)
    return np.concatenate(list(_draw_all(draw, starts, store, f"{name}-b{batch}", quiet=config.quiet)))


def draw_films(
    base: Base, motion: MotionModules, asks: Sequence[Ask], store: Path, name: str, config: ReportConfig
) -> Pictures:
    """One film for each prompt, seeds 0, 1, 2, ...: films_BFHWC."""

    def draw(index: int) -> Pictures:
        options: dict[str, Any] = {"frames": config.frames, "steps": config.steps, "guidance": config.guidance}
        return sample_video(base, motion, asks[index].prompt, seed=index, **options)

    return np.stack(list(_draw_all(draw, range(len(asks)), store, name, quiet=config.quiet)))


def _draw_all(
    draw: Callable[[int], Pictures], starts: Sequence[int], store: Path, name: str, *, quiet: bool
) -> Sequence[Pictures]:
    """Draws what is not in the store yet, and returns all of it."""
    parts = []
    for start in tqdm(starts, desc=name, disable=quiet):
        file = store / f"{name}-{start:05d}.npy"
        if not file.exists():
            with atomic_path(file) as part:
                np.save(part, draw(start))
        parts.append(np.load(file))
    return parts
