"""What changes along a film, written as key frames: `0: a sks dog surfing | 24: a sks dog on the beach`. No torch.

Entries are separated by `|` or stand on lines of their own, as YAML's block text has them. Between two keys the value
goes linearly from one to the other; before the first and after the last it stays.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass

_ENTRY = re.compile(r"\s*(\d+(?:\.\d+)?%?)\s*:\s*(.*?)\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Curve:
    """A number along a film's frames, or along its denoising: values at positions that rise."""

    points: tuple[tuple[float, float], ...]

    def at(self, position: float) -> float:
        """The value there, piecewise linear."""
        return sum(weight * self.points[index][1] for index, weight in between(self.positions, position))

    @property
    def positions(self) -> tuple[float, ...]:
        return tuple(position for position, _ in self.points)

    @property
    def constant(self) -> bool:
        return len({value for _, value in self.points}) == 1

    def closed(self, length: int) -> Curve:
        """The same, back at its first value where a loop of that many frames begins again."""
        if self.constant or self.positions[-1] >= length:
            return self
        return Curve((*self.points, (length, self.points[0][1])))

    def is_always(self, value: float) -> bool:
        return all(each == value for _, each in self.points)


def parse_curve(text: str | float, *, percent: bool = False) -> Curve:
    """A curve from `0.8`, from `0: 0.5 | 15: 1.2` over frames, or from `0%: 0.2 | 40%: 1` over the denoising.

    Args:
        percent: positions are shares of the denoising, from 0 % (noise) to 100 % (done); as 0 to 1 in the curve.

    Raises:
        ValueError: Saying what can not be read.
    """
    try:
        return Curve(((0.0, float(text)),))
    except ValueError:
        pass
    points = []
    for position, value in _entries(str(text)):
        if position.endswith("%") != percent:
            raise ValueError(f"position {position}: {'a share such as 40%' if percent else 'the number of a frame'}")
        try:
            points.append((_number(position), float(value)))
        except ValueError as error:
            raise ValueError(f"{value!r} at {position} is no number") from error
    if percent and points[-1][0] > 1:
        raise ValueError("a position lies beyond 100%")
    return Curve(tuple(points))


def parse_prompts(text: str) -> dict[int, str]:
    """Prompts by the frame from which they are meant: a plain prompt stands at frame 0, as does "4:3 picture of a dog".

    Raises:
        ValueError: Saying what can not be read.
    """
    if not re.match(r"\s*\d+(?:\.\d+)?%?\s*:(?!\d)", text):
        return {0: text}
    prompts = {}
    for position, prompt in _entries(text):
        if not position.isdigit():
            raise ValueError(f"position {position}: must be the number of a frame")
        if not prompt:
            raise ValueError(f"the prompt at frame {position} is empty")
        prompts[int(position)] = prompt
    return prompts


def between(keys: tuple[float, ...], position: float) -> tuple[tuple[int, float], ...]:
    """Which keys' values hold at a position, by index, and with what weight: one of them, or two that sum to 1."""
    right = bisect_right(keys, position)
    if right == 0:
        return ((0, 1.0),)
    left = right - 1
    if right == len(keys) or keys[left] == position:
        return ((left, 1.0),)
    share = (position - keys[left]) / (keys[right] - keys[left])
    return ((left, 1 - share), (right, share))


def _entries(text: str) -> list[tuple[str, str]]:
    """(position, value) of each entry, the positions rising."""
    entries = []
    for entry in re.split(r"[|\n]", text.strip()):
        match = _ENTRY.fullmatch(entry)
        if not match:
            raise ValueError(f"{entry.strip()!r}: an entry is written `position: value`, entries are separated by |")
        entries.append((match[1], match[2]))
    numbers = [_number(position) for position, _ in entries]
    if any(after <= before for before, after in zip(numbers, numbers[1:], strict=False)):
        raise ValueError(f"positions {', '.join(position for position, _ in entries)} do not rise")
    return entries


def _number(position: str) -> float:
    return float(position[:-1]) / 100 if position.endswith("%") else float(position)
