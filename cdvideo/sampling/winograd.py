"""3x3 convolutions with a quarter of the products: Winograd's F(4x4, 3x3), arXiv 1509.09308.

oneDNN has none for x86, so on CPUs a convolution costs all of its products. Here 4x4 pixels of output are made from 6x6
of input through 36 matrix products, 36 products a weight in place of 144; what is left around them is moved in three
more matrix products. That pays where channels are not few and pictures not too small, and only in float32: the
transforms lose two digits (of seven).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 96  # from here on it pays: 3 to 5 % of the embedded base's step; 1.3 to 2.2 x from 256 channels on
PIXELS = 256  # of output: with fewer, transforming the weights takes what the products save
WIDE, AT_ONCE = 256, 256  # tiles at once, of wide layers; of others a quarter, which a core's own cache holds
KEPT = 2**23 - 2**17  # numbers: a little less than the 32 MB of which malloc, on Linux, keeps what is freed (cpu.py)

# B^T, G and A^T of the paper, for both axes at once: 36 numbers of a tile from its 6x6 pixels, and so on.
_INPUT = torch.tensor([
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]).float()  # fmt: skip
_WEIGHT = torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]).double() / 24
_OUTPUT = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]).float()
INPUT_TS, WEIGHT_TK, OUTPUT_ST = (torch.kron(each, each).float() for each in (_INPUT, _WEIGHT, _OUTPUT))


def convolve(hidden_NCHW: Tensor, weight_OCYX: Tensor, bias_O: Tensor | None) -> Tensor:
    """A 3x3 convolution with stride and padding 1, in whichever way is faster. Both agree within 1e-4 of the spread."""
    if not pays(hidden_NCHW, weight_OCYX):
        return F.conv2d(hidden_NCHW, weight_OCYX, bias_O, padding=1)
    count, _, height, width = hidden_NCHW.shape
    out, channels = weight_OCYX.shape[:2]
    high, wide = -(-height // 4), -(-width // 4)  # in tiles, which overlap the picture
    padded_NHWC = F.pad(hidden_NCHW.permute(0, 2, 3, 1), (0, 0, 1, 1 + 4 * wide - width, 1, 1 + 4 * high - height))
    at_once = AT_ONCE if channels >= WIDE else AT_ONCE // 4
    some, rows = max(1, at_once // (high * wide)), max(1, at_once // wide)  # pictures, and rows of tiles, at once
    parts = -(-36 * out * channels // KEPT)  # of the outputs
    transformed_TCO = _transform_weight(weight_OCYX) if parts == 1 else None
    made_NHYWXO = hidden_NCHW.new_empty(count, high, 4, wide, 4, out)
    for first, row in product(range(0, count, some), range(0, high, rows)):
        seen_TRC = _transform_input(padded_NHWC[first : first + some, 4 * row : 4 * (row + rows) + 2])
        place_NHYWXO = made_NHYWXO[first : first + some, row : row + rows]
        for part_OCYX, part_NHYWXO in zip(weight_OCYX.chunk(parts), place_NHYWXO.chunk(parts, dim=-1), strict=True):
            weight_TCO = _transform_weight(part_OCYX) if transformed_TCO is None else transformed_TCO
            _transform_output(torch.bmm(seen_TRC, weight_TCO), part_NHYWXO)
    made_NHWO = made_NHYWXO.view(count, 4 * high, 4 * wide, out)[:, :height, :width]
    return (made_NHWO if bias_O is None else made_NHWO.add_(bias_O)).permute(0, 3, 1, 2)


def pays(hidden_NCHW: Tensor, weight_OCYX: Tensor) -> bool:
    """Whether convolving by tiles is faster. Under torch.compile, which can not see that, it is not asked for."""
    if hidden_NCHW.device.type != "cpu" or hidden_NCHW.dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    count, _, height, width = hidden_NCHW.shape
    return min(weight_OCYX.shape[:2]) >= CHANNELS and count * height * width >= PIXELS


@contextmanager
def by_tiles(model: nn.Module) -> Iterator[None]:
    """Within the block the model's plain 3x3 convolutions are `convolve`; its weights stay what and where they are."""
    plain = [
        module
        for module in model.modules()
        if type(module) is nn.Conv2d
        and module.kernel_size == (3, 3)
        and module.stride == module.padding == module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and "forward" not in module.__dict__
    ]
    try:
        for module in plain:
            module.__dict__["forward"] = partial(_convolve_as, module)  # as nn.Module calls it
        yield
    finally:
        for module in plain:
            del module.__dict__["forward"]


def _convolve_as(module: nn.Conv2d, hidden_NCHW: Tensor) -> Tensor:
    return convolve(hidden_NCHW, module.weight, module.bias)


def _transform_weight(weight_OCYX: Tensor) -> Tensor:
    out, channels = weight_OCYX.shape[:2]
    return (WEIGHT_TK @ weight_OCYX.permute(0, 2, 3, 1).reshape(out, 9, channels)).permute(1, 2, 0)


def _transform_input(padded_NHWC: Tensor) -> Tensor:
    """Pictures, or strips of them, of whole tiles with the margin that the outermost ones need."""
    tiles_NYXCHW = padded_NHWC.unfold(1, 6, 4).unfold(2, 6, 4)
    tiles_SR = tiles_NYXCHW.permute(4, 5, 0, 1, 2, 3).reshape(36, -1)  # S: places in a tile; R: all else
    return (INPUT_TS @ tiles_SR).view(36, -1, padded_NHWC.shape[-1])


def _transform_output(made_TRO: Tensor, place_NHYWXO: Tensor) -> None:
    """Written where it belongs: the pixels YX of tile HW."""
    count, high, _, wide, _, out = place_NHYWXO.shape
    made_SR = OUTPUT_ST @ made_TRO.flatten(1)
    place_NHYWXO.copy_(made_SR.view(4, 4, count, high, wide, out).permute(2, 3, 0, 4, 1, 5))
