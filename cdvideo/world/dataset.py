"""Render the world once into memory-mapped arrays: stills, subject masks and clips, with captions and factor labels.

Item i of a split depends on the seed, the split and i alone, so the result is the same for any number of processes.
Work is cut into chunks; a chunk is done when its label file stands, so an interrupted rendering goes on where it was.
What a split was rendered with stands beside it; other settings render it anew.
Imports no torch, so that worker processes start fast.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cdvideo.runs import atomic_path
from cdvideo.world.sprites import Sprites, load_sprites

Split = Literal["train", "heldout", "clips"]
SPLITS: tuple[Split, ...] = ("train", "heldout", "clips")
CHUNK = {"train": 128, "heldout": 128, "clips": 8}
SETTINGS_FILE = "rendered.json"
MADE_OF_PIXELS = (
    "labels*.jsonl",
    "caption_ids.npy",
    "latents.*",
    "wan_*",
)  # what is void once a split is rendered anew
LATENT_CELL = 8  # pixels per latent: masks are kept at this scale, which is all that the loss reads


@dataclass(frozen=True)
class Item:
    """One still (F = 1) or clip: frames_FHWC uint8, mask_HW uint8 (stills), captions and factor labels."""

    frames_FHWC: NDArray[np.uint8]
    mask_HW: NDArray[np.uint8]
    captions: list[str]
    labels: dict[str, str]


class World(Protocol):
    """Anything that can be learned from; must pickle."""

    def item(self, rng: np.random.Generator, split: Split, *, frames: int, captions: int) -> Item: ...


@dataclass(frozen=True)
class IllustratedWorld:
    """The world of this package, drawn with the sprites in a folder."""

    sprites: Path

    def item(self, rng: np.random.Generator, split: Split, *, frames: int, captions: int) -> Item:
        from cdvideo.world.captions import caption
        from cdvideo.world.scenes import render_clip, render_scene, sample_scene

        sprites = _sprites(self.sprites)
        scene = sample_scene(rng, split="heldout" if split == "heldout" else "train")
        if split == "clips":
            frames_FHWC = render_clip(scene, sprites, num_frames=frames)
            mask_HW = np.zeros(frames_FHWC.shape[1:3], dtype=np.uint8)
        else:
            pixels_HWC, mask_HW = render_scene(scene, sprites)
            frames_FHWC = pixels_HWC[None]
        labels = {"subject": scene.subject, "thing": scene.thing, "setting": scene.setting}
        labels |= {
            "colour": scene.individual.fur,
            "thing_colour": scene.thing_colour,
            "backdrop": scene.backdrop_colour,
        }
        return Item(frames_FHWC, mask_HW, [caption(scene, rng) for _ in range(captions)], labels)


def render_split(
    world: World,
    folder: Path,
    split: Split,
    count: int,
    *,
    size: int,
    frames: int,
    captions: int,
    seed: int,
    workers: int,
) -> None:
    """Render ``count`` items into ``folder``: pixels.npy (N, [F,] H, W, 3), masks.npy (N, H/8, W/8) and labels.jsonl.

    Does nothing where they stand and were rendered with these settings. ``workers``: 0 takes all cores, 1 is this
    process.
    """
    settings = {"seed": seed, "count": count, "captions": captions, "size": size}
    settings |= {"frames": frames} if split == "clips" else {}
    if not (folder / SETTINGS_FILE).exists() or rendered_with(folder) != settings:
        for stale in [file for pattern in MADE_OF_PIXELS for file in folder.glob(pattern)]:
            stale.unlink()
        with atomic_path(folder / SETTINGS_FILE) as part:
            part.write_text(json.dumps(settings) + "\n")
    if (folder / "labels.jsonl").exists():
        return
    shape = (count, frames, size, size, 3) if split == "clips" else (count, size, size, 3)
    for name, want in (("pixels.npy", shape), ("masks.npy", (count, size // LATENT_CELL, size // LATENT_CELL))):
        if not (folder / name).exists() or np.load(folder / name, mmap_mode="r").shape != want:
            for stale in folder.glob("labels-*.jsonl"):
                stale.unlink()
            np.lib.format.open_memmap(folder / name, mode="w+", dtype=np.uint8, shape=want)

    starts = range(0, count, CHUNK[split])
    todo = [start for start in starts if not _labels_file(folder, start).exists()]
    job = partial(_render_chunk, world, folder, split, count=count, frames=frames, captions=captions, seed=seed)
    with progress(f"render {split}", len(starts), done=len(starts) - len(todo)) as bar:
        for _ in _map(job, todo, workers or os.cpu_count() or 1):
            bar.update()
    with atomic_path(folder / "labels.jsonl") as part:
        part.write_text("".join(_labels_file(folder, start).read_text() for start in starts))
    for start in starts:
        _labels_file(folder, start).unlink()


def _map(job: partial[None], todo: list[int], workers: int) -> Iterator[None]:
    if workers == 1:
        yield from map(job, todo)
        return
    # spawn, not fork: the parent may hold CUDA and threads
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(job, todo)


def _render_chunk(
    world: World, folder: Path, split: Split, start: int, *, count: int, frames: int, captions: int, seed: int
) -> None:
    pixels = np.load(folder / "pixels.npy", mmap_mode="r+")
    masks = np.load(folder / "masks.npy", mmap_mode="r+")
    lines = []
    for index in range(start, min(start + CHUNK[split], count)):
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        item = world.item(rng, split, frames=frames, captions=captions)
        pixels[index] = item.frames_FHWC if split == "clips" else item.frames_FHWC[0]
        masks[index] = _cell_means(item.mask_HW)
        lines.append(json.dumps({**item.labels, "captions": item.captions}))
    # No flush: the page cache outlives an interrupted process, and syncing the whole file per chunk would cost minutes.
    del pixels, masks
    with atomic_path(_labels_file(folder, start)) as part:
        part.write_text("\n".join(lines) + "\n")


def _cell_means(mask_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = (side // LATENT_CELL for side in mask_HW.shape)
    cells = mask_HW.reshape(height, LATENT_CELL, width, LATENT_CELL).mean(axis=(1, 3))
    return cells.round().astype(np.uint8)


def _labels_file(folder: Path, start: int) -> Path:
    return folder / f"labels-{start:08d}.jsonl"


def progress(name: str, total: int, *, done: int = 0, quiet: bool = False) -> tqdm[Any]:
    """A progress bar with the time left; in a log file a line now and then."""
    interval = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(total=total, initial=done, desc=name, disable=quiet, mininterval=interval)


def rendered_with(folder: Path) -> dict[str, int]:
    """What a split was rendered with: seed, count, captions per item, size in pixels, and the frames of clips."""
    return json.loads((folder / SETTINGS_FILE).read_text())


def read_labels(folder: Path) -> list[dict[str, Any]]:
    """One dictionary per item: the factor labels, and ``captions``, a list of texts."""
    with (folder / "labels.jsonl").open() as file:
        return [json.loads(line) for line in file]


_loaded: dict[Path, Sprites] = {}


def _sprites(folder: Path) -> Sprites:
    """The sprites, loaded once per process."""
    if folder not in _loaded:
        _loaded[folder] = load_sprites(folder)
    return _loaded[folder]
