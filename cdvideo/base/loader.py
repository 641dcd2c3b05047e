"""Load a base: the embedded one, a local diffusers folder, or a hub id where the user writes one."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from cdvideo.base.latents import Vae
from cdvideo.errors import UserError

TINY_BASE = Path(__file__).parent / "tiny"
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
HASHED_PARTS = ("unet", "text_encoder", "vae")


@dataclass
class Base:
    """An image model with all that belongs to it, modules in eval mode and frozen. ``resolution``: native pixels."""

    name: str
    path: Path
    hash: str
    unet: UNet2DConditionModel
    vae: Vae
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler_config: dict[str, Any]
    resolution: int
    device: torch.device
    dtype: torch.dtype

    def to(self, device: torch.device, dtype: torch.dtype) -> Base:
        """Move all modules, in place."""
        for module in (self.unet, self.vae, self.text_encoder):
            nn.Module.to(module, device=device, dtype=dtype)  # diffusers' own warns of every cast, with nothing to say
        self.device, self.dtype = device, dtype
        return self


def load_base(name: str = "tiny", *, device: torch.device, dtype: torch.dtype = torch.float32) -> Base:
    """Load a base by name.

    Args:
        name: "tiny" (the embedded base), a local folder in diffusers' layout, or a hub id "owner/model"; only a hub id
            ever touches the network.

    Raises:
        UserError: no such folder, or a part of it is missing or of another kind than Stable Diffusion's.
    """
    path = _find_base(name)
    for part in PARTS:
        if not (path / part).is_dir():
            raise UserError(
                f"base {name!r}: {path} has no folder {part!r}",
                allowed=f"a diffusers folder with {', '.join(PARTS)}",
                do="give another --base, or rebuild the embedded one with scripts/make_base.py",
            )
    vae_config = json.loads((path / "vae" / "config.json").read_text())
    vae_class = AutoencoderTiny if vae_config["_class_name"] == "AutoencoderTiny" else AutoencoderKL
    base = Base(
        name=name,
        path=path,
        hash=weights_hash(path),
        unet=UNet2DConditionModel.from_pretrained(path, subfolder="unet", torch_dtype=dtype),
        vae=vae_class.from_pretrained(path, subfolder="vae", torch_dtype=dtype),
        text_encoder=load_text_encoder(path / "text_encoder", dtype=dtype),
        tokenizer=CLIPTokenizer.from_pretrained(path, subfolder="tokenizer"),
        scheduler_config=dict(DDIMScheduler.load_config(path, subfolder="scheduler")),
        resolution=0,
        device=device,
        dtype=dtype,
    )
    base.resolution = int(base.unet.config.sample_size) * 2 ** (len(base.vae.config.block_out_channels) - 1)
    for module in (base.unet, base.vae, base.text_encoder):
        module.to(device).eval().requires_grad_(False)
    return base


def load_text_encoder(folder: Path, *, dtype: torch.dtype = torch.float32) -> CLIPTextModel:
    """A text encoder on the CPU, without the progress bar that transformers shows for every file."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        return CLIPTextModel.from_pretrained(folder, dtype=dtype)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _find_base(name: str) -> Path:
    if name == "tiny":
        return TINY_BASE
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.parent.is_dir():
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=[f"{part}/*" for part in PARTS] + ["model_index.json"]))
    raise UserError(
        f"base {name!r}: no such folder",
        allowed="'tiny', a local diffusers folder, or a hub id 'owner/model'",
        do="check the path given with --base",
    )


def weights_hash(path: Path) -> str:
    """16 hex digits of the SHA-256 over the weight files of UNet, text encoder and VAE, names included.

    Raises:
        UserError: a part has no safetensors weights.
    """
    digest = hashlib.sha256()
    for part in HASHED_PARTS:
        files = sorted((path / part).glob("*.safetensors"))
        if not files:
            raise UserError(
                f"{path / part} holds no .safetensors weights",
                allowed="weights in safetensors files (no pickle)",
                do="convert the base to safetensors, or give another --base",
            )
        for file in files:
            digest.update(f"{part}/{file.name}".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
