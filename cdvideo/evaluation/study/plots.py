"""The study's plots, as SVG: composition against identity, what training logged, and measures over the steps."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cdvideo.errors import UserError
from cdvideo.evaluation.figures import Figure
from cdvideo.evaluation.study.config import StudyConfig
from cdvideo.evaluation.study.results import Curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Plot

# What a training may log, and how the panel is called.
LOGGED = {
    "loss_denoise": "denoising loss, mean of 25 steps",
    "drift_distance": "distance to the class's phrases in text space",
    "drift_cosine": "cosine to the class in text space (dashed: the class itself)",
    "drift_percentile": "percentile among the class's own phrases",
    "attention_class": "attention on the class token",
    "attention_concept": "attention on the concept token",
}
SMOOTHED = 25  # steps
SIDES = [(x, y) for x in (1, -1) for y in (1, -1, 0.4, -0.4)] + [(x, y) for y in (1, -1) for x in (0.4, -0.4)]
LEADER = {"arrowstyle": "-", "linewidth": 0.4, "shrinkA": 0, "shrinkB": 3}  # from a name to its point
STYLES = [(f"C{i}", line) for line in ("-", ":", "-.") for i in range(10)]  # by method: colour and line


def pareto(config: StudyConfig, table: Mapping[str, Mapping[str, Figure]]) -> bytes:
    """Composition against identity: a point for each method with its intervals; methods of a line are joined."""
    plot, (axes,) = _panels(1, width=9, height=6)
    lines: dict[str, list[tuple[float, float]]] = {}
    points: dict[str, tuple[float, float]] = {}
    for i, method in enumerate(config.methods):
        x, y = table[method.name]["identity"], table[method.name]["composition"]
        colour, marker = STYLES[i % 30][0], "os^"[i // 10 % 3] if method.source == "trained" else "*"
        axes.errorbar(
            [x.value], [y.value], xerr=_bars(x), yerr=_bars(y), fmt=marker, color=colour, elinewidth=0.7, capsize=2
        )
        points[method.name] = (x.value, y.value)
        if method.line:
            lines.setdefault(method.line, []).append(points[method.name])
    for name, joined in lines.items():
        axes.plot(*zip(*joined, strict=True), "-", color="grey", linewidth=0.8, zorder=0, label=name)
    if lines:
        axes.legend(fontsize=8)
    axes.set_xlabel("identity: mean cosine to the concept's pictures")
    axes.set_ylabel("composition: all that was asked for is there, %")
    _label(plot, axes, dict(sorted(points.items(), key=lambda named: -named[1][0])))  # names reach to the right
    return _svg(plot)


def training(curves: Curves) -> bytes | None:
    """What the trainings logged, over the steps: a thin line for each run, a thick one for their mean."""
    runs = {method: [run for seeds in concepts.values() for run in seeds] for method, concepts in curves.items()}
    logged = [key for key in LOGGED if any(key in line for found in runs.values() for run in found for line in run)]
    if not logged:
        return None
    plot, panels = _panels(len(logged), width=5.5, height=4)
    for axes, key in zip(panels, logged, strict=True):
        for i, (method, found) in enumerate(runs.items()):
            _draw_runs(axes, [_curve(run, key) for run in found], style=STYLES[i % 30], label=method)
            if key == "drift_cosine":
                for run in found:
                    axes.plot(*_curve(run, "class_cosine"), "--", color="grey", linewidth=0.5)
        axes.set_title(LOGGED[key], fontsize=9)
        axes.set_xlabel("step")
    panels[0].legend(fontsize=7)
    return _svg(plot)


def over_steps(checkpoints: Mapping[str, Mapping[int, Mapping[str, Figure]]], curves: Curves) -> bytes:
    """Composition and identity of the methods that were measured at several steps, beside their denoising loss."""
    first = next(iter(next(iter(checkpoints.values())).values()))
    metrics = [name for name in ("composition", "identity") if name in first]
    plot, panels = _panels(len(metrics) + 1, width=5.5, height=4)
    for i, (method, found) in enumerate(checkpoints.items()):
        for axes, metric in zip(panels, metrics, strict=False):
            figures = [found[step][metric] for step in found]
            bars = np.concatenate([_bars(figure) for figure in figures], axis=1)
            values = [figure.value for figure in figures]
            colour, line = STYLES[i % 30]
            axes.errorbar(
                list(found), values, yerr=bars, marker="o", color=colour, linestyle=line, label=method, capsize=2
            )
            axes.set_title(f"{metric}{', %' * (figures[0].unit == '%')}", fontsize=9)
        runs = [run for seeds in curves[method].values() for run in seeds]
        _draw_runs(panels[-1], [_curve(run, "loss_denoise") for run in runs], style=STYLES[i % 30], label=method)
    panels[-1].set_title(LOGGED["loss_denoise"], fontsize=9)
    panels[0].legend(fontsize=7)
    for axes in panels:
        axes.set_xlabel("step")
    return _svg(plot)


def _panels(count: int, *, width: float, height: float) -> tuple[Plot, Sequence[Axes]]:
    try:
        from matplotlib.figure import Figure as Plot
    except ImportError as error:
        raise UserError(
            "matplotlib is not installed, and the study draws plots",
            allowed="pip install 'cdvideo[eval]'",
            do="install it and call again: what was made and measured is kept",
        ) from error
    columns = min(count, 3)
    rows = -(-count // columns)
    plot = Plot(figsize=(width * columns, height * rows), dpi=72, layout="constrained")  # as SVG has it
    grid = plot.subplots(rows, columns, squeeze=False).flatten()
    for spare in grid[count:]:
        spare.set_axis_off()
    for axes in grid[:count]:
        axes.grid(alpha=0.3)
    return plot, list(grid[:count])


def _label(plot: Plot, axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Writes each name as near its point as it is clear of the other names and points; lengths are in pixels."""
    from matplotlib.transforms import Bbox

    plot.draw_without_rendering()  # so that all stands where it will be
    frame, centres = axes.get_window_extent(), axes.transData.transform(list(points.values()))
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in centres]
    for (name, point), centre in zip(points.items(), centres, strict=True):
        label = axes.annotate(
            name, point, (0, 0), textcoords="offset pixels", ha="center", va="center", fontsize=8, arrowprops=LEADER
        )
        size = np.array(label.get_window_extent().size)
        tried = []
        for distance in range(3, 60, 3):
            for direction in SIDES:  # of the point
                away = (distance + size / 2) * np.array(direction)
                box = Bbox([centre + away - size / 2, centre + away + size / 2])
                outside = not (frame.contains(*box.min) and frame.contains(*box.max))
                tried.append((box.count_overlaps(taken) + 10 * outside, distance, away, box))
        _, _, away, box = min(tried, key=lambda place: place[:2])
        label.set_position(away)
        taken.append(box)


def _svg(plot: Plot) -> bytes:
    buffer = io.BytesIO()
    plot.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _bars(figure: Figure) -> Any:
    """Lengths of the interval below and above the value, as matplotlib wants them: (2, 1)."""
    low, high = figure.interval or (figure.value, figure.value)
    return np.maximum([[figure.value - low], [high - figure.value]], 0)


def _curve(run: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values; the loss of single steps is noise, so it is a running mean."""
    lines = [line for line in run if key in line]
    steps, values = [line["step"] for line in lines], [line[key] for line in lines]
    if key != "loss_denoise" or len(values) <= SMOOTHED:
        return steps, values
    return steps[SMOOTHED - 1 :], list(np.convolve(values, np.full(SMOOTHED, 1 / SMOOTHED), "valid"))


def _draw_runs(
    axes: Axes, found: Sequence[tuple[list[float], list[float]]], *, style: tuple[str, str], label: str
) -> None:
    for steps, values in found:
        axes.plot(steps, values, color=style[0], linewidth=0.5, alpha=0.4)
    length = min(len(steps) for steps, _ in found)
    mean = np.mean([values[:length] for _, values in found], axis=0)
    axes.plot(found[0][0][:length], mean, color=style[0], linestyle=style[1], linewidth=1.8, label=label)
