from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest
import torch

from cdvideo.concept.state import TrainState, deferred_interrupt
from cdvideo.errors import UserError


def make_state(settings: dict[str, str]) -> TrainState:
    torch.manual_seed(0)
    weight = torch.randn(3, 3, requires_grad=True)
    return TrainState(
        {"weight": weight},
        torch.optim.AdamW([weight], lr=0.1),
        torch.amp.GradScaler("cpu", enabled=False),
        settings,
    )


def advance(state: TrainState, steps: int) -> None:
    (weight,) = state.parameters.values()
    for _ in range(steps):
        state.optimizer.zero_grad()
        (weight @ torch.arange(9.0).view(3, 3)).square().sum().backward()
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
