"""The golden numbers hold: to the bit where they were made, nearly so on other processors and other torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.golden.cases import all_tensors, digest, environment, fingerprint

FILE = Path(__file__).with_name("golden.json")
GOLDEN = json.loads(FILE.read_text()) if FILE.exists() else {"tensors": {}, "environment": ""}
NEAR = (
    5e-3  # of numbers whose root mean square is about 1; a changed seed or a changed formula moves them by 0.1 and more
)


@pytest.fixture
def one_thread() -> Iterator[None]:
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


def test_golden_numbers(one_thread: None) -> None:
    same_place = environment() == GOLDEN["environment"]
    wrong, seen = [], set()
    for name, tensor in all_tensors():
        seen.add(name)
        golden = GOLDEN["tensors"].get(name)
        if golden is None or list(tensor.shape) != golden["shape"]:
            wrong.append(f"{name}: {'not known' if golden is None else 'another shape'}")
            continue
        scale = max(1.0, tensor.double().square().mean().sqrt().item())
        off = max(abs(a - b) for a, b in zip(fingerprint(tensor), golden["fingerprint"], strict=True)) / scale
        if off > NEAR or (same_place and digest(tensor) != golden["digest"]):
            wrong.append(f"{name}: off by {off:.1e}" + (", and not the same bits" if same_place else ""))
    wrong += [f"{name}: gone" for name in GOLDEN["tensors"].keys() - seen]
    assert not wrong, (
        f"made after {GOLDEN['after commit']} ({GOLDEN['why']}); where a change is meant: python -m tests.golden.make"
    )
