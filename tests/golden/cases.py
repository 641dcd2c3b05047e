"""What must not change unnoticed: concepts, latents and frames of fixed seeds, on the embedded base.

Each adapter kind is trained for a few steps, and then drawn, filmed, decoded, filmed in windows, and filmed beside a
film without a concept. Sizes are small: what is nailed here is the way of the numbers, not what they show.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdvideo.base.loader import TINY_BASE, Base, load_base
from cdvideo.concept.concept import Concept
from cdvideo.concept.config import SAMPLE_PICTURES, ConceptConfig
from cdvideo.concept.trainer import train_concept
from cdvideo.config import load_config
from cdvideo.media.images import read_pictures
from cdvideo.motion.files import load_motion
from cdvideo.motion.modules import MotionModules
from cdvideo.runs import create_run
from cdvideo.sampling.image import sample_images
from cdvideo.sampling.options import FilmSettings, Windows
from cdvideo.sampling.video import Film, decode_frames, sample_latents

KINDS: dict[str, tuple[str, ...]] = {
    "kv": ("adapter.kind=kv",),
    "lora": ("adapter.kind=lora", "adapter.rank=2"),
    "dora": ("adapter.kind=lora", "adapter.rank=2", "adapter.dora=true"),
    "token": ("adapter.kind=token",),
    "unet": ("adapter.kind=unet", "optim.lr=1e-5"),
}
SHORT = ("steps=3", "data.variants=1", "sample.every=0", "optim.batch_size=1", "checkpoint_every=100")
PROMPT = "a sks dog wearing headphones surfing"
SIZE = {"width": 64, "height": 64}


def environment() -> str:
    """Where bits may be compared: kernels of another processor or another torch round in other places."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__.split('+')[0]}, {platform.machine()}, {capability}, 1 thread"


@cache
def models() -> tuple[Base, MotionModules]:
    base = load_base("tiny", device=torch.device("cpu"))
    return base, load_motion(TINY_BASE / "motion", device=torch.device("cpu"))


@cache
def concept_of(kind: str, *, focus: str = "picture") -> Concept:
    """A concept of three steps on the sample pictures."""
    overrides = [*SHORT, *KINDS[kind], f"data.focus={focus}", f"preserve.background_weight={int(focus == 'subject')}"]
    config = load_config(ConceptConfig, overrides=overrides)
    base, _ = models()
    with TemporaryDirectory() as folder, create_run(Path(folder), "golden") as run:
        return train_concept(base, read_pictures(SAMPLE_PICTURES)[:2], config, run, quiet=True)


def still(kind: str) -> Tensor:
    base, _ = models()
    return sample_images(base, [PROMPT], seeds=[3], concept=concept_of(kind), steps=2, **SIZE)


def film(kind: str) -> Tensor:
    return _films([kind], FilmSettings(frames=4, steps=2, **SIZE))


def windows(kind: str) -> Tensor:
    return _films([kind], FilmSettings(frames=10, steps=2, windows=Windows(size=6, overlap=2), **SIZE))


def frames(kind: str) -> Tensor:
    base, _ = models()
    return torch.from_numpy(decode_frames(base, film(kind)[0]))


def two_concepts(kind: str) -> Tensor:
    together = kind in ("kv", "token")  # other kinds change weights that both films would read
    return _films([kind, None], FilmSettings(frames=4, steps=2, **SIZE), batch=2 if together else 1)


CASES: dict[str, Callable[[str], Tensor]] = {
    "still": still,
    "film": film,
    "frames": frames,
    "windows": windows,
    "two concepts": two_concepts,
}


def _films(kinds: list[str | None], settings: FilmSettings, **options: Any) -> Tensor:
    base, motion = models()
    films = [
        Film(prompt=PROMPT if kind else "a dog surfing", seed=5 + index, concept=concept_of(kind) if kind else None)
        for index, kind in enumerate(kinds)
    ]
    return torch.stack(list(sample_latents(base, motion, films, settings, **options)))


def all_tensors() -> Iterator[tuple[str, Tensor]]:
    """Every golden tensor by its name; concepts first, each as one vector."""
    for kind in KINDS:
        yield f"{kind} | concept", flat(concept_of(kind))
        for name, case in CASES.items():
            yield f"{kind} | {name}", case(kind)
    yield "lora | concept, focus on the subject", flat(concept_of("lora", focus="subject"))


def flat(concept: Concept) -> Tensor:
    parts = {**concept.tokens, **concept.weights}
    return torch.cat([parts[name].detach().float().flatten() for name in sorted(parts)])


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def fingerprint(tensor: Tensor) -> list[float]:
    """Eight numbers that any change moves: sums of the tensor times fixed random signs, over its root mean square."""
    values = tensor.double().flatten().numpy()
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(8, len(values)))
    return [round(float(x), 6) for x in signs @ values / np.sqrt(len(values))]
