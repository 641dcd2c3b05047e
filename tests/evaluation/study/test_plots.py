"""The plots of a study."""

from __future__ import annotations

import re
from itertools import combinations

from cdvideo.evaluation.figures import Figure
from cdvideo.evaluation.study.config import MethodConfig, StudyConfig
from cdvideo.evaluation.study.plots import pareto


def _figure(value: float) -> Figure:
    return Figure(part="", name="", value=value, unit="", n=1, of="", interval=(value - 0.1, value + 0.1))


def test_names_stay_apart_where_methods_lie_together() -> None:
    names = [f"method {i}" for i in range(12)]
    config = StudyConfig(methods=tuple(MethodConfig(name=name) for name in names), against=names[0])
    row = {name: {"identity": _figure(0.8 + 0.002 * i), "composition": _figure(0.9)} for i, name in enumerate(names)}
    svg = pareto(config, row).decode()
    places = {}
    for name in names:
        (found,) = re.findall(rf'<!-- {name} -->\s*<g transform="translate\(([\d.]+) ([\d.]+)\)', svg)
        places[name] = tuple(map(float, found))
    for (x, y), (other_x, other_y) in combinations(places.values(), 2):
        assert abs(x - other_x) >= 40 or abs(y - other_y) >= 8  # points; a name is 40 wide and 8 high
    assert all(0 < x < 648 and 0 < y < 432 for x, y in places.values())  # a plot of 9 x 6 inches
