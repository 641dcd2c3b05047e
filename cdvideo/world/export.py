"""Put the trained parts into one folder in diffusers' layout, in half precision."""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler
from safetensors.torch import load_file, save

from cdvideo.base.loader import weights_hash
from cdvideo.errors import UserError
from cdvideo.world.wan_parts import SCHEDULER_CONFIG

MAX_BYTES = 32 * 2**20
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "motion")
TEXT_PREFIX = "text_model."  # as Stable Diffusion's own files have it, for readers older than transformers 5
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderTiny"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
}

MAX_WAN_BYTES = 15 * 2**20
WAN_INDEX = {
    "_class_name": "WanPipeline",
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "boundary_ratio": None,
    "expand_timesteps": False,
}


def export_base(model: Path, target: Path) -> None:
    """Writes ``model``'s parts into ``target`` as fp16; other files in ``target`` stay.

    A model that lacks parts is exported without model_index.json, so that nothing takes it for a whole one: enough to
    carry it to another machine, where training goes on from these weights (without optimizer state, with the average
    of the weights in half precision in place of the weights).

    Raises:
        UserError: the folder would be larger than 32 MiB; ``target`` is left as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        new = Path(scratch) / "base"
        shutil.copytree(model, new)
        for file in new.rglob("*.safetensors"):
            weights = {name: _half(tensor) for name, tensor in load_file(file).items()}
            if file.parent.name == "text_encoder":
                weights = {f"{TEXT_PREFIX}{name.removeprefix(TEXT_PREFIX)}": t for name, t in weights.items()}
            file.unlink()  # for a new one as the umask has it: save_file's may be read by their owner alone
            file.write_bytes(save(weights, metadata={"format": "pt"}))
        missing = [part for part in PARTS if not (new / part).is_dir()]
        if not missing:
            index = {"_diffusers_version": version("diffusers"), **MODEL_INDEX}
            (new / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
            _name_base_of_motion(model, new)
        size = sum(file.stat().st_size for file in new.rglob("*") if file.is_file())
        if size > MAX_BYTES:
            raise UserError(
                f"the base takes {size / 2**20:.1f} MiB",
                allowed=f"at most {MAX_BYTES // 2**20} MiB",
                do="choose fewer channels or layers",
            )
        target.mkdir(exist_ok=True)
        for item in new.iterdir():
            old = target / item.name
            if old.is_dir():
                shutil.rmtree(old)
            item.replace(old)
    print(f"exported {size / 2**20:.2f} MiB to {target}" + (f", without {', '.join(missing)}" if missing else ""))


def export_wan(model: Path, target: Path) -> None:
    """Write the embedded Wan's parts into ``target`` as fp16, as diffusers' WanPipeline reads them.

    Raises:
        UserError: the folder would be larger than 15 MiB; ``target`` is left as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        new = Path(scratch) / "base"
        shutil.copytree(model, new)
        for file in new.rglob("*.safetensors"):
            weights = {name: _half(tensor) for name, tensor in load_file(file).items()}
            file.unlink()
            file.write_bytes(save(weights, metadata={"format": "pt"}))
        UniPCMultistepScheduler.from_config(SCHEDULER_CONFIG).save_pretrained(new / "scheduler")
        index = {"_diffusers_version": version("diffusers"), **WAN_INDEX}
        (new / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        size = sum(file.stat().st_size for file in new.rglob("*") if file.is_file())
        if size > MAX_WAN_BYTES:
            raise UserError(
                f"the base takes {size / 2**20:.1f} MiB",
                allowed=f"at most {MAX_WAN_BYTES // 2**20} MiB",
                do="choose fewer channels or layers",
            )
        target.mkdir(exist_ok=True)
        for item in new.iterdir():
            old = target / item.name
            if old.is_dir():
                shutil.rmtree(old)
            item.replace(old)
    print(f"exported {size / 2**20:.2f} MiB to {target}")


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor


def _name_base_of_motion(model: Path, new: Path) -> None:
    """Motion modules that were trained for ``model`` as it stands are told to belong to it in half precision."""
    file = new / "motion" / "config.json"
    config = json.loads(file.read_text())
    if config["_trained_for"] == weights_hash(model):
        config["_trained_for"] = weights_hash(new)
        file.write_text(json.dumps(config, indent=2) + "\n")
