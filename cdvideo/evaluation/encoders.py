"""What compares pictures with pictures and with texts: the world's identity encoder, and local CLIP, DINO and BLIP.

The models of transformers are read from folders that the user has; none is fetched. A figure names the encoder that it
was taken with: the identity encoder's is never called CLIP's or DINO's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cdvideo.errors import UserError
from cdvideo.evaluation.bench import to_pixels
from cdvideo.evaluation.drawing import Pictures
from cdvideo.evaluation.identity.model import IDENTITY, load_identity

if TYPE_CHECKING:
    from cdvideo.evaluation.judge.model import Judge

Features: TypeAlias = NDArray[np.floating]
BATCH = 64  # pictures at once


class ImageEncoder(Protocol):
    """Turns pictures into features whose cosines compare them. name: what it is, with a hash of its weights."""

    name: str

    def images(self, images_BHWC: Pictures) -> Features:
        """Unit features_BD of uint8 RGB pictures."""


class TextScorer(Protocol):
    """Says how well pictures agree with texts. name: what it is, with a hash of its weights."""

    name: str

    def agree(self, images_BHWC: Pictures, texts: Sequence[str]) -> Features:
        """scores_B of uint8 RGB pictures, each beside its own text."""


class IdentityEncoder:
    """The encoder of individuals of the illustrated world (identity/model.py)."""

    def __init__(self, folder: Path = IDENTITY, *, device: torch.device) -> None:
        self.net, self.device = load_identity(folder, device=device), device
        self.name = f"identity encoder of the world {weights_hash(self.net)}"

    def images(self, images_BHWC: Pictures) -> Features:
        """Unit features_BD."""
        return _by_batches(lambda part_BHWC: self.net(to_pixels(part_BHWC).to(self.device)), images_BHWC)


class JudgeEncoder:
    """The judge's features before its heads: subject, thing and setting together, so they see copied backdrops."""

    def __init__(self, judge: Judge) -> None:
        self.judge, self.name = judge, f"judge's features {weights_hash(judge)}"

    def images(self, images_BHWC: Pictures) -> Features:
        """Unit features_BD."""
        return F.normalize(self.judge.judge(to_pixels(images_BHWC)).features_BD, dim=1).numpy()


class ClipEncoder:
    """CLIP (arXiv 2103.00020): CLIP-I by `images`, CLIP-T by `agree`, both unscaled cosines of projected features."""

    def __init__(self, folder: Path, *, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        self.device = device
        self.model = _load(CLIPModel, folder, "clip").to(device).eval()
        self.prepare = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.name = f"CLIP {folder.name} {weights_hash(self.model)}"

    def images(self, images_BHWC: Pictures) -> Features:
        """Unit features_BD of the pictures, in the space shared with texts."""

        def encode(part_BHWC: Pictures) -> Tensor:
            pixels = self.prepare(images=list(part_BHWC), return_tensors="pt").to(self.device)
            return _pooled(self.model.get_image_features(**pixels))

        return _by_batches(encode, images_BHWC)

    def texts(self, texts: Sequence[str]) -> Features:
        """Unit features_BD of the texts; words beyond CLIP's 77 tokens are cut off."""

        def encode(part: Sequence[str]) -> Tensor:
            tokens = self.tokenizer(list(part), padding=True, truncation=True, return_tensors="pt").to(self.device)
            return _pooled(self.model.get_text_features(**tokens))

        return _by_batches(encode, texts)

    def agree(self, images_BHWC: Pictures, texts: Sequence[str]) -> Features:
        """Cosine of each picture and its text."""
        assert len(images_BHWC) == len(texts), f"{len(images_BHWC)} pictures, {len(texts)} texts"
        return (self.images(images_BHWC) * self.texts(texts)).sum(axis=1)


class DinoEncoder:
    """DINO (arXiv 2104.14294) or DINOv2: the class token after the last layer norm. DreamBooth's DINO-I is ViT-S/16."""

    def __init__(self, folder: Path, *, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoModel

        self.device = device
        self.model = _load(AutoModel, folder, "vit", "dinov2", "dinov3_vit").to(device).eval()
        self.prepare = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        self.name = f"DINO {folder.name} {weights_hash(self.model)}"

    def images(self, images_BHWC: Pictures) -> Features:
        """Unit features_BD."""

        def encode(part_BHWC: Pictures) -> Tensor:
            pixels = self.prepare(images=list(part_BHWC), return_tensors="pt").to(self.device)
            return self.model(**pixels).last_hidden_state[:, 0]

        return _by_batches(encode, images_BHWC)


class BlipScorer:
    """BLIP (arXiv 2201.12086) or BLIP-2 (arXiv 2301.12597) for image-text retrieval, by its contrastive cosine.

    What ClassDiffusion (arXiv 2405.17532) calls BLIP2-T is, in its code, this cosine of BLIP's large COCO model; of
    BLIP-2 it is the largest over the query tokens. The name says which of them it is.
    """

    def __init__(self, folder: Path, *, device: torch.device) -> None:
        from transformers import (
            AutoImageProcessor,
            AutoTokenizer,
            Blip2ForImageTextRetrieval,
            BlipForImageTextRetrieval,
        )

        self.device = device
        self.second = _model_type(folder, "blip", "blip-2") == "blip-2"
        kind = Blip2ForImageTextRetrieval if self.second else BlipForImageTextRetrieval
        self.model = _load(kind, folder, "blip", "blip-2").to(device).eval()
        self.model.config.image_token_index = None  # BLIP-2 would cut off placeholders that our texts do not have
        self.prepare = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.name = f"{'BLIP-2' if self.second else 'BLIP'} {folder.name} {weights_hash(self.model)}"

    @torch.inference_mode()
    def agree(self, images_BHWC: Pictures, texts: Sequence[str]) -> Features:
        """Contrastive cosine of each picture and its text."""
        assert len(images_BHWC) == len(texts), f"{len(images_BHWC)} pictures, {len(texts)} texts"
        scores = []
        for start in range(0, len(texts), BATCH):
            part = slice(start, start + BATCH)
            pixels = self.prepare(images=list(images_BHWC[part]), return_tensors="pt")["pixel_values"]
            tokens = self.tokenizer(list(texts[part]), padding=True, truncation=True, return_tensors="pt")
            inputs = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
            inputs["pixel_values"] = pixels.to(self.device)
            if self.second:
                scores_BB = self.model(**inputs, use_image_text_matching_head=False).logits_per_image
            else:
                scores_BB = self.model(**inputs, use_itm_head=False).itm_score
            scores.append(scores_BB.diagonal().float().cpu().numpy())
        return np.concatenate(scores)


def weights_hash(model: nn.Module) -> str:
    """What tells one model from another of its kind: a short digest of its weights."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:10]


def _pooled(found: Any) -> Tensor:
    """Of transformers before 5 the features themselves."""
    features: Tensor = getattr(found, "pooler_output", found)
    return features


@torch.inference_mode()
def _by_batches(encode: Callable[[Any], Tensor], items: Pictures | Sequence[str]) -> Features:
    """Unit features of all items."""
    parts = [encode(items[start : start + BATCH]).float() for start in range(0, len(items), BATCH)]
    return F.normalize(torch.cat(parts), dim=1).cpu().numpy()


def _load(kind: Any, folder: Path, *model_types: str) -> Any:
    """The model in a folder, in float32, from safetensors alone. Raises UserError where there is none of the kind."""
    _model_type(folder, *model_types)
    return kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)


def _model_type(folder: Path, *model_types: str) -> str:
    from transformers import AutoConfig

    found = ""
    if (folder / "config.json").is_file():
        found = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    if found not in model_types:
        raise UserError(
            f"{folder} holds {f'a model of type {found!r}' if found else 'no model'}",
            allowed=f"a folder of transformers with a model of type {' or '.join(model_types)}",
            do="correct the folder, or leave this metric out",
        )
    return found
