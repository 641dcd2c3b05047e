from __future__ import annotations

import pytest

from cdvideo.evaluation.study.config import StudyConfig


@pytest.mark.parametrize(("name", "preserves"), [("Custom Diffusion", False), ("ClassDiffusion", True)])
def test_what_is_compared_with_learns_as_published(name: str, preserves: bool) -> None:
    study = StudyConfig()
    (method,) = [method for method in study.methods if method.name == name]
    config = study.concept_config(method, "dog", 0)
    assert (config.adapter.kind, config.optim.lr) == ("kv", 3e-4)
    assert (config.data.focus, config.preserve.background_weight) == ("picture", 0)
    assert (config.semantic.weight > 0) is preserves
