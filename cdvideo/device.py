"""Where and in which precision to compute. The one place that looks at the machine; everything else is told."""

from __future__ import annotations

import torch

from cdvideo.errors import UserError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def use_device(name: str = "auto") -> torch.device:
    """Make the device of that name the current one, and return it.

    Args:
        name: "auto" (CUDA where there is one, else the CPU), "cpu", "cuda" or "cuda:1".

    Raises:
        UserError: For another name, or a CUDA device that this machine does not have.
    """
    available = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name == "auto":
        name = "cuda:0" if "cuda:0" in available else "cpu"
    if name == "cuda":
        name = "cuda:0"
    if name not in available:
        raise UserError(
            f"device {name!r}",
            allowed=f"auto, {', '.join(available)} on this machine",
            do="choose one of these with --device",
        )
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the one of which peaks and precisions are asked
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of that name.

    Args:
        name: "auto" (fp32 on the CPU; on CUDA bf16, or fp16 where the card has no bf16), "fp32", "bf16" or "fp16".
        device: Where it will compute.

    Raises:
        UserError: For another name, or a precision that the device does not compute in.
    """
    allowed = ["fp32", "bf16"]
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        allowed = ["fp32", "fp16", "bf16"] if has_bf16 else ["fp32", "fp16"]
    if name == "auto":
        return _DTYPES[allowed[-1] if device.type == "cuda" else "fp32"]
    if name not in allowed:
        raise UserError(
            f"dtype {name!r} on {device.type}",
            allowed=f"auto, {', '.join(allowed)}",
            do="choose one of these with --dtype",
        )
    return _DTYPES[name]
