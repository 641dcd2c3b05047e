from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from cdvideo.base.loader import Base
from cdvideo.concept.attention_maps import REST, START
from cdvideo.concept.drift import class_features, cosines_to_centre
from cdvideo.concept.drift_file import ConceptDrift, DriftRecord
from cdvideo.evaluation.study.drift_figures import (
    Plane,
    attention_over_steps,
    maps_over_steps,
    nearest_classes,
    text_space,
)


@pytest.fixture
def record() -> DriftRecord:
    """A concept that walks from its class (at 1, 0, 0, ...) towards another (at 0, 1, 0, ...)."""
    generator = torch.Generator().manual_seed(0)
    class_TD = cluster(0)
    concept = ConceptDrift(
        class_word="dog",
        words=(START, "a", "sks", "dog", REST),
        heights=(8, 4),
        class_TD=class_TD,
        class_mass_WR=torch.rand(5, 2, generator=generator),
        concept_TD=cluster(1),
        path=[(1 - t) * class_TD.mean(dim=0) + t * cluster(1).mean(dim=0) for t in (0.0, 0.5, 1.0)],
        mass=[torch.rand(5, 2, generator=generator) for _ in range(2)],
        maps=[torch.rand(5, 8, 8, generator=generator).half() for _ in range(2)],
    )
    return DriftRecord([0, 10, 20], [0, 20], {"sks": concept})


def cluster(axis: int) -> torch.Tensor:
    """Six phrases, which differ in the same way around each axis: features_TD."""
    phrases_TD = torch.randn(6, 16, generator=torch.Generator().manual_seed(9))
    return phrases_TD + 3 * torch.eye(16)[axis]


def texts(svg: bytes) -> str:
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    return svg.decode()


def test_the_plane_shows_classes_and_not_phrases() -> None:
    clusters = [cluster(axis) for axis in range(3)]
    plane = Plane.of(clusters)
    points = [plane.phrases(features_TD) for features_TD in clusters]
    assert all(torch.allclose(points_T2, points_T2[:1], atol=1e-5) for points_T2 in points)
    assert sum(plane.explained) == pytest.approx(1, abs=1e-5)
    apart = [(points[i][0] - points[j][0]).norm().item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert apart == pytest.approx([3 * 2**0.5] * 3, rel=1e-4)


def test_means_lie_where_their_phrases_lie_on_average() -> None:
    plane = Plane.of([*torch.randn(3, 6, 16)])
    features_TD = torch.randn(6, 16)
    assert torch.allclose(
        plane.means(features_TD.mean(dim=0)[None])[0], plane.phrases(features_TD).mean(dim=0), atol=1e-5
    )


def test_text_space_draws_every_way(record: DriftRecord) -> None:
    svg = texts(text_space({"one": record, "another": record}, "sks", {"cat": cluster(1), "fox": cluster(2)}))
    assert all(f"<!-- {word} -->" in svg for word in ("dog", "cat", "fox", "one", "another"))
    other = DriftRecord([0], [0], {"sks": dataclasses.replace(record.concepts["sks"], class_word="cat")})
    with pytest.raises(AssertionError, match="different classes"):
        text_space({"one": record, "other": other}, "sks", {"fox": cluster(2)})


def test_attention_is_drawn_for_words_alone(record: DriftRecord) -> None:
    for svg in (texts(attention_over_steps(record, "sks")), texts(maps_over_steps(record, "sks"))):
        assert all(f"<!-- {word} -->" in svg for word in ("a", "sks", "dog"))
        assert START not in svg.replace("&lt;", "<").replace("&gt;", ">")
    assert "step 20" in texts(maps_over_steps(record, "sks"))
    assert texts(maps_over_steps(record, "sks")).count("<image") == 2 * 3


def test_nearest_classes_come_first(tiny_base: Base) -> None:
    words = ["cat", "robot", "photo", "dog"]
    found = nearest_classes(tiny_base, "dog", words, count=2)
    own_TD = class_features(tiny_base, "dog")
    near = {w: cosines_to_centre(class_features(tiny_base, w), own_TD).mean().item() for w in words if w != "dog"}
    assert [*found] == sorted(near, key=lambda w: -near[w])[:2]
    assert all(torch.equal(features_TD, class_features(tiny_base, word)) for word, features_TD in found.items())
