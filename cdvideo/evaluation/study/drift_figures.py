"""Pictures of semantic drift, as SVG, from what trainings have measured (concept/drift_file.py).

Needs matplotlib (`pip install 'cdvideo[eval]'`).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.concept.attention_maps import REST, START
from cdvideo.concept.drift import class_features, cosines_to_centre
from cdvideo.concept.drift_file import ConceptDrift, DriftRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Plot

SHOWN_STEPS = 8  # rows of maps


def nearest_classes(base: Base, class_word: str, others: Sequence[str], *, count: int = 2) -> dict[str, Tensor]:
    """Those of other class words whose clusters lie nearest in text space, nearest first: unit features_TD of each."""
    own_TD = class_features(base, class_word)
    found = {word: class_features(base, word) for word in others if word != class_word}
    near = {word: cosines_to_centre(features_TD, own_TD).mean().item() for word, features_TD in found.items()}
    return {word: found[word].cpu() for word in sorted(near, key=lambda word: -near[word])[:count]}


def text_space(records: Mapping[str, DriftRecord], token: str, neighbours: Mapping[str, Tensor]) -> bytes:
    """Clusters of phrases in two planes, and the ways of one concept through them.

    Left, what tells the class from its neighbours: does the concept go over to another class? Right, what tells the
    concepts, as they ended, from the class: how far out of its cluster did each go?

    Args:
        records: Trainings of the same class word by the names to show, such as those of methods.
        token: The concept's.
        neighbours: Other class words and their features_TD (`nearest_classes`); one at least. With two, the left plane
            is the one that the three centres span.
    """
    concepts = {name: record.concepts[token] for name, record in records.items()}
    class_word, class_TD = next((concept.class_word, concept.class_TD) for concept in concepts.values())
    assert {concept.class_word for concept in concepts.values()} == {class_word}, "trainings of different classes"
    plot = _plot(13, 6)
    left, right = plot.subplots(1, 2)
    _draw_plane(left, Plane.of([class_TD, *neighbours.values()]), {class_word: class_TD, **neighbours}, concepts)
    ends = [concept.concept_TD for concept in concepts.values()]
    _draw_plane(right, Plane.of([class_TD, *ends]), {class_word: class_TD}, concepts)
    title = (
        "Dots: phrases of a class. Lines: a concept's mean over the steps, from its start (square); crosses: its end"
    )
    plot.suptitle(title, fontsize=9)
    return _svg(plot)


def _draw_plane(axes: Axes, plane: Plane, clusters: Mapping[str, Tensor], concepts: Mapping[str, ConceptDrift]) -> None:
    for i, (word, features_TD) in enumerate(clusters.items()):
        points_T2 = plane.phrases(features_TD).numpy()
        axes.scatter(points_T2[:, 0], points_T2[:, 1], 9, color=f"C{i % 10}", alpha=0.45, linewidths=0, label=word)
    for i, (name, concept) in enumerate(concepts.items()):
        colour, way_S2 = f"C{9 - i % 10}", plane.means(torch.stack(concept.path)).numpy()
        last_T2 = plane.phrases(concept.concept_TD).numpy()
        axes.scatter(last_T2[:, 0], last_T2[:, 1], 9, color=colour, marker="x", linewidths=0.6)
        axes.plot(way_S2[:, 0], way_S2[:, 1], "-o", color=colour, markersize=2.5, linewidth=1.2, label=name)
        axes.plot(*way_S2[0], "s", color=colour, markersize=6)
    axes.set_xlabel(f"first principal axis, {plane.explained[0]:.0%} of what tells apart")
    axes.set_ylabel(f"second, {plane.explained[1]:.0%}")
    axes.legend(fontsize=8)


class Plane:
    """Two principal axes of what tells clusters of phrases apart.

    Phrases differ more from each other than classes do, and in much the same way for all classes; so each phrase's mean
    over the clusters is taken away first, and the plane shows the clusters.
    """

    def __init__(self, phrase_means_TD: Tensor, axes_2D: Tensor, explained: list[float]) -> None:
        self.phrase_means_TD, self.axes_2D, self.explained = phrase_means_TD, axes_2D, explained

    @classmethod
    def of(cls, clusters: Sequence[Tensor]) -> Plane:
        """The plane of two clusters or more, features_TD of the same T phrases."""
        clusters_CTD = torch.stack([*clusters])
        assert len(clusters_CTD) >= 2, "one cluster has nothing to be told apart from"
        phrase_means_TD = clusters_CTD.mean(dim=0)
        _, strengths, axes_DD = torch.linalg.svd((clusters_CTD - phrase_means_TD).flatten(0, 1), full_matrices=False)
        shares = strengths.square() / strengths.square().sum()
        return cls(phrase_means_TD, axes_DD[:2], shares[:2].tolist())

    def phrases(self, features_TD: Tensor) -> Tensor:
        """Where the phrases of one class or concept lie: points_T2."""
        return (features_TD - self.phrase_means_TD) @ self.axes_2D.T

    def means(self, features_SD: Tensor) -> Tensor:
        """Where means over all phrases lie: points_S2."""
        return (features_SD - self.phrase_means_TD.mean(dim=0)) @ self.axes_2D.T


def attention_over_steps(record: DriftRecord, token: str) -> bytes:
    """The share of cross-attention that each word gets, over the steps: a panel for each resolution.

    Dashed: what the base gives to the same words in the class's own prompt. The start, the end and the padding, which
    get most of it everywhere, are left out.
    """
    concept = record.concepts[token]
    mass_SWR = torch.stack(concept.mass).numpy()
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
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    plot.axes[0].legend(fontsize=8)
    return _svg(plot)


def maps_over_steps(record: DriftRecord, token: str) -> bytes:
    """Where in one picture each word is read: a column for each word, a row for a step, from first to last.

    Each word's maps have one scale, from 0 to the most that it gets at any step and pixel.
    """
    concept = record.concepts[token]
    words = [w for w, word in enumerate(concept.words) if word not in (START, REST)]
    rows = torch.linspace(0, len(concept.maps) - 1, SHOWN_STEPS).round().int().unique().tolist()
    maps_SWHW = torch.stack([concept.maps[s].float() for s in rows]).numpy()
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
