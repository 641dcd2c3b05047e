"""The identity encoder: a small convolutional network that tells one individual of the world from another.

The cosine of two pictures' features says how surely they show the same individual, wherever it is and whatever it
wears. It is a measuring instrument. Nothing in this project trains against it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cdvideo.errors import UserError
from cdvideo.evaluation.judge.model import Judge, make_stages, to_side
from cdvideo.runs import atomic_path

IDENTITY = Path(__file__).parent
WEIGHTS_FILE = "identity.safetensors"
MAX_BYTES = 2 * 2**20


class IdentityNet(nn.Module):
    """The judge's kind of stages, a pooling that learns where to look, and a linear layer to unit features.

    Args:
        widths: channels of its stages; each stage halves the side.
        blocks: residual blocks of each stage.
        width: of the feature.
        side: pixels to which pictures are brought.
    """

    def __init__(self, *, widths: tuple[int, ...], blocks: tuple[int, ...], width: int, side: int) -> None:
        super().__init__()
        self.widths, self.blocks, self.width, self.side = tuple(widths), tuple(blocks), width, side
        self.stages = make_stages(widths, blocks)
        self.look_head = nn.Conv2d(widths[-1], 1, 1)
        self.centre = nn.BatchNorm1d(widths[-1])  # else all cosines begin near 1
        self.feature_head = nn.Linear(widths[-1], width)
        nn.init.zeros_(self.look_head.weight)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Unit features_BD of pixels in [-1, 1] of any size."""
        map_BCHW = self.stages(to_side(pixels_BCHW, self.side))
        attention_B1N = self.look_head(map_BCHW).flatten(2).float().softmax(dim=2)
        pooled_BC = (map_BCHW.flatten(2) * attention_B1N).sum(dim=2)
        return F.normalize(self.feature_head(self.centre(pooled_BC)).float(), dim=1)

    def start_from(self, judge: Judge) -> int:
        """Takes over the judge's stages as far as they are of the same shape; returns how many weights that were."""
        own, taken = self.stages.state_dict(), 0
        for (name, weight), (theirs, given) in zip(own.items(), judge.stages.state_dict().items(), strict=False):
            if name != theirs or weight.shape != given.shape:
                break
            weight.copy_(given)
            taken += 1
        return taken


def save_identity(net: IdentityNet, folder: Path) -> Path:
    """Writes the weights in half precision with the sizes that they belong to; returns the file."""
    weights = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in net.state_dict().items()
    }
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values()), "a weight does not fit half precision"
    sizes = {"widths": net.widths, "blocks": net.blocks, "width": net.width, "side": net.side}
    path = folder / WEIGHTS_FILE
    with atomic_path(path) as part:
        part.write_bytes(save(weights, metadata={"format": "pt", "sizes": json.dumps(sizes)}))
        assert part.stat().st_size <= MAX_BYTES, f"the identity encoder takes {part.stat().st_size} bytes"
    return path


def load_identity(folder: Path = IDENTITY, *, device: torch.device) -> IdentityNet:
    """Reads an identity encoder, in eval mode and float32.

    Raises:
        UserError: no such file.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(
            f"no identity encoder in {folder}",
            allowed=f"a folder with {WEIGHTS_FILE}",
            do="train one with `scripts/evaluate.py train-identity`, or correct the folder",
        )
    with safe_open(path, framework="pt") as file:
        net = IdentityNet(**json.loads((file.metadata() or {})["sizes"]))
        net.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no mapping)
    return net.float().to(device).eval().requires_grad_(False)
