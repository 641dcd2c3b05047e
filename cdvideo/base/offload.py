"""Modules that rest in the computer's memory and are on the GPU only while they work; on the CPU they rest in the file.

A film needs its text encoder once, then the UNet for all steps, then the VAE: never two of them at a time. A module
that was left in RAM (`load_base(..., resting=...)`) is copied to the device for as long as a block lasts. Its weights
in RAM stay what they are, so nothing has to be brought back, and results are the same bit for bit. A module that works
on the CPU lets go of what it maps of a file (base/mapped.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cdvideo.base.mapped import letting_go


@contextmanager
def at_work(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """Within the block these modules are on the device; those that rest elsewhere are back there afterwards.

    What is written into the weights of a module that rests elsewhere, within the block, is lost.
    """
    resting: list[tuple[dict[str, Any], str, Tensor]] = [
        (home, name, tensor)
        for module in modules
        for part in module.modules()
        for home in (part._parameters, part._buffers)
        for name, tensor in home.items()
        if tensor is not None and tensor.device != device
    ]
    try:
        for home, name, tensor in resting:
            home[name] = tensor.to(device)
        with letting_go(modules) if device.type == "cpu" else nullcontext():
            yield
    finally:
        for home, name, tensor in resting:
            home[name] = tensor
