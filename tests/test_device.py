from __future__ import annotations

import pytest
import torch

from cdvideo.device import pick_dtype, use_device
from cdvideo.errors import UserError

CPU = torch.device("cpu")


def test_auto_is_the_best_there_is() -> None:
    assert use_device() == torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    assert use_device("cpu") == CPU


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cuda:x", "meta", "mps", ""])
def test_devices_that_are_not_there(name: str) -> None:
    with pytest.raises(UserError, match=f"device '{name}'\n  allowed: auto, cpu"):
        use_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(UserError, match="allowed: auto, cpu on this machine"):
        use_device("cuda")


@pytest.mark.gpu
def test_cuda() -> None:
    assert use_device("cuda") == use_device("cuda:0") == torch.device("cuda:0")
    dtype = pick_dtype("auto", use_device("cuda"))
    assert dtype in (torch.bfloat16, torch.float16)
    assert torch.ones(2, device="cuda", dtype=dtype).sum().item() == 2
    assert pick_dtype("fp16", use_device("cuda")) == torch.float16


def test_dtypes_of_the_cpu() -> None:
    assert pick_dtype("auto", CPU) == pick_dtype("fp32", CPU) == torch.float32
    assert pick_dtype("bf16", CPU) == torch.bfloat16


@pytest.mark.parametrize("name", ["fp16", "fp8", "float32", ""])
def test_dtypes_that_the_cpu_lacks(name: str) -> None:
    with pytest.raises(UserError, match=f"dtype '{name}' on cpu\n  allowed: auto, fp32, bf16"):
        pick_dtype(name, CPU)
