from __future__ import annotations

import torch

from cdvideo.sampling.guidance import guide


def test_guide() -> None:
    unconditional, conditional = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])
    assert torch.equal(guide(unconditional, conditional, 0.0), unconditional)
    assert torch.equal(guide(unconditional, conditional, 1.0), conditional)
    assert torch.equal(guide(unconditional, conditional, 7.0), torch.tensor([8.0, -12.0]))


def test_equals_the_paper() -> None:
    """(1 + w) c - w u, with s = 1 + w."""
    generator = torch.Generator().manual_seed(0)
    u, c = torch.randn(2, 100, generator=generator)
    assert torch.allclose(guide(u, c, 5.0), (1 + 4.0) * c - 4.0 * u, atol=1e-5)
