"""The few operations of which a UNet's blocks are made, each against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cdvideo.sampling.kernels import group_norm


def expected(rows_NLC: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
    """Group norm in double precision."""
    normed = nn.functional.group_norm(
        rows_NLC.double().transpose(1, 2), norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps
    )
    return normed.transpose(1, 2)


def example(*, ratio: float, groups: int = 4, channels: int = 16) -> tuple[torch.Tensor, nn.GroupNorm]:
    """Rows whose mean is so many times their deviation, each group's and picture's another; a norm of its own scale."""
    generator = torch.Generator().manual_seed(0)
    rows_NLC = torch.randn(2, 64, channels, generator=generator)
    signs = torch.tensor([1.0, -1.0, 0.5, 1.0]).repeat_interleave(channels // groups)
    norm = nn.GroupNorm(groups, channels, eps=1e-6).requires_grad_(False)
    norm.weight.copy_(torch.rand(channels, generator=generator) + 0.5)
    norm.bias.copy_(torch.randn(channels, generator=generator))
    return rows_NLC + ratio * signs * torch.tensor([1.0, 2.0]).view(2, 1, 1), norm


@pytest.mark.parametrize("ratio", [0, 4, 10, 100, 1000, 3000])
def test_group_norm_of_groups_far_from_0(ratio: float) -> None:
    rows_NLC, norm = example(ratio=ratio)
    off = (group_norm(rows_NLC, norm) - expected(rows_NLC, norm)).abs().max().item()
    print(f"mean {ratio} x the deviation: off by {off:.1e}")
    assert off <= 1e-4


def test_group_norm_of_a_constant_is_its_bias() -> None:
    _, norm = example(ratio=0)
    for value in (0.0, 12345.6):
        normed_NLC = group_norm(torch.full((2, 64, 16), value), norm)
        torch.testing.assert_close(normed_NLC, norm.bias.expand(2, 64, 16), atol=1e-6, rtol=0)


@pytest.mark.parametrize("silu", [False, True])
def test_elsewhere_than_on_the_cpu_it_is_torch_s_own(silu: bool) -> None:
    """On the meta device, which shows the operations that a GPU is asked for, and refuses to wait for a number."""
    rows_NLC, norm = example(ratio=0)
    with torch.profiler.profile() as profile:
        made_NLC = group_norm(rows_NLC.to("meta"), norm.to("meta"), silu=silu)
    asked = {event.key for event in profile.key_averages()}
    assert made_NLC.shape == rows_NLC.shape
    assert "aten::native_group_norm" in asked and ("aten::silu_" in asked) == silu
    assert "aten::addcmul" not in asked
