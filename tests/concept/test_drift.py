from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.concept.adapters import make_adapter
from cdvideo.concept.attention_maps import REST, START
from cdvideo.concept.concept import Concept
from cdvideo.concept.config import ConceptConfig
from cdvideo.concept.drift import DriftMeter, class_features, cosines_to_centre
from cdvideo.concept.drift_file import DRIFT_FILE, load_drift
from cdvideo.concept.kv import initial_rows
from cdvideo.concept.phrases import HELD_OUT_PHRASES, fill
from cdvideo.concept.semantic import phrase_features
from cdvideo.concept.trainer import new_concept, train_concept
from cdvideo.errors import UserError
from cdvideo.media.images import Picture
from cdvideo.runs import Run

CLASS_WORDS = {"sks": "stuffed animal"}


@pytest.fixture
def concept(tiny_base: Base, config: ConceptConfig) -> Concept:
    """The class word itself, before any step."""
    config = dataclasses.replace(config, class_word=CLASS_WORDS["sks"])
    return new_concept(tiny_base, config, make_adapter(tiny_base.unet, config.adapter, seed=0))


def meter_of(base: Base, *, steps: int = 120) -> DriftMeter:
    latents_NCHW = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return DriftMeter(base, CLASS_WORDS, {"sks": latents_NCHW}, steps=steps)


def with_rows(concept: Concept, rows_KD: Tensor) -> Concept:
    return dataclasses.replace(concept, tokens={"sks": rows_KD})


def test_the_class_itself_is_the_yardstick(tiny_base: Base, concept: Concept) -> None:
    measured = meter_of(tiny_base).measure(concept, 0)
    features_TD = phrase_features(tiny_base, [fill(t, "stuffed animal") for t in HELD_OUT_PHRASES])
    centre_D = (features_TD / features_TD.norm(dim=1, keepdim=True)).mean(dim=0)
    own_T = (features_TD @ centre_D) / features_TD.norm(dim=1) / centre_D.norm()
    assert abs(measured["class_cosine"] - own_T.mean().item()) < 1e-5
    nearer = sum(cosine <= measured["drift_cosine"] for cosine in own_T.tolist())
    assert abs(measured["drift_percentile"] - 100 * nearer / len(HELD_OUT_PHRASES)) < 1e-3


def test_a_token_far_from_the_class_stands_further_off(tiny_base: Base, concept: Concept) -> None:
    meter = meter_of(tiny_base)
    near = meter.measure(concept, 0)
    far = meter.measure(with_rows(concept, 5 * torch.randn(1, 32)), 10)
    assert -1 <= far["drift_cosine"] < near["drift_cosine"] <= 1
    assert far["drift_percentile"] < near["drift_percentile"] <= 100
    assert far["class_cosine"] == near["class_cosine"]
    assert far["drift_distance"] > near["drift_distance"] > 0


def test_the_distance_is_that_of_the_same_phrases(tiny_base: Base, concept: Concept) -> None:
    measured = meter_of(tiny_base).measure(concept, 0)
    of_concept_TD, of_class_TD = (
        phrase_features(tiny_base, [fill(t, phrase) for t in HELD_OUT_PHRASES], {"sks": concept.tokens["sks"]})
        for phrase in ("sks stuffed animal", "stuffed animal")
    )
    by_hand = 1 - F.cosine_similarity(of_concept_TD, of_class_TD).mean().item()
    assert measured["drift_distance"] == pytest.approx(by_hand, abs=1e-5)


def test_the_path_is_the_mean_of_unit_features(tiny_base: Base, concept: Concept) -> None:
    meter = meter_of(tiny_base)
    for step in (0, 10):
        meter.measure(concept, step)
    rows = {"sks": concept.tokens["sks"]}
    features_TD = phrase_features(tiny_base, [fill(t, "sks stuffed animal") for t in HELD_OUT_PHRASES], rows)
    path = meter.record.concepts["sks"].path
    assert len(path) == 2 and not path[0].requires_grad
    assert torch.allclose(path[1], F.normalize(features_TD).mean(dim=0), atol=1e-6)


def test_attention_is_measured_now_and_then(tiny_base: Base, concept: Concept) -> None:
    meter = meter_of(tiny_base)
    measured = {step: meter.measure(concept, step) for step in range(121)}
    assert [step for step, metrics in measured.items() if metrics] == list(range(0, 121, 10))
    assert [step for step, metrics in measured.items() if "attention_class" in metrics] == [0, 50, 100, 120]
    assert meter.record.attention_steps == [0, 50, 100, 120]

    path = meter.record.concepts["sks"]
    assert path.words == (START, "a", "sks", "stuffed", "animal", "wearing", "headphones", REST)
    assert path.heights == (8, 4)
    assert path.mass[0].shape == (8, 2) and path.maps[0].shape == (8, 8, 8)
    assert torch.allclose(path.mass[0].sum(dim=0), torch.ones(2), atol=1e-5)
    assert torch.allclose(path.class_mass_WR.sum(dim=0), torch.ones(2), atol=1e-5)
    assert path.class_mass_WR[2].tolist() == [0, 0]
    by_hand = path.mass[0].mean(dim=1)
    assert measured[0]["attention_concept"] == pytest.approx(by_hand[2].item())
    assert measured[0]["attention_class"] == pytest.approx((by_hand[3] + by_hand[4]).item())


def test_an_odd_last_step_is_measured(tiny_base: Base, concept: Concept) -> None:
    assert {"drift_cosine", "attention_class"} <= meter_of(tiny_base, steps=7).measure(concept, 7).keys()


def test_several_concepts_are_averaged(tiny_base: Base, concept: Concept) -> None:
    latents_NCHW = torch.randn(2, 4, 8, 8)
    rows = {"sks": concept.tokens["sks"], "ktn": initial_rows(tiny_base, "cat", 2)}
    words = {"sks": "dog", "ktn": "robot"}

    def measure(tokens: list[str]) -> dict[str, float]:
        meter = DriftMeter(tiny_base, {t: words[t] for t in tokens}, dict.fromkeys(tokens, latents_NCHW), steps=9)
        metadata = dataclasses.replace(concept.metadata, class_words=words)
        return meter.measure(dataclasses.replace(concept, tokens=rows, metadata=metadata), 0)

    one, other, both = measure(["sks"]), measure(["ktn"]), measure(["sks", "ktn"])
    assert one["drift_cosine"] != other["drift_cosine"]
    for name, value in both.items():
        assert value == pytest.approx((one[name] + other[name]) / 2), name


def test_what_was_measured_comes_back_from_its_file(tiny_base: Base, concept: Concept, tmp_path: Path) -> None:
    meter = meter_of(tiny_base)
    for step in range(0, 61, 10):
        meter.measure(concept, step)
    meter.save(tmp_path)
    loaded, saved = load_drift(tmp_path / DRIFT_FILE), meter.record
    assert (loaded.text_steps, loaded.attention_steps) == ([0, 10, 20, 30, 40, 50, 60], [0, 50])
    ours, theirs = saved.concepts["sks"], loaded.concepts["sks"]
    assert (ours.words, ours.heights, ours.class_word) == (theirs.words, theirs.heights, theirs.class_word)
    for name in ("class_TD", "concept_TD", "class_mass_WR"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for name in ("path", "mass", "maps"):
        assert torch.equal(torch.stack(getattr(ours, name)), torch.stack(getattr(theirs, name))), name

    again = meter_of(tiny_base)
    again.restore(tmp_path, 40)
    assert (again.record.text_steps, again.record.attention_steps) == ([0, 10, 20, 30, 40], [0])
    kept = again.record.concepts["sks"]
    assert (len(kept.path), len(kept.mass), len(kept.maps)) == (5, 1, 1)


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / DRIFT_FILE).write_bytes(b"nothing")
    for path in (tmp_path / DRIFT_FILE, tmp_path / "missing.safetensors"):
        with pytest.raises(UserError, match="record of drift"):
            load_drift(path)


def test_measuring_changes_nothing_of_the_training(
    tiny_base: Base, config: ConceptConfig, pictures: list[Picture], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_meter = train_concept(tiny_base, pictures, config, run, quiet=True)
    record = load_drift(run.folder / DRIFT_FILE)
    assert (record.text_steps, record.attention_steps) == ([0, 6], [0, 6])
    first, last = record.concepts["sks"].mass
    assert not torch.equal(first, last)

    monkeypatch.setattr(DriftMeter, "measure", lambda *_: {})
    monkeypatch.setattr(DriftMeter, "save", lambda *_: None)
    without = train_concept(tiny_base, pictures, config, run, quiet=True)
    assert all(torch.equal(tensor, without.weights[name]) for name, tensor in with_meter.weights.items())


def test_classes_are_told_apart(tiny_base: Base) -> None:
    dog_TD, cat_TD = class_features(tiny_base, "dog"), class_features(tiny_base, "cat")
    assert torch.allclose(dog_TD.norm(dim=1), torch.ones(len(HELD_OUT_PHRASES)), atol=1e-5)
    assert cosines_to_centre(dog_TD, dog_TD).mean() > cosines_to_centre(cat_TD, dog_TD).mean()
