"""How a film is sampled, in groups that the command line, YAML files and Python share (no torch)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from cdvideo.config import check
from cdvideo.sampling.keyframes import Curve, parse_curve
from cdvideo.sampling.speed import EXACT, Speed

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """Films longer than the motion modules reach are denoised in overlapping windows, blended at every step.

    They are used by themselves where a film is too long; memory then no longer grows with its length."""

    size: int | None = None
    """Frames of a window; null is 16, or what the motion modules reach if that is less. A size below the film's length
    asks for windows even where the film would fit at once."""
    overlap: int = 4
    """Frames that neighbouring windows share. More is steadier and slower: a film costs size / (size - overlap) times
    what its frames alone would."""
    schedule: Literal["uniform", "static", "looped"] = "uniform"
    """Where windows lie. `uniform`: moved at every step, so that no pair of frames is always at a seam. `static`: the
    same at every step. `looped`: moved, and around the film's end, so that its last frame flows into its first."""
    blend: Literal["pyramid", "flat"] = "pyramid"
    """How overlapping predictions are averaged: by the distance from the window's end, or equally."""

    def __post_init__(self) -> None:
        size = 16 if self.size is None else self.size
        check(
            (size >= 2, f"size={self.size}: must be at least 2 frames"),
            (0 <= self.overlap < size, f"overlap={self.overlap}: must be from 0 to {size - 1}, below the size"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """The noise that a film starts from."""

    kind: Literal["fresh", "freenoise"] = "fresh"
    """`fresh`: each frame has noise of its own. `freenoise`: frames beyond the first window have that window's noise in
    shuffled order (arXiv 2310.15169, section 4.1), which keeps a long film of one piece."""
    freeinit: int = 0
    """Times that the film is made anew from its own low frequencies (arXiv 2312.07537); each costs a whole sampling.
    Steadier, with less motion. Only for bases whose last noise level has some signal left, as Stable Diffusion's."""
    freeinit_spatial: float = 0.25
    """Up to which share of the highest spatial frequency the film's own layout is kept."""
    freeinit_temporal: float = 0.25
    """Up to which share of the highest frequency in time it is kept."""

    def __post_init__(self) -> None:
        shares = {"freeinit_spatial": self.freeinit_spatial, "freeinit_temporal": self.freeinit_temporal}
        check(
            (0 <= self.freeinit <= 10, f"freeinit={self.freeinit}: must be from 0 to 10"),
            *((0 < share <= 1, f"{name}={share:g}: must be above 0, at most 1") for name, share in shares.items()),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """How strongly motion modules and the concept act on a film. Numbers, or key frames: "0: 0.5 | 15: 1.2"."""

    motion_strength: float | str = 1.0
    """What the motion modules add is multiplied by this, over frames. They move frames and hold them together: below 1
    frames agree less, and 0 leaves unrelated stills; above 1 they agree more, and pictures soon suffer."""
    concept_strength: float | str = 1.0
    """How much of the concept is read from the prompt, over the denoising: "0%: 0.2 | 40%: 1" lets the class lay out
    the film before the thing itself is drawn. 0 reads the class word in place of the token."""
    concept_frames: float | str = 1.0
    """The same over frames; the two are multiplied."""
    concept_down: float = 1.0
    concept_mid: float = 1.0
    concept_up: float = 1.0
    """And for the UNet's way down, middle and way up."""

    def __post_init__(self) -> None:
        layers = {f"concept_{name}": getattr(self, f"concept_{name}") for name in ("down", "mid", "up")}
        check(
            *_curve_rules("motion_strength", self.motion_strength, low=0, high=4),
            *_curve_rules("concept_strength", self.concept_strength, low=0, high=2, percent=True),
            *_curve_rules("concept_frames", self.concept_frames, low=0, high=2),
            *((0 <= value <= 2, f"{name}={value:g}: must be from 0 to 2") for name, value in layers.items()),
        )

    @property
    def motion_curve(self) -> Curve:
        return parse_curve(self.motion_strength)

    @property
    def concept_curves(self) -> tuple[Curve, Curve]:
        """Over the denoising, and over frames."""
        return parse_curve(self.concept_strength, percent=True), parse_curve(self.concept_frames)

    def share_of(self, layer: str) -> float:
        """The concept's strength in a layer's part of the UNet."""
        parts = {"down": self.concept_down, "mid": self.concept_mid, "up": self.concept_up}
        return parts.get(layer.split("_")[0], 1.0)  # 1 in the first and the last convolution

    @property
    def concept_is_whole(self) -> bool:
        """Whether the concept acts as it was trained, everywhere."""
        layers = (self.concept_down, self.concept_mid, self.concept_up)
        return all(curve.is_always(1) for curve in self.concept_curves) and layers == (1, 1, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class StartFrom:
    """What a film begins from, besides noise."""

    video: Path | None = None
    """Another film, whose layout and motion this one takes over: at this one's frames a second, and as long."""
    image: Path | None = None
    """A picture that becomes the first frame, as the base's autoencoder gives it back."""
    strength: float | None = None
    """Share of the denoising that is still done, above 0 to 1: less keeps more. null is 0.6 for a video, 0.7 for an
    image. At 1 all but the image itself is made anew, and motion modules hardly carry it along: the film then jumps."""
    fade: float = 0.5
    """How firmly the frames after an image are held to it: the second by this, the third by its square, ..."""

    def __post_init__(self) -> None:
        check(
            (self.video is None or self.image is None, "video and image: a film begins from one of both"),
            (self.video is None or self.video.exists(), f"video={self.video}: no such file"),
            (self.image is None or self.image.is_file(), f"image={self.image}: no such file"),
            (self.strength is None or 0 < self.strength <= 1, f"strength={self.strength}: must be above 0, at most 1"),
            (self.strength is None or self.given, f"strength={self.strength}: is for a film that begins from another"),
            (0 <= self.fade < 1, f"fade={self.fade:g}: must be from 0 to below 1"),
        )

    @property
    def given(self) -> bool:
        return self.video is not None or self.image is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class FilmSettings:
    """What all films of a batch share. `width`, `height`: in pixels; None is the base's own resolution."""

    frames: int = 16
    steps: int = 25
    guidance: float = 5.0
    scheduler: Literal["ddim", "dpm++", "euler", "lcm"] = "ddim"
    width: int | None = None
    height: int | None = None
    windows: Windows = Windows()
    noise: Noise = Noise()
    speed: Speed = EXACT


def rule(name: str, parse: Callable[[Any], T], text: str | float) -> Iterator[tuple[bool, str]]:
    """For `check`: the text can be read."""
    try:
        parse(text)
    except ValueError as error:
        yield False, f"{name}={text}: {error}"


def _curve_rules(
    name: str, text: str | float, *, low: float, high: float, percent: bool = False
) -> Iterator[tuple[bool, str]]:
    broken = list(rule(name, lambda each: parse_curve(each, percent=percent), text))
    yield from broken
    if not broken:
        values = [value for _, value in parse_curve(text, percent=percent).points]
        fits = all(math.isfinite(value) and low <= value <= high for value in values)
        shown = text if isinstance(text, str) else f"{text:g}"
        yield fits, f"{name}={shown}: values must be from {low:g} to {high:g}"


AS_TRAINED = Control()
DEFAULTS = FilmSettings()
