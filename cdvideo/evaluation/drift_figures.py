"""Pictures of semantic drift, as SVG, from what trainings have measured (concept/drift_file.py).

Needs matplotlib (`pip install 'cdvideo[eval]'`).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.concept.attention_maps import REST, START
from cdvideo.concept.drift import class_features, cosines_to_centre
from cdvideo.concept.drift_file import DriftRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Plot

SHOWN_STEPS = 8  # rows of maps


def nearest_classes(base: Base, class_word: str, others: Sequence[str], *, count: int = 4) -> dict[str, Tensor]:
    """Those of other class words whose clusters lie nearest in text space, nearest first: unit features_TD of each."""
    own_TD = class_features(base, class_word)
    found = {word: class_features(base, word) for word in others if word != class_word}
    near = {word: cosines_to_centre(features_TD, own_TD).mean().item() for word, features_TD in found.items()}
    return {word: found[word].cpu() for word in sorted(near, key=lambda word: -near[word])[:count]}


def text_space(records: Mapping[str, DriftRecord], token: str, neighbours: Mapping[str, Tensor]) -> bytes:
    """Clusters of the class and of other classes in a plane, and the ways of one concept through it.

    Args:
        records: Trainings of the same class word by the names to show, such as those of methods.
        token: The concept's.
        neighbours: Other class words and their features_TD (`nearest_classes`); one at least.
    """
    first = next(iter(records.values())).concepts[token]
    clusters = {first.class_word: first.class_TD.numpy(), **{word: f.numpy() for word, f in neighbours.items()}}
    plane = Plane.of(np.stack(list(clusters.values())))
    plot = _plot(8, 6.5)
    axes = plot.subplots()
    for i, (word, features_TD) in enumerate(clusters.items()):
        points_T2 = plane.phrases(features_TD)
        axes.scatter(points_T2[:, 0], points_T2[:, 1], s=9, color=f"C{i}", alpha=0.45, linewidths=0)
        axes.annotate(word, points_T2.mean(axis=0), color=f"C{i}", fontsize=11, ha="center", weight="bold")
    for i, (name, record) in enumerate(records.items()):
        concept, colour = record.concepts[token], f"C{(len(clusters) + i) % 10}"
        assert concept.class_word == first.class_word, f"{name} is of another class"
        way_S2 = plane.means(np.stack([mean_D.numpy() for mean_D in concept.path]))
        axes.plot(*way_S2.T, "-o", color=colour, markersize=2.5, linewidth=1.2, label=name)
        last_T2 = plane.phrases(concept.concept_TD.numpy())
        axes.scatter(last_T2[:, 0], last_T2[:, 1], s=9, color=colour, marker="x", linewidths=0.6)
        for at in (0, -1):
            axes.annotate(str(record.text_steps[at]), way_S2[at], xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel(f"first principal axis of the classes, {plane.explained[0]:.0%} of what tells them apart")
    axes.set_ylabel(f"second, {plane.explained[1]:.0%}")
    axes.set_title(
        "Dots: held-out phrases of a class. Lines: the concept's mean over the steps; crosses: its last phrases"
    )
    axes.legend(fontsize=8)
    return _svg(plot)


class Plane:
    """Two principal axes of what tells classes apart.

    Phrases differ more from each other than classes do, and in the same way for all classes; so each phrase's mean over
    the classes is taken away first, and the plane shows the classes.
    """

    def __init__(self, phrase_means_TD: NDArray[np.floating], axes_2D: NDArray[np.floating], explained: list[float]):
        self.phrase_means_TD, self.axes_2D, self.explained = phrase_means_TD, axes_2D, explained

    @classmethod
    def of(cls, clusters_CTD: NDArray[np.floating]) -> Plane:
        """The plane of C >= 2 classes over the same T phrases."""
        assert len(clusters_CTD) >= 2, "one class has nothing to be told apart from"
        phrase_means_TD = clusters_CTD.mean(axis=0)
        offsets_ND = (clusters_CTD - phrase_means_TD).reshape(-1, clusters_CTD.shape[-1])
        _, strengths, axes_DD = np.linalg.svd(offsets_ND, full_matrices=False)
        return cls(phrase_means_TD, axes_DD[:2], list(strengths[:2] ** 2 / (strengths**2).sum()))

    def phrases(self, features_TD: NDArray[np.floating]) -> NDArray[np.floating]:
        """Where the phrases of one class or concept lie: points_T2."""
        return (features_TD - self.phrase_means_TD) @ self.axes_2D.T

    def means(self, features_SD: NDArray[np.floating]) -> NDArray[np.floating]:
        """Where means over all phrases lie: points_S2."""
        return (features_SD - self.phrase_means_TD.mean(axis=0)) @ self.axes_2D.T


def attention_over_steps(record: DriftRecord, token: str) -> bytes:
    """The share of cross-attention that each word gets, over the steps: a panel for each resolution.

    Dashed: what the base gives to the same words in the class's own prompt. The start, the end and the padding, which
    get most of it everywhere, are left out.
    """
    concept = record.concepts[token]
    mass_SWR = np.stack([mass_WR.numpy() for mass_WR in concept.mass])
    plot = _plot(5.5 * len(concept.heights), 4)
    for r, axes in enumerate(plot.subplots(1, len(concept.heights), squeeze=False)[0]):
        for w, word in enumerate(concept.words):
            if word in (START, REST):
                continue
            axes.plot(record.attention_steps, mass_SWR[:, w, r], "-o", color=f"C{w % 10}", markersize=3, label=word)
            if word != token:
                axes.axhline(concept.class_mass_WR[w, r].item(), color=f"C{w % 10}", linestyle="--", linewidth=0.8)
        axes.set_title(f"maps {concept.heights[r]} cells high", fontsize=9)
        axes.set_xlabel("step")
        axes.set_ylabel("share of cross-attention")
        axes.grid(alpha=0.3)
    plot.axes[0].legend(fontsize=8)
    return _svg(plot)


def maps_over_steps(record: DriftRecord, token: str) -> bytes:
    """Where in one picture each word is read: a column for each word, a row for a step, from first to last.

    Each word's maps have one scale, from 0 to the most that it gets at any step and pixel.
    """
    concept = record.concepts[token]
    words = [w for w, word in enumerate(concept.words) if word not in (START, REST)]
    rows = np.unique(np.linspace(0, len(concept.maps) - 1, SHOWN_STEPS).round().astype(int))
    maps_SWHW = np.stack([concept.maps[s].float().numpy() for s in rows])
    plot = _plot(1.5 * len(words) + 0.5, 1.5 * len(rows) + 0.3)
    grid = plot.subplots(len(rows), len(words), squeeze=False)
    for row, s in enumerate(rows):
        for column, w in enumerate(words):
            axes = grid[row, column]
            axes.imshow(maps_SWHW[row, w], cmap="magma", vmin=0, vmax=maps_SWHW[:, w].max())
            axes.set_xticks([])
            axes.set_yticks([])
            if row == 0:
                axes.set_title(concept.words[w], fontsize=9)
            if column == 0:
                axes.set_ylabel(f"step {record.attention_steps[s]}", fontsize=8)
    return _svg(plot)


def _plot(width: float, height: float) -> Plot:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(plot: Plot) -> bytes:
    buffer = io.BytesIO()
    plot.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
