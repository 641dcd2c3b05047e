"""The resumable state of a training run: everything that the next step depends on, in one safetensors file."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cdvideo.errors import UserError
from cdvideo.runs import atomic_path

STATE_FILE = "state.safetensors"


@dataclass(frozen=True)
class TrainState:
    """All that changes from step to step, and the settings that must not change between interrupt and resume."""

    parameters: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    settings: Mapping[str, str]

    def save(self, path: Path, step: int) -> None:
        """Writes the state after `step` steps, whole or not at all."""
        tensors = {f"parameter.{name}": tensor.detach() for name, tensor in self.parameters.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in _flat(moments)}
        metadata = {"step": step, "settings": dict(self.settings), "scaler": self.scaler.state_dict()}
        with atomic_path(path) as part:
            part.write_bytes(save(tensors, metadata={"state": json.dumps(metadata)}))

    def load(self, path: Path) -> int:
        """Puts everything back as it was saved; returns the number of steps done.

        Raises:
            UserError: For a damaged file, or where settings or pictures are not those of the interrupted run.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads(file.metadata()["state"])
                before, scaler, step = dict(metadata["settings"]), dict(metadata["scaler"]), int(metadata["step"])
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise _not_whole(path, str(error)) from error
        changed = [
            f"{name} (was {before.get(name)}, is {now})"
            for name, now in self.settings.items()
            if before.get(name) != now
        ]
        if changed:
            raise UserError(
                f"the interrupted run had other settings: {', '.join(changed)}",
                allowed="the same settings and pictures; only steps and samples may differ",
                do="repeat its flags, or start a new run without --resume",
            )
        moments = self._moments(path, tensors)
        if step < 0 or not self.scaler.state_dict().keys() <= scaler.keys():
            raise _not_whole(path, f"step {step}, scaler {scaler}")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"parameter.{name}"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.scaler.load_state_dict(scaler)
        return step

    def _moments(self, path: Path, tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor | int]]:
        """What the optimizer knows of each weight. Raises UserError for tensors that are not those of these weights."""
        parameters = [*self.parameters.values()]
        shapes = {f"parameter.{name}": parameter.shape for name, parameter in self.parameters.items()}
        moments: dict[int, dict[str, Tensor | int]] = {}
        for name, tensor in tensors.items():
            _, index, moment = name.split(".") if name.count(".") == 2 else ("", "", "")
            if name.startswith("optimizer.") and index in map(str, range(len(parameters))):
                # Copied, since the file is mapped, and Windows replaces no file that is.
                moments.setdefault(int(index), {})[moment] = _as_kept(tensor.clone())
                if moment.startswith("exp_avg"):
                    shapes[name] = parameters[int(index)].shape
            elif name not in shapes:
                raise _not_whole(path, f"it holds {name[:80]}")
        wrong = [name for name, shape in shapes.items() if name not in tensors or tensors[name].shape != shape]
        kinds = {frozenset(each) for each in moments.values()}
        if wrong or len(kinds) > 1 or not all("step" in kind for kind in kinds):
            raise _not_whole(path, f"{wrong[0] if wrong else 'what the optimizer knows'} is missing or misshapen")
        return moments


def _not_whole(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: {reason}", allowed="a whole state", do="start again without --resume")


def _flat(moments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """An optimizer's tensors of one weight.

    bitsandbytes keeps some a level deeper, counts steps in whole numbers, and has one table of levels (`qmap`) for all
    weights, of which each gets a copy, since safetensors takes no tensor twice.
    """
    for name, value in moments.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield name, value.clone() if name.startswith("qmap") else torch.as_tensor(value)


def _as_kept(tensor: Tensor) -> Tensor | int:
    """A single whole number was none but a count; torch's AdamW counts in float32."""
    return int(tensor) if tensor.ndim == 0 and tensor.dtype == torch.int64 else tensor


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Within the block, the first Ctrl-C only sets the event, so that a step can end well; a second one interrupts.

    Python lets only the main thread handle signals; in others the event is never set.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
