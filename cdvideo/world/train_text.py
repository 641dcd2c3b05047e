"""Train the base's text encoder: contrastively against a small image tower (CLIP, arXiv 2103.00020), then frozen.

The end-of-text feature is compared with the picture as it is, without a projection, so that cosines between features of
phrases, which the semantic preservation loss lives on, mean what they were trained to mean.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cdvideo.base.folder import load_text_encoder
from cdvideo.world.config import MakeBaseConfig, TextConfig
from cdvideo.world.dataset import read_labels
from cdvideo.world.muon import make_optimizers
from cdvideo.world.training import Average, Limits, Stage, autocast, load_array, to_pixels

CLASS_PHRASES = (
    "a {}",
    "the {}",
    "a picture of a {}",
    "my {}",
    "a small {}",
    "a {} in the snow",
    "a red {}",
    "a {} at night",
)
FACTOR_SCALE = 16.0  # sharpness of the cosine classifiers


class ImageTower(nn.Module):
    """pixels_BCHW to features_BD; needed for training alone, and thrown away after it."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, stride=2, padding=1)
        self.stages = nn.ModuleList()
        for level in range(3):
            channels = width * 2**level
            self.stages.append(nn.Sequential(_Residual(channels), _Residual(channels)))
            if level < 2:
                self.stages.append(nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1))
        self.head = nn.Linear(4 * width, out)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        hidden_BCHW = self.stem(pixels_BCHW)
        for stage in self.stages:
            hidden_BCHW = stage(hidden_BCHW)
        return self.head(hidden_BCHW.mean(dim=(2, 3)))


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        norms = [nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)]
        convs = [nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)]
        self.body = nn.Sequential(norms[0], nn.SiLU(), convs[0], norms[1], nn.SiLU(), convs[1])

    def forward(self, hidden_BCHW: Tensor) -> Tensor:
        return hidden_BCHW + self.body(hidden_BCHW)


def build_text_encoder(config: TextConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            projection_dim=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.length,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Towers(nn.Module):
    """Text encoder, image tower, temperature, and one cosine classifier per factor, shared by both towers."""

    def __init__(self, text: CLIPTextModel, image: ImageTower, classes: dict[str, int]) -> None:
        super().__init__()
        self.text: CLIPTextModel = text
        self.image: ImageTower = image
        self.log_scale_head = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.factor_heads = nn.ParameterDict(
            {name: nn.Parameter(torch.randn(count, text.config.hidden_size)) for name, count in classes.items()}
        )

    def forward(self, ids_BL: Tensor, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Unit-length text_BD and image_BD."""
        text_BD = self.text(input_ids=ids_BL).pooler_output
        return F.normalize(text_BD.float(), dim=-1), F.normalize(self.image(pixels_BCHW).float(), dim=-1)

    def contrastive_loss(self, text_BD: Tensor, image_BD: Tensor) -> Tensor:
        """Symmetric InfoNCE (arXiv 2103.00020, figure 3), temperature learned and held at 0.01 or more."""
        logits_BB = self.log_scale_head.exp().clamp(max=100) * text_BD @ image_BD.mT
        own = torch.arange(len(logits_BB), device=logits_BB.device)
        return (F.cross_entropy(logits_BB, own) + F.cross_entropy(logits_BB.mT, own)) / 2

    def factor_loss(self, features_BD: Tensor, factors: dict[str, Tensor]) -> Tensor:
        """Mean cross entropy of naming each factor from the feature."""
        losses = [
            F.cross_entropy(FACTOR_SCALE * features_BD @ F.normalize(self.factor_heads[name], dim=-1).mT, target_B)
            for name, target_B in factors.items()
        ]
        return torch.stack(losses).mean()


def train_text(config: MakeBaseConfig, device: torch.device, limits: Limits) -> dict[str, Any]:
    """Trains, saves model/text_encoder, and returns the recorded facts: retrieval and class clustering included."""
    torch.manual_seed(config.seed)
    folder, settings, loop = config.out / "text", config.text, config.text.loop
    tokenizer = CLIPTokenizer.from_pretrained(config.out / "model" / "tokenizer")
    factors_N, classes = load_factors(config, device)
    images_NHWC = load_array(config.cache / "train" / "pixels.npy", device)
    ids_NKL = load_array(config.cache / "train" / "caption_ids.npy", device)
    earlier = config.out / "model" / "text_encoder"
    text = load_text_encoder(earlier) if earlier.is_dir() else build_text_encoder(settings, tokenizer)
    towers = Towers(text, ImageTower(settings.image_width, settings.width), classes)
    towers = towers.to(device).train()
    towers.image.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = Average(towers, decay=loop.ema)
    optimizers = make_optimizers(towers, lr=loop.lr)
    generator = torch.Generator(device).manual_seed(config.seed)
    models = {"towers": towers, "average": average.model}
    stage = Stage(folder, loop=loop, models=models, optimizers=optimizers, generator=generator, limits=limits)
    forward = torch.compile(towers, dynamic=False) if loop.compile else towers

    for step in stage.steps():
        picks_B = torch.randint(len(images_NHWC), (loop.batch,), generator=generator, device=device)
        column_B = torch.randint(ids_NKL.shape[1], (loop.batch,), generator=generator, device=device)
        ids_BL = ids_NKL[picks_B, column_B].long()
        pixels_BCHW = shrink(to_pixels(images_NHWC[picks_B]), settings.image_size)
        with autocast(device, config.dtype):
            text_BD, image_BD = forward(ids_BL, pixels_BCHW)
        targets = {name: values_N[picks_B] for name, values_N in factors_N.items()}
        contrast = towers.contrastive_loss(text_BD, image_BD)
        named = towers.factor_loss(text_BD, targets) + towers.factor_loss(image_BD, targets)
        (contrast + settings.factor_weight * named).backward()
        nn.utils.clip_grad_norm_(towers.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update(step)
        stage.log(contrastive=contrast.detach(), factors=named.detach())

    average.model.text.save_pretrained(config.out / "model" / "text_encoder")
    facts = {"steps": stage.step, "of": stage.total, "seconds": stage.seconds, "batch": loop.batch}
    subjects = sorted({str(item["subject"]) for item in read_labels(config.cache / "train")})
    return facts | retrieval(average.model, config, device) | class_clustering(average.model.text, tokenizer, subjects)


def shrink(pixels_BCHW: Tensor, size: int) -> Tensor:
    return F.adaptive_avg_pool2d(pixels_BCHW, size)


def load_factors(config: MakeBaseConfig, device: torch.device) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Factor name -> class of every training scene, and the number of classes of each."""
    labels = read_labels(config.cache / "train")
    factors, classes = {}, {}
    for name in sorted(labels[0].keys() - {"captions"}):
        kinds, indices = np.unique([str(item[name]) for item in labels], return_inverse=True)
        factors[name] = torch.from_numpy(indices.astype(np.int64)).to(device)
        classes[name] = len(kinds)
    return factors, classes


@torch.no_grad()
def retrieval(towers: Towers, config: MakeBaseConfig, device: torch.device) -> dict[str, float]:
    """Of held-out scenes: how often a caption's own picture is the nearest of all to it, and among the nearest five."""
    images_NHWC = load_array(config.cache / "heldout" / "pixels.npy", device)
    ids_NL = load_array(config.cache / "heldout" / "caption_ids.npy", device)[:, 0].long()
    parts = [
        towers(ids, shrink(to_pixels(images), config.text.image_size))
        for ids, images in zip(ids_NL.split(128), images_NHWC.split(128), strict=True)
    ]
    text_ND, image_ND = (torch.cat(features) for features in zip(*parts, strict=True))
    similarity_NN = text_ND @ image_ND.mT
    rank_N = (similarity_NN > similarity_NN.diagonal()[:, None]).sum(dim=1)
    return {
        "retrieval_of": len(rank_N),
        "retrieval_top1": round(float((rank_N < 1).float().mean()), 4),
        "retrieval_top5": round(float((rank_N < 5).float().mean()), 4),
    }


@torch.no_grad()
def class_clustering(text: CLIPTextModel, tokenizer: CLIPTokenizer, subjects: list[str]) -> dict[str, float]:
    """Mean cosine of phrases of one class to each other, and to the phrases of the nearest other class."""
    phrases = [phrase.format(subject) for subject in subjects for phrase in CLASS_PHRASES]
    ids = tokenizer(phrases, padding="max_length", truncation=True, return_tensors="pt").input_ids
    features_ND = F.normalize(text(input_ids=ids.to(text.device)).pooler_output.float(), dim=-1)
    features_SPD = features_ND.view(len(subjects), len(CLASS_PHRASES), -1)
    cosine_SS = torch.einsum("spd,tqd->st", features_SPD, features_SPD) / len(CLASS_PHRASES) ** 2
    # A phrase's cosine to itself is 1 and says nothing: it is taken out of the mean within a class.
    count = len(CLASS_PHRASES)
    within_S = (cosine_SS.diagonal() * count - 1) / (count - 1)
    nearest_S = (cosine_SS - 2 * torch.eye(len(subjects), device=cosine_SS.device)).max(dim=1).values
    return {
        "cosine_within_class": round(float(within_S.mean()), 4),
        "cosine_nearest_class": round(float(nearest_S.mean()), 4),
        "smallest_margin": round(float((within_S - nearest_S).min()), 4),
    }
