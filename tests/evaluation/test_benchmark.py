"""One side of the benchmark of training steps."""

from __future__ import annotations

from pathlib import Path
from threading import Semaphore

import pytest
import torch

from cdvideo.concept.config import ConceptConfig
from cdvideo.errors import UserError
from cdvideo.evaluation.benchmark import step_seconds


def test_a_base_that_does_not_load_lets_the_other_go_on(tmp_path: Path) -> None:
    own, other = Semaphore(1), Semaphore(0)
    with pytest.raises(UserError):
        step_seconds(str(tmp_path), torch.device("cpu"), torch.float32, [], ConceptConfig(steps=3), own, other)
    assert all(other.acquire(blocking=False) for _ in range(3)), "a turn for each step of the other"
