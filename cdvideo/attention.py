"""Attention by whichever kernel is asked for, behind one function. A kernel is tried against the formula before use.

The classic crash of AnimateDiff comes from kernels that launch one block of threads for each member of the batch and
can count 65,535 of them: temporal attention has one member for each pixel, and xformers was called with the heads in
the batch too, so that 2 films of 64 x 64 pixels and 8 heads were 65,536. Here heads have a dimension of their own, and
a batch that is still larger is split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cdvideo.errors import UserError

BackendName = Literal["sdpa", "flash", "cudnn", "efficient", "xformers"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)

# Of torch's own; the first is asked for, the others serve attentions that it can not do (an autoencoder's wide heads).
_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
MOST_BATCH = 65_535  # the y and z sides of a CUDA grid
TOLERANCE = {  # largest error of attention over inputs of unit variance
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # query_BNQE, keys_BNKE, values_BNKE -> read_BNQE


def attend(query_BNQE: Tensor, keys_BNKE: Tensor, values_BNKE: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(E)) v (arXiv 1706.03762, equation 1) by the backend that `attention_backend` has set.

    N are the heads, Q and K the lengths, E the channels of a head.

    Returns:
        read_BNQE
    """
    if len(query_BNQE) <= MOST_BATCH:
        return _active(query_BNQE, keys_BNKE, values_BNKE)
    parts = zip(*(tensor.split(MOST_BATCH) for tensor in (query_BNQE, keys_BNKE, values_BNKE)), strict=True)
    return torch.cat([_active(*part) for part in parts])


@contextmanager
def attention_backend(name: BackendName, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within the block, `attend` uses this backend; torch's own kernels also serve whoever calls torch's function.

    Raises:
        UserError: it can not run on this device in this dtype, or computes something else than attention.
    """
    global _active
    if name != "sdpa":
        _require(name, device, dtype)
    former = _active
    _active = by_xformers if name == "xformers" else by_sdpa
    kernels = (
        [_KERNELS[name], *(kernel for other, kernel in _KERNELS.items() if other != name)] if name in _KERNELS else []
    )
    try:
        with sdpa_kernel(kernels, set_priority=True) if kernels else nullcontext():
            yield
    finally:
        _active = former


def check_backend(name: BackendName, device: torch.device, dtype: torch.dtype) -> str:
    """Tries one backend, with no other to take its place; tells the largest error.

    Raises:
        ValueError: it computes something else than attention.
        Exception: whatever the backend raises where it can not run.
    """
    with sdpa_kernel(_KERNELS[name]) if name in _KERNELS else nullcontext():
        return check_attention(by_xformers if name == "xformers" else by_sdpa, device, dtype)


def check_attention(attention: Attend, device: torch.device, dtype: torch.dtype) -> str:
    """Compares with the formula in float32; tells the largest error.

    Raises:
        ValueError: the error is larger than rounding explains.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 64, 40, generator=generator).to(device, dtype) for _ in range(3))
    expected = torch.softmax(q.float() @ k.float().transpose(-1, -2) / 40**0.5, dim=-1) @ v.float()
    error = (attention(q, k, v).float() - expected).abs().max().item()
    if not error <= TOLERANCE[dtype]:
        raise ValueError(f"wrong by {error:.1e}")
    return f"largest error {error:.1e}"


def by_sdpa(query_BNQE: Tensor, keys_BNKE: Tensor, values_BNKE: Tensor) -> Tensor:
    """torch's own choice of kernel, or the one that `sdpa_kernel` has set."""
    return F.scaled_dot_product_attention(query_BNQE, keys_BNKE, values_BNKE)


def by_xformers(query_BNQE: Tensor, keys_BNKE: Tensor, values_BNKE: Tensor) -> Tensor:
    """xformers, which has the lengths before the heads; what comes from a projection lies so, and is not copied."""
    from xformers.ops import memory_efficient_attention

    tensors = (tensor.transpose(1, 2).contiguous() for tensor in (query_BNQE, keys_BNKE, values_BNKE))
    read_BQNE: Tensor = memory_efficient_attention(*tensors)
    return read_BQNE.transpose(1, 2)


_active: Attend = by_sdpa


def _require(name: BackendName, device: torch.device, dtype: torch.dtype) -> None:
    try:
        check_backend(name, device, dtype)
    except Exception as error:  # each backend refuses in its own way; all of them are told
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"attention {name} on {device.type} in {str(dtype).removeprefix('torch.')}: {reason}",
            allowed=f"a backend that scripts/doctor.py finds in order, of {', '.join(BACKENDS)}",
            do="leave --attention out: sdpa runs everywhere",
        ) from error
