from __future__ import annotations

import functools
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cdvideo.base.mapped import mapped_files
from cdvideo.concept.drift_file import ConceptDrift, DriftRecord, load_drift, save_drift
from cdvideo.concept.state import TrainState, deferred_interrupt
from cdvideo.errors import UserError


def make_state(settings: dict[str, str], *, side: int = 3, optimizer: Any = torch.optim.AdamW) -> TrainState:
    torch.manual_seed(0)
    weight, row = torch.randn(side, side, requires_grad=True), torch.randn(side, requires_grad=True)
    return TrainState(
        {"weight": weight, "row": row},
        optimizer([weight, row], lr=0.1),
        torch.amp.GradScaler("cpu", enabled=False),
        settings,
    )


def advance(state: TrainState, steps: int) -> None:
    weight, row = state.parameters.values()
    for _ in range(steps):
        state.optimizer.zero_grad()
        (
            (weight @ torch.arange(weight.numel() * 1.0).view(weight.shape)).square().sum() + row.square().sum()
        ).backward()
        state.optimizer.step()


def test_a_loaded_state_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole = make_state({"lr": "0.1"})
    advance(whole, 5)
    part = make_state({"lr": "0.1"})
    advance(part, 3)
    part.save(tmp_path / "state.safetensors", 3)
    resumed = make_state({"lr": "0.1"})
    assert resumed.load(tmp_path / "state.safetensors") == 3
    advance(resumed, 2)
    assert torch.equal(resumed.parameters["weight"], whole.parameters["weight"])


def test_the_state_of_an_8_bit_optimizer_is_kept_whole(tmp_path: Path) -> None:
    make = functools.partial(
        make_state, {"lr": "0.1"}, side=80, optimizer=pytest.importorskip("bitsandbytes.optim").AdamW8bit
    )
    whole, part, resumed = make(), make(), make()
    advance(whole, 5)
    advance(part, 3)
    part.save(tmp_path / "state.safetensors", 3)
    assert resumed.load(tmp_path / "state.safetensors") == 3
    assert torch.equal(resumed.parameters["weight"], part.parameters["weight"])
    advance(resumed, 2)
    assert any(moments["state1"].dtype == torch.uint8 for moments in resumed.optimizer.state.values())
    assert torch.equal(resumed.parameters["weight"], whole.parameters["weight"])
    assert torch.equal(resumed.parameters["row"], whole.parameters["row"])


def test_a_state_of_other_settings_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    state = make_state({"lr": "0.1", "seed": "0"})
    advance(state, 1)
    state.save(tmp_path / "state.safetensors", 1)
    with pytest.raises(UserError, match=r"lr \(was 0.1, is 0.2\)"):
        make_state({"lr": "0.2", "seed": "0"}).load(tmp_path / "state.safetensors")
    (tmp_path / "state.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="a whole state"):
        make_state({"lr": "0.1", "seed": "0"}).load(tmp_path / "state.safetensors")


def test_the_first_interrupt_waits_and_the_second_does_not() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), deferred_interrupt() as asked:
        assert not asked.is_set()
        signal.raise_signal(signal.SIGINT)
        assert asked.is_set()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_can_train_too() -> None:
    entered = []

    def work() -> None:
        with deferred_interrupt() as asked:
            entered.append(asked.is_set())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [False]


def mapped_names() -> str:
    return Path("/proc/self/maps").read_text()


@pytest.fixture
def strict_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Windows: no file is replaced while it is mapped."""
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        assert str(target) not in mapped_names(), f"{target} is mapped (error 1224)"
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)


linux = pytest.mark.skipif(not mapped_files(), reason="tells what is mapped on Linux alone")


@linux
@pytest.mark.usefixtures("strict_replace")
def test_a_resumed_state_can_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    first = make_state({"lr": "0.1"}, side=64)
    advance(first, 2)
    first.save(path, 2)
    resumed = make_state({"lr": "0.1"}, side=64)
    resumed.load(path)
    assert str(path) not in mapped_names()
    advance(resumed, 1)
    advance(first, 1)
    resumed.save(path, 3)
    for ours, theirs in zip(resumed.parameters.values(), first.parameters.values(), strict=True):
        assert torch.equal(ours, theirs)


@linux
@pytest.mark.usefixtures("strict_replace")
def test_a_record_of_drift_can_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "drift.safetensors"
    parts = {"class_TD": torch.randn(9, 64), "class_mass_WR": torch.randn(3, 2), "concept_TD": torch.randn(9, 64)}
    lists = {"path": [torch.randn(64)], "mass": [torch.randn(3, 2)], "maps": [torch.randn(3, 8, 8)]}
    drift = ConceptDrift("dog", ("a", "sks", "dog"), (8, 4), **parts, **lists)
    save_drift(DriftRecord([0], [0], {"sks": drift}), path)
    found = load_drift(path)
    assert str(path) not in mapped_names()
    save_drift(found, path)
    assert torch.equal(load_drift(path).concepts["sks"].class_TD, parts["class_TD"])


@pytest.mark.parametrize("metadata", [None, {"state": "{"}, {"state": "[]"}, {"state": "{}"}, {"other": "x"}])
def test_a_state_without_its_header_is_told(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"parameter.weight": torch.ones(1)}, tmp_path / "state.safetensors", metadata=metadata)
    with pytest.raises(UserError, match="a whole state"):
        make_state({}).load(tmp_path / "state.safetensors")
