"""Settings of the benchmarks of sampling and decoding (imports no torch)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from cdvideo.config import check

RANDOM_SD15 = "random-sd15"  # Stable Diffusion 1.5 with motion modules of AnimateDiff v2, all weights random
PEERS = {
    "documented": "diffusers as its documentation shows it",
    "best": "diffusers at its documented best: compiled UNet, fused projections, channels_last",
}
# Presets of sample_video, and `exact` compiled by torch.compile; each is a row of its own.
SPEEDS = ("exact", "balanced", "fast", "compiled")


@dataclass(frozen=True, kw_only=True, slots=True)
class Film:
    """One film, as every side of a benchmark is asked to make it."""

    base: str = "tiny"
    """ "tiny" is the embedded base; a folder in diffusers' layout with motion modules in its folder `motion`; or
    "random-sd15": Stable Diffusion 1.5 with motion modules of AnimateDiff v2 and random weights, built in memory."""
    prompt: str = "a dog wearing headphones surfing"
    frames: int = 16
    steps: int = 25
    guidance: float = 5.0
    width: int | None = None
    height: int | None = None
    """Size in pixels; null is the base's own."""
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        check(
            (self.frames >= 1, f"frames={self.frames}: must be at least 1"),
            (self.steps >= 1, f"steps={self.steps}: must be at least 1"),
            (1 <= self.guidance <= 30, f"guidance={self.guidance:g}: must be from 1 (off) to 30"),
            (self.seed >= 0, f"seed={self.seed}: must be at least 0"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FilmBatch(Film):
    """Films that differ in their seeds (`seed`, `seed` + 1, ...) and perhaps in their concepts.

    For {concept} in the prompt stand the token and the class word of each film's own concept.
    """

    films: int
    concepts: tuple[str, ...]
    """A concept file for each film. None: concepts of K and V, made by chance
    around the embedded base's sample concept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FilmBenchmark(Film):
    """What the benchmarks of films share."""

    pairs: int = 5
    """How often each side runs, in changing order."""
    out: Path = Path("runs/benchmark")
    """results-<benchmark>.json and .md are written there."""
    quiet: bool = False

    def __post_init__(self) -> None:
        Film.__post_init__(self)
        check((self.pairs >= 2, f"pairs={self.pairs}: must be at least 2, for a spread"))

    @property
    def film(self) -> Film:
        """What is asked of a side."""
        return Film(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Film)})


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerBenchmark(FilmBenchmark):
    """Whole films, from prompt to frames, of our sampler and of diffusers' AnimateDiffPipeline, in turn."""

    peers: str = "documented,best"
    """Some of documented, best, separated by commas: how diffusers is used."""
    speed: str = "exact"
    """Presets of our sampler, separated by commas: exact, balanced, fast; and compiled: exact by torch.compile."""
    peak_tflops: float | None = None
    """Peak of the device's matrix units in the chosen dtype, in 10^12 operations a second; null where the card is known
    by name (NVIDIA H100 and A100, dense bf16), else no share of it is told."""

    def __post_init__(self) -> None:
        FilmBenchmark.__post_init__(self)
        check(
            (bool(self.peer_names), "peers is empty: name one of " + ", ".join(PEERS)),
            *((peer in PEERS, f"peers={self.peers}: must be some of {', '.join(PEERS)}") for peer in self.peer_names),
            *((name in SPEEDS, f"speed={self.speed}: must be some of {', '.join(SPEEDS)}") for name in self.speeds),
            (self.peak_tflops is None or self.peak_tflops > 0, f"peak_tflops={self.peak_tflops}: must be above 0"),
        )

    @property
    def peer_names(self) -> tuple[str, ...]:
        return _names(self.peers)

    @property
    def speeds(self) -> tuple[str, ...]:
        return _names(self.speed)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeBenchmark(FilmBenchmark):
    """Latents to frames: ours, a few frames at a time, against diffusers', whose whole film stays on the device."""

    frames: int = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthBenchmark(FilmBenchmark):
    """Films of several lengths: time for each frame, and the peak of memory."""

    lengths: tuple[int, ...] = (16, 64, 512)
    """Frames of each film."""
    pairs: int = 2

    def __post_init__(self) -> None:
        FilmBenchmark.__post_init__(self)
        check(
            (len(self.lengths) >= 2, f"lengths={list(self.lengths)}: at least 2 are needed, to compare"),
            (all(length >= 1 for length in self.lengths), f"lengths={list(self.lengths)}: must be at least 1"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ConceptsBenchmark(FilmBenchmark):
    """A batch of films of as many concepts, against a batch of films of one."""

    prompt: str = "a {concept} wearing headphones surfing"
    """For {concept} stand the token and the class word of each film's own concept."""
    dtype: str = "fp32"
    films: int = 8
    """Films of a batch, with seed, seed + 1, ..."""
    concepts: str = ""
    """Concept files, separated by commas, one for each film. Without any, on the embedded base, as many as there are
    films are made by chance around its sample concept."""

    def __post_init__(self) -> None:
        FilmBenchmark.__post_init__(self)
        files = [Path(name).expanduser() for name in _names(self.concepts)]
        check(
            (self.films >= 2, f"films={self.films}: must be at least 2"),
            (len(files) in (0, self.films), f"concepts: {len(files)} files for films={self.films}"),
            (bool(files) or self.base == "tiny", f"base={self.base}: has no sample concept: name files with concepts="),
            *((file.is_file(), f"concepts={file}: no such file") for file in files),
        )

    @property
    def film(self) -> FilmBatch:
        """What is asked of a side."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(Film)}
        return FilmBatch(**shared, films=self.films, concepts=_names(self.concepts))


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
