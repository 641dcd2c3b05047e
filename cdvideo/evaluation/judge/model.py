"""The judge: a small convolutional network that names subject, thing worn and setting of a picture of the world.

It is a measuring instrument. Nothing in this project trains against it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cdvideo.errors import UserError
from cdvideo.runs import atomic_path
from cdvideo.world.scenes import SETTINGS, SUBJECTS, THINGS

CLASSES: dict[str, tuple[str, ...]] = {"subject": SUBJECTS, "thing": ("", *THINGS), "setting": SETTINGS}
HEADS = tuple(CLASSES)
JUDGE = Path(__file__).parent
WEIGHTS_FILE = "judge.safetensors"
MAX_BYTES = 3 * 2**20


@dataclass(frozen=True)
class Verdicts:
    """What the judge says of B pictures, on the CPU.

    labels_BH: class index per head, in the order of HEADS. confidence_BH: calibrated probability of that class.
    features_BD: features before the heads, for comparing pictures.
    """

    labels_BH: Tensor
    confidence_BH: Tensor
    features_BD: Tensor

    def names(self, b: int) -> tuple[str, str, str]:
        """Subject, thing worn ("" is nothing) and setting of picture b."""
        subject, thing, setting = (CLASSES[head][int(self.labels_BH[b, h])] for h, head in enumerate(HEADS))
        return subject, thing, setting


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm beside the identity (arXiv 1512.03385, figure 2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        inner_BCHW = F.relu(self.norm1(self.conv1(x_BCHW)))
        return F.relu(x_BCHW + self.norm2(self.conv2(inner_BCHW)))


def make_stages(widths: tuple[int, ...], blocks: tuple[int, ...]) -> nn.Sequential:
    """Stages of residual blocks, each after a convolution that halves the side."""
    stages: list[nn.Module] = []
    for before, width, count in zip((3, *widths), widths, blocks, strict=False):
        down = nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False)
        stages += [down, nn.BatchNorm2d(width), nn.ReLU(), *(Block(width) for _ in range(count))]
    return nn.Sequential(*stages)


class Judge(nn.Module):
    """Residual network with one linear head each for subject, thing worn and setting.

    Args:
        widths: channels of its stages; each stage halves the side.
        blocks: residual blocks of each stage.
        side: pixels to which pictures are brought.
    """

    temperature_H: Tensor

    def __init__(self, *, widths: tuple[int, ...], blocks: tuple[int, ...], side: int) -> None:
        super().__init__()
        self.widths, self.blocks, self.side = tuple(widths), tuple(blocks), side
        self.stages = make_stages(widths, blocks)
        self.heads = nn.ModuleDict({head: nn.Linear(widths[-1], len(names)) for head, names in CLASSES.items()})
        self.register_buffer("temperature_H", torch.ones(len(HEADS)))

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """features_BD of pixels in [-1, 1] of any size."""
        return self.stages(to_side(pixels_BCHW, self.side)).mean(dim=(2, 3))

    def forward(self, pixels_BCHW: Tensor) -> dict[str, Tensor]:
        """Logits by head, uncalibrated."""
        features_BD = self.features(pixels_BCHW)
        return {name: head(features_BD) for name, head in self.heads.items()}

    @torch.inference_mode()
    def judge(self, pixels_BCHW: Tensor, *, batch: int = 64) -> Verdicts:
        """Names what is in the pictures.

        Args:
            pixels_BCHW: in [-1, 1], of any size, on any device.
            batch: pictures at once.
        """
        assert not self.training, "a judge in training mode does not judge"
        labels, confidence, features = [], [], []
        for part_BCHW in pixels_BCHW.split(batch):
            features_BD = self.features(part_BCHW.to(self.temperature_H.device, torch.float32))
            best = []
            for h, head in enumerate(self.heads.values()):
                probabilities_BN = (head(features_BD) / self.temperature_H[h]).softmax(dim=1)
                best.append(probabilities_BN.max(dim=1))
            labels.append(torch.stack([b.indices for b in best], dim=1).cpu())
            confidence.append(torch.stack([b.values for b in best], dim=1).cpu())
            features.append(features_BD.cpu())
        return Verdicts(torch.cat(labels), torch.cat(confidence), torch.cat(features))


def to_side(pixels_BCHW: Tensor, side: int) -> Tensor:
    """Square pictures of that side; as they are where they have it."""
    if pixels_BCHW.shape[-2:] == (side, side):
        return pixels_BCHW
    return F.interpolate(pixels_BCHW, (side, side), mode="bilinear", antialias=True, align_corners=False)


def label_indices(labels: Mapping[str, str]) -> list[int]:
    """Class indices of a triple {"subject": ..., "thing": ..., "setting": ...}, in the order of HEADS."""
    return [CLASSES[head].index(labels[head]) for head in HEADS]


def save_judge(judge: Judge, folder: Path) -> Path:
    """Writes the weights in half precision with the classes and sizes that they belong to; returns the file."""
    weights = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in judge.state_dict().items()
    }
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values()), "a weight does not fit half precision"
    sizes = {"widths": judge.widths, "blocks": judge.blocks, "side": judge.side}
    metadata = {"format": "pt", "classes": json.dumps(CLASSES), "sizes": json.dumps(sizes)}
    path = folder / WEIGHTS_FILE
    with atomic_path(path) as part:
        part.write_bytes(save(weights, metadata=metadata))  # save_file's may be read by their owner alone
        assert part.stat().st_size <= MAX_BYTES, f"the judge takes {part.stat().st_size} bytes"
    return path


def load_judge(folder: Path = JUDGE, *, device: torch.device) -> Judge:
    """Reads a judge, in eval mode and float32.

    Raises:
        UserError: no such file, or one that was trained on other classes than the world's.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(
            f"no judge in {folder}",
            allowed=f"a folder with {WEIGHTS_FILE}",
            do="train one with `scripts/evaluate.py train-judge`, or correct --judge",
        )
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    classes = {head: tuple(names) for head, names in json.loads(metadata.get("classes", "{}")).items()}
    if classes != CLASSES:
        raise UserError(
            f"the judge in {folder} knows other classes than the world has",
            allowed="a judge that was trained on this world",
            do="train it anew with `scripts/evaluate.py train-judge`",
        )
    judge = Judge(**json.loads(metadata["sizes"]))
    judge.load_state_dict(weights)
    return judge.float().to(device).eval().requires_grad_(False)
