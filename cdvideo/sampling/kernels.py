"""The few operations of which a UNet's blocks are made, on pictures whose channels lie last in memory.

On CPUs oneDNN's matrix products add a residual, apply GELU or multiply by a gate while the result is still in a
register; elsewhere the same is written as torch's own operations. For inference: oneDNN's have no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdvideo.attention import attend

_ONEDNN: list[torch.dtype] = []  # in what oneDNN computes
if torch.backends.mkldnn.is_available():
    _PRODUCT: Any = torch.ops.mkldnn._linear_pointwise
    _ONEDNN = [torch.float32, *([torch.bfloat16] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [])]
FAR = 100.0  # square of mean over deviation up to which two sums lose no more than two digits of a group's variance
SCORES = 2**19  # attention scores computed at once on the CPU: as many as its second-level cache holds


def tokens(hidden_NCHW: Tensor) -> Tensor:
    """Pictures as rows of channels, tokens_NLC; a view where channels lie last."""
    return hidden_NCHW.permute(0, 2, 3, 1).flatten(1, 2)


def pictures(tokens_NLC: Tensor, like_NCHW: Tensor) -> Tensor:
    """Back from `tokens`: a view, with channels last."""
    return tokens_NLC.unflatten(1, like_NCHW.shape[-2:]).permute(0, 3, 1, 2)


def linear(rows: Tensor, layer: nn.Linear | nn.Conv2d, *, plus: Tensor | None = None) -> Tensor:
    """A linear layer, or a 1x1 convolution on rows of channels; then a sum where asked."""
    weight = layer.weight if layer.weight.ndim == 2 else layer.weight.flatten(1)
    return product(rows, weight, layer.bias, plus=plus)


def product(rows: Tensor, weight_OC: Tensor, bias_O: Tensor | None, *, plus: Tensor | None = None) -> Tensor:
    """rows_O of rows_C; then a sum where asked."""
    if fuses(rows):
        if plus is not None:
            return _PRODUCT.binary(rows, plus, weight_OC, bias_O, "add")
        return _PRODUCT.default(rows, weight_OC, bias_O, "none", [], "none")
    made = F.linear(rows, weight_OC, bias_O)
    return made if plus is None else made + plus


def gated(rows: Tensor, layer: nn.Linear) -> Tensor:
    """GEGLU (arXiv 2002.05202, equation 6): the first half of the layer's outputs times the GELU of the second."""
    if not fuses(rows):
        value, gate = layer(rows).chunk(2, dim=-1)
        return value * F.gelu(gate)
    value_OC, gate_OC = layer.weight.chunk(2)
    value_O, gate_O = (None, None) if layer.bias is None else layer.bias.chunk(2)
    gate = _PRODUCT.default(rows, gate_OC, gate_O, "gelu", [], "none")
    return _PRODUCT.binary(rows, gate, value_OC, value_O, "mul")


def fuses(tensor: Tensor) -> bool:
    """Whether oneDNN computes on it; under torch.compile, which fuses by itself, it does not."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" and tensor.dtype in _ONEDNN


def group_norm(rows_NLC: Tensor, norm: nn.GroupNorm, *, silu: bool = False) -> Tensor:
    """Group norm over all L rows, then SiLU where asked."""
    if rows_NLC.device.type == "cpu" and not torch.compiler.is_compiling():
        return group_norm_by_sums(rows_NLC, norm, silu=silu)
    normed_NLC = F.group_norm(rows_NLC.transpose(1, 2), norm.num_groups, norm.weight, norm.bias, norm.eps)
    return (F.silu(normed_NLC, inplace=True) if silu else normed_NLC).transpose(1, 2)


def group_norm_by_sums(rows_NLC: Tensor, norm: nn.GroupNorm, *, silu: bool = False) -> Tensor:
    """`group_norm` on the CPU, where torch's own is slow on channels that lie last and on small pictures.

    Each channel's sum and sum of squares give the mean and variance of its group, in float32 at least, and one pass
    applies them. Where a group lies so far from 0 that the two nearly cancel, all are first moved to where it begins.
    """
    count, groups = rows_NLC.shape[1] * rows_NLC.shape[2] // norm.num_groups, norm.num_groups
    rows = rows_NLC if rows_NLC.dtype == torch.float64 else rows_NLC.float()

    def moments(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean_NG = rows.sum(1).unflatten(1, (groups, -1)).sum(-1) / count
        squares = rows.square()
        square_NG = squares.sum(1).unflatten(1, (groups, -1)).sum(-1) / count
        return mean_NG, (square_NG - mean_NG.square()).clamp(min=0), squares

    mean_NG, variance_NG, normed = moments(rows)  # the last for its memory, which later holds the result
    if (mean_NG.square() > FAR * variance_NG).any():
        firsts_NG1 = rows[:, 0].unflatten(1, (groups, -1))[..., :1]
        rows = rows - firsts_NG1.expand(-1, -1, rows.shape[2] // groups).flatten(1).unsqueeze(1)
        mean_NG, variance_NG, normed = moments(rows)
    scale_NG = variance_NG.add(norm.eps).rsqrt()
    scale_NC = scale_NG.unsqueeze(-1) * norm.weight.unflatten(0, (groups, -1))
    shift_NC = norm.bias.unflatten(0, (groups, -1)) - mean_NG.unsqueeze(-1) * scale_NC
    torch.addcmul(shift_NC.flatten(1).unsqueeze(1), rows, scale_NC.flatten(1).unsqueeze(1), out=normed)
    return (F.silu(normed, inplace=True) if silu else normed).to(rows_NLC.dtype)


def by_heads(rows_NLC: Tensor, heads: int) -> Tensor:
    """rows_NHLE, a view: H heads of E channels."""
    return rows_NLC.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend_rows(query_NLC: Tensor, keys_NHTE: Tensor, values_NHTE: Tensor) -> Tensor:
    """Attention of N sequences of rows, each to its own text, pixels or frames, by the backend that is set: read_NLC.

    On CPUs short ones go through batched products: torch's fused kernel calls a matrix product for each head of each
    sequence, and takes long for bfloat16 exponentials.
    """
    heads, places = keys_NHTE.shape[1:3]
    query_NHLE, short = by_heads(query_NLC, heads), 64 if query_NLC.dtype == torch.float32 else 1024
    if query_NLC.device.type != "cpu" or places > short:
        return attend(query_NHLE, keys_NHTE, values_NHTE).transpose(1, 2).flatten(2)
    query_ALE, keys_ATE, values_ATE = (
        each.transpose(0, 1).flatten(0, 1) for each in (query_NHLE, keys_NHTE, values_NHTE)
    )
    at_once = max(1, SCORES // (query_NLC.shape[1] * places))
    parts = zip(query_ALE.split(at_once), keys_ATE.split(at_once), values_ATE.split(at_once), strict=True)
    read = [_attend_at_once(*part) for part in parts]
    read_ALE = read[0] if len(read) == 1 else torch.cat(read)
    return read_ALE.unflatten(0, (heads, -1)).permute(1, 2, 0, 3).flatten(2)


def _attend_at_once(query_AQE: Tensor, keys_ATE: Tensor, values_ATE: Tensor) -> Tensor:
    scale = query_AQE.shape[-1] ** -0.5
    scores_AQT = torch.baddbmm(query_AQE.new_empty(1), query_AQE, keys_ATE.transpose(1, 2), beta=0, alpha=scale)
    shares_AQT = scores_AQT.float().softmax(-1) if scores_AQT.dtype == torch.bfloat16 else scores_AQT.softmax(-1)
    return torch.bmm(shares_AQT.to(values_ATE.dtype), values_ATE)
