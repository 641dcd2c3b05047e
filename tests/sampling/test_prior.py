"""Pictures of the class: drawn once, with settings that no run can change halfway."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cdvideo.base.loader import Base
from cdvideo.concept.config import ConceptConfig, DataConfig, PreserveConfig, SampleConfig
from cdvideo.sampling import prior
from cdvideo.sampling.prior import prior_pictures


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> ConceptConfig:
    monkeypatch.setattr(prior, "STEPS", 2)
    return ConceptConfig(preserve=PreserveConfig(prior_weight=1, prior_images=2))


def drawn(base: Base, config: ConceptConfig, folder: Path) -> np.ndarray:
    return np.stack([np.asarray(picture.image) for picture in prior_pictures(base, config, folder, quiet=True)["dog"]])


def test_settings_of_contact_sheets_change_no_picture(tiny_base: Base, config: ConceptConfig, tmp_path: Path) -> None:
    """Not those that are still to be drawn either: a run that was interrupted goes on with the same."""
    whole = drawn(tiny_base, config, tmp_path / "whole")
    first = dataclasses.replace(config, preserve=PreserveConfig(prior_weight=1, prior_images=1))
    drawn(tiny_base, first, tmp_path / "halved")
    resumed = dataclasses.replace(config, sample=SampleConfig(steps=7, guidance=2.0, seed=5))
    assert np.array_equal(drawn(tiny_base, resumed, tmp_path / "halved"), whole)


@pytest.mark.parametrize("other", [{"data": DataConfig(style="photo")}, {"resolution": 72}, "bf16"], ids=str)
def test_pictures_of_other_settings_are_not_mixed_in(
    tiny_base: Base, config: ConceptConfig, tmp_path: Path, other: Any
) -> None:
    drawn(tiny_base, config, tmp_path / "shared")
    if other == "bf16":
        tiny_base.to(torch.device("cpu"), torch.bfloat16)
    else:
        config = dataclasses.replace(config, **other)
    found = drawn(tiny_base, config, tmp_path / "shared")
    assert np.array_equal(found, drawn(tiny_base, config, tmp_path / "alone"))
    assert len(list((tmp_path / "shared").glob("*/dog/*.png"))) == 4
