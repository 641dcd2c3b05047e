"""Muon (Keller Jordan et al., 2024): momentum whose update is orthogonalised, for matrices and convolutions.

torch.optim.Muon takes matrices alone and orthogonalises them one by one; here convolutions are seen as matrices (out,
rest), and all weights of one shape go through the Newton-Schulz iteration as one batch, which makes it cheap on a GPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices_NRC: Tensor, *, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrices (singular values about 1), a batch at a time.

    Source: kellerjordan.github.io/posts/muon; the quintic's coefficients are those given there. Works in bfloat16.
    """
    a, b, c = COEFFICIENTS
    tall = matrices_NRC.shape[-2] > matrices_NRC.shape[-1]
    x = matrices_NRC.mT if tall else matrices_NRC
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices_NRC.dtype)


class Muon(torch.optim.Optimizer):
    """Muon with decoupled weight decay, updates scaled by 0.2 * sqrt(max(rows, columns)) (arXiv 2502.16982, 2.2)."""

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[(weight.shape[0], weight[0].numel())].append(weight)
            for (rows, columns), weights in by_shape.items():
                scale = 0.2 * max(rows, columns) ** 0.5
                updates_NRC = orthogonalise(self._momenta(weights, group["momentum"]))
                shaped = [u.view(w.shape) for u, w in zip(updates_NRC.unbind(), weights, strict=True)]
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, shaped, alpha=-group["lr"] * scale)

    def _momenta(self, weights: list[Tensor], momentum: float) -> Tensor:
        """Updates the momentum buffers; returns Nesterov's look-ahead as matrices_NRC (out, rest)."""
        grads = [weight.grad for weight in weights if weight.grad is not None]
        buffers = []
        for weight in weights:
            state = self.state[weight]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(weight)
            buffers.append(state["momentum"])
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        ahead = torch._foreach_lerp(grads, buffers, momentum)
        return torch.stack([matrix.reshape(len(matrix), -1) for matrix in ahead])


EDGES = ("conv_in", "conv_out", "embedding", "head", "layers.0.weight")


def make_optimizers(
    model: nn.Module, *, lr: float, weight_decay: float = 0.01, edges: Sequence[str] = EDGES
) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices and convolutions; AdamW for embeddings, norms, biases, first and last layers.

    Args:
        edges: parts of the names of weights that are no hidden matrices.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in trained if p.ndim >= 2 and not any(edge in name for edge in edges)]
    chosen = {id(p) for p in hidden}
    rest = [p for _, p in trained if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [Muon(hidden, lr=lr, weight_decay=weight_decay)] if hidden else []
    if rest:
        fused = rest[0].device.type == "cuda"
        optimizers.append(torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=fused))
    return optimizers
