"""How a figure moves: each doing in a way of its own; in a place it breathes and looks about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, sin

from cdvideo.world.drawing import Point
from cdvideo.world.figures import Pose


@dataclass(frozen=True)
class Motion:
    """One moment: offset in pixels from where the figure stands, turn in degrees, and pose."""

    offset: Point
    angle: float
    pose: Pose


def _steps(t: float, lift: float) -> tuple[float, float]:
    """Left and right foot in turn."""
    return lift * max(0.0, sin(t)), lift * max(0.0, -sin(t))


def _swing(middle: float, width: float, t: float) -> tuple[float, float]:
    """Both arms, one up while the other is down."""
    return middle + width * sin(t), middle - width * sin(t)


def _surf(t: float) -> Motion:
    pose = Pose(_swing(95, 18, t), sway=-5 + 3 * sin(t))
    return Motion((5 * sin(t * 0.5), 4.5 * sin(t * 0.75)), 9 * cos(t * 0.75), pose)


def _skate(t: float) -> Motion:
    hop = max(0.0, sin(t * 0.8)) ** 2
    arms = 70 + 20 * sin(t)
    return Motion((4 * sin(t * 0.4), -9 * hop), 7 * sin(t * 0.8), Pose((arms, arms), sway=-6 + 2 * sin(2 * t)))


def _fly(t: float) -> Motion:
    pose = Pose(_swing(150, 25, t), (0, 3), sway=-9 + 4 * sin(2 * t))
    return Motion((6 * sin(t * 0.5), -18 + 6 * sin(t * 0.7)), -24 + 8 * sin(t * 0.7), pose)


def _ski(t: float) -> Motion:
    pose = Pose((55, 55), sway=-8 + 2 * sin(2 * t))
    return Motion((7 * sin(t * 0.6), 3 + 2.5 * sin(t * 1.2)), 15 + 6 * sin(t * 0.6), pose)


def _dance(t: float) -> Motion:
    pose = Pose(_swing(110, 60, t), _steps(t, 4), sway=4 * sin(t), turn=8 * sin(t))
    return Motion((5 * sin(t), -6 * abs(sin(t))), 12 * sin(t), pose)


def _drive(t: float) -> Motion:
    pose = Pose((60, 60), sway=-6 + 2 * sin(3 * t), turn=3 * sin(t))
    return Motion((2 * sin(t * 0.5), 1.3 * sin(t * 2.5)), 1.5 * sin(t * 1.5), pose)


def _sail(t: float) -> Motion:
    pose = Pose((50, 50 + 25 * sin(t * 0.5)), sway=3 * sin(t), turn=3 * sin(t * 0.4))
    return Motion((4 * sin(t * 0.3), 2.5 * sin(t * 0.5)), 6 * sin(t * 0.5), pose)


def _walk(t: float) -> Motion:
    pose = Pose(_swing(30, 28, t), _steps(t, 5), sway=-2 + 2 * sin(2 * t), turn=2 * sin(t))
    return Motion((2 * sin(t), -2.5 * abs(sin(t))), 3 * sin(t), pose)


def _float(t: float) -> Motion:
    pose = Pose(_swing(80, 20, t * 0.5), (2, 0), sway=5 * sin(t * 0.5))
    return Motion((6 * sin(t * 0.3), -8 + 7 * sin(t * 0.4)), 18 * sin(t * 0.3), pose)


def _swim(t: float) -> Motion:
    pose = Pose(_swing(95, 30, t), (3 + 2 * sin(t), 3 - 2 * sin(t)), sway=5 * sin(t * 0.7))
    return Motion((4 * sin(t * 0.4), -9 + 5 * sin(t * 0.5)), 8 * sin(t * 0.4), pose)


def _idle(t: float) -> Motion:
    pose = Pose(_swing(30, 6, t * 0.5), sway=2 * sin(t * 0.8), turn=4 * sin(t * 0.5))
    return Motion((0, -1 + sin(t * 0.5)), 1.5 * sin(t * 0.5), pose)


_MOTIONS: dict[str, Callable[[float], Motion]] = {
    "surfing": _surf,
    "skateboarding": _skate,
    "flying": _fly,
    "skiing": _ski,
    "dancing": _dance,
    "driving": _drive,
    "sailing": _sail,
    "walking": _walk,
    "space": _float,
    "underwater": _swim,
}


def move(setting: str, t: float) -> Motion:
    """How the figure stands in a setting at `t`, its own time in radians: 2 pi is about a second."""
    return _MOTIONS.get(setting, _idle)(t)
