"""Make the embedded base from nothing: render the world, train every part, put them into one diffusers folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, AutoencoderTiny, UNet2DConditionModel, WanTransformer3DModel
from torch import nn
from transformers import CLIPTokenizer, UMT5EncoderModel

from cdvideo.base.folder import load_text_encoder
from cdvideo.config import to_yaml
from cdvideo.device import use_device
from cdvideo.errors import UserError
from cdvideo.motion.files import load_motion
from cdvideo.runs import atomic_path, ensure_writable
from cdvideo.world.card import write_card
from cdvideo.world.config import STAGES, WAN_STAGES, MakeBaseConfig
from cdvideo.world.dataset import SPLITS, IllustratedWorld, Split, World, read_labels, render_split, rendered_with
from cdvideo.world.export import export_base, export_wan
from cdvideo.world.tokenizer import caption_words, tokenize_split, train_tokenizer
from cdvideo.world.train_motion import train_motion
from cdvideo.world.train_text import train_text
from cdvideo.world.train_unet import train_unet
from cdvideo.world.train_vae import encode_world, train_vae
from cdvideo.world.train_wan import tokenize_wan_world, train_wan
from cdvideo.world.train_wan_vae import encode_wan_world, train_wan_vae
from cdvideo.world.training import Limits

TRAINED = {
    "vae": train_vae,
    "text": train_text,
    "unet": train_unet,
    "motion": train_motion,
    "wan-vae": train_wan_vae,
    "wan": train_wan,
}
DATA: dict[str, tuple[Split, ...]] = {  # what a stage reads of the rendered world
    "vae": ("train", "heldout"),
    "text": ("train", "heldout"),
    "latents": SPLITS,
    "unet": ("train",),
    "motion": ("clips",),
    "wan-vae": SPLITS,
    "wan-latents": SPLITS,
    "wan": ("train", "clips"),
}
LATENTS = {"unet": "latents.npy", "motion": "latents.npy", "wan": "wan_latents.npy"}
PARTS = {  # what it reads of the models, below config.out
    "latents": ("model/vae",),
    "unet": ("model/vae", "model/tokenizer", "model/text_encoder"),
    "motion": ("model/vae", "model/tokenizer", "model/text_encoder", "model/unet"),
    "export": ("model/vae", "model/training.json"),
    "wan-latents": ("model-wan/vae",),
    "wan": ("model-wan/vae",),
    "wan-export": ("model-wan/vae", "model-wan/transformer", "model-wan/training.json"),
}


def make_base(
    config: MakeBaseConfig,
    stages: Sequence[str],
    *,
    limits: Limits,
    sprites: Path,
    export: Path,
    world: World | None = None,
) -> None:
    """Runs stages in the given order; each takes up its own earlier state. ``world`` defaults to the illustrated one.

    Raises:
        UserError: a stage needs what an earlier one has not made yet, or sprites are missing.
    """
    ensure_writable(config.out)
    device = use_device(config.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    (config.out / "config.yaml").write_text(to_yaml(config))
    for stage in stages:
        _require(stage, config)
        if stage == "sprites":
            _fetch(sprites)
        elif stage in ("data", "scenes", "clips"):
            splits: dict[str, tuple[Split, ...]] = {"data": SPLITS, "scenes": SPLITS[:2], "clips": SPLITS[2:]}
            render(config, splits[stage], world or IllustratedWorld(sprites))
        elif stage == "latents":
            encode_world(config, device)
        elif stage == "export":
            export_base(config.out / "model", export)
            write_card(config, export)
        elif stage == "wan-latents":
            encode_wan_world(config, device)
        elif stage == "wan-export":
            export_wan(config.out / "model-wan", export)
        else:
            if stage == "wan":
                tokenize_wan_world(config, common_words(sprites))
            if stage == "text":
                make_tokenizer(config, sprites)
            if stage in ("unet", "motion"):
                tokenize_world(config, sprites)
            data = {split: rendered_with(config.cache / split) for split in DATA[stage]}
            record(config, stage, {**TRAINED[stage](config, device, limits), "data": data}, device)


def _require(stage: str, config: MakeBaseConfig) -> None:
    files = ("labels.jsonl", LATENTS[stage]) if stage in LATENTS else ("labels.jsonl",)
    paths = [config.cache / split / file for split in DATA.get(stage, ()) for file in files]
    for path in (*paths, *(config.out / part for part in PARTS.get(stage, ()))):
        if not path.exists():
            raise UserError(
                f"stage {stage!r} needs {path}, which is not there",
                allowed=f"stages in the order {', '.join(WAN_STAGES if stage.startswith('wan') else STAGES)}",
                do="run the earlier stages first",
            )


def _fetch(sprites: Path) -> None:
    from cdvideo.world.sprites import fetch_sprites

    if not any(sprites.glob("*/*.png")):
        fetch_sprites(sprites)


def render(config: MakeBaseConfig, splits: Sequence[Split], world: World) -> None:
    """Renders the splits into the cache."""
    counts = {"train": config.data.scenes, "heldout": config.data.heldout_scenes, "clips": config.data.clips}
    for split in splits:
        render_split(
            world,
            config.cache / split,
            split,
            counts[split],
            size=config.resolution,
            frames=config.data.frames,
            captions=config.data.captions,
            seed=config.seed,
            workers=config.workers,
        )


def make_tokenizer(config: MakeBaseConfig, sprites: Path) -> None:
    """Learns the vocabulary from the training captions, once, and tokenises the splits that are rendered."""
    folder = config.out / "model" / "tokenizer"
    if not folder.is_dir():
        captions = [str(text) for item in read_labels(config.cache / "train") for text in item["captions"]]
        train_tokenizer(
            folder,
            world_words=caption_words(captions),
            common_words=common_words(sprites),
            size=config.text.vocabulary,
            length=config.text.length,
        )
    tokenize_world(config, sprites)


def tokenize_world(config: MakeBaseConfig, sprites: Path) -> None:
    """Writes the caption ids of each rendered split that has none newer than its captions."""
    tokenizer = CLIPTokenizer.from_pretrained(config.out / "model" / "tokenizer")
    for split in SPLITS:
        labels, ids = config.cache / split / "labels.jsonl", config.cache / split / "caption_ids.npy"
        if labels.exists() and not (ids.exists() and ids.stat().st_mtime > labels.stat().st_mtime):
            tokenize_split(config.cache / split, tokenizer, common_words=common_words(sprites), seed=config.seed)


def common_words(sprites: Path) -> list[str]:
    """English words beside the world's: names and tags of pictures that lie with the sprites, where there are any."""
    file = sprites / "words.json"
    return [str(word) for word in json.loads(file.read_text())] if file.exists() else []


def record(config: MakeBaseConfig, stage: str, facts: dict[str, Any], device: torch.device) -> None:
    """Keeps what was measured, for the model card: training.json beside the parts, one entry per stage."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    model = config.out / ("model-wan" if stage.startswith("wan") else "model")
    trained: Sequence[nn.Module] = {
        "vae": lambda: [AutoencoderTiny.from_pretrained(model / "vae")],
        "text": lambda: [load_text_encoder(model / "text_encoder")],
        "unet": lambda: [UNet2DConditionModel.from_pretrained(model / "unet")],
        "motion": lambda: [load_motion(model / "motion", device=torch.device("cpu"))],
        "wan-vae": lambda: [AutoencoderKLWan.from_pretrained(model / "vae")],
        "wan": lambda: [
            WanTransformer3DModel.from_pretrained(model / "transformer"),
            UMT5EncoderModel.from_pretrained(model / "text_encoder"),
        ],
    }[stage]()
    parameters = sum(p.numel() for part in trained for p in part.parameters())
    file = model / "training.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    known[stage] = {**facts, "parameters": parameters, "device": name, "dtype": config.dtype}
    with atomic_path(file) as part:
        part.write_text(json.dumps(known, indent=2) + "\n")
    print(f"{stage}: {json.dumps(known[stage])}")
