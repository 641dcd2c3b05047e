"""Load a base: the embedded one, a local diffusers folder or single file, or a hub id where the user writes one."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from cdvideo.base.checkpoint import read_tensors
from cdvideo.base.latents import Vae, vae_dtype
from cdvideo.base.single_file import BaseParts, check_added_inputs, read_single_file
from cdvideo.errors import UserError

logger = logging.getLogger(__name__)

TINY_BASE = Path(__file__).parent / "tiny"
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
SECOND_TEXT_PARTS = ("text_encoder_2", "tokenizer_2")  # of SDXL
HASHED_PARTS = ("unet", "text_encoder", "vae")

# What is read of each part: neither variants (fp16, non_ema), nor the same weights as pickles, ONNX, Flax or OpenVINO.
_CONFIGS = (
    "*config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_WEIGHTS = tuple(
    f"{stem}{ending}"
    for stem in ("diffusion_pytorch_model", "model")
    for ending in (".safetensors", "-?????-of-?????.safetensors")
)
HUB_FILES = (
    "model_index.json",
    *(
        f"{part}/{name}"
        for part in (*PARTS, *SECOND_TEXT_PARTS)
        for name in (*_CONFIGS, *_WEIGHTS, "*.safetensors.index.json")
    ),
)


# The VAE's attention as folders of Stable Diffusion 1 name it, from before diffusers had one class for all attentions.
_OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
_OLD_ATTENTION = re.compile("|".join(map(re.escape, _OLD_NAMES)))


@dataclass
class Base:
    """An image model with all that belongs to it, modules in eval mode and frozen.

    resolution: native pixels.
    text_encoder_2, tokenizer_2: SDXL's second ones; None of other bases.
    zero_empty_prompt: whether the empty prompt is zeros in place of its encoding, as SDXL learned guidance.
    """

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
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: CLIPTokenizer | None = None
    zero_empty_prompt: bool = False

    @property
    def is_sdxl(self) -> bool:
        return self.text_encoder_2 is not None

    @property
    def text_encoders(self) -> dict[str, CLIPTextModel | CLIPTextModelWithProjection]:
        """The one, or SDXL's two, by their names in files."""
        second = {} if self.text_encoder_2 is None else {"text_encoder_2": self.text_encoder_2}
        return {"text_encoder": self.text_encoder, **second}

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return (self.unet, self.vae, *self.text_encoders.values())

    def to(self, device: torch.device, dtype: torch.dtype, *, resting: Collection[str] = ()) -> Base:
        """Move all modules, in place; those of the parts that rest, into RAM (`load_base`)."""
        assert {*resting} <= {*HASHED_PARTS}, f"no such parts: {resting}"
        for part, module in {"unet": self.unet, "vae": self.vae, **self.text_encoders}.items():
            own = vae_dtype(self.vae, dtype, is_sdxl=self.is_sdxl) if part == "vae" else dtype
            home = torch.device("cpu") if part.removesuffix("_2") in resting else device
            nn.Module.to(module, device=home, dtype=own)  # diffusers' own warns of every cast, with nothing to say
        self.device, self.dtype = device, dtype
        return self


def load_base(
    name: str = "tiny",
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    resting: Collection[str] = (),
    report: Callable[[str], object] = logger.info,
) -> Base:
    """Load a base by name.

    Args:
        name: "tiny" (the embedded base), a local folder in diffusers' layout, a .safetensors or .ckpt file of Stable
            Diffusion 1.x, 2.x or XL, or a hub id "owner/model"; only a hub id ever touches the network.
        resting: those of "unet", "vae" and "text_encoder" (SDXL's both) that stay in RAM, to be on the device only
            while they work (base/offload.py); on the CPU it makes no difference.
        report: is told in a line what was found, how many tensors found their place, the prediction and the schedule.

    Raises:
        UserError: no such path, a part of it is missing or of another kind than Stable Diffusion's, or a weight has no
            place.
    """
    path = find_base(name)
    if path.is_dir():
        _check_folder(path, name)
    base_hash = weights_hash(path)
    parts = read_single_file(path, dtype=dtype) if path.is_file() else _read_folder(path, dtype)
    base = Base(
        name=name,
        path=path,
        hash=base_hash,
        unet=parts.unet,
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        scheduler_config=parts.scheduler_config,
        resolution=int(parts.unet.config.sample_size) * 2 ** (len(parts.vae.config.block_out_channels) - 1),
        device=device,
        dtype=dtype,
        text_encoder_2=parts.text_encoder_2,
        tokenizer_2=parts.tokenizer_2,
        zero_empty_prompt=parts.zero_empty_prompt,
    ).to(device, dtype, resting=resting)
    for module in base.modules:
        module.eval().requires_grad_(False)
    matched = ", ".join(f"{part} {number}/{number}" for part, number in parts.matched.items())
    prediction, betas = (parts.scheduler_config.get(key) for key in ("prediction_type", "beta_schedule"))
    report(f"base {name}: {parts.found}; matched {matched}; predicts {prediction}, betas {betas}, hash {base_hash}")
    return base


def _check_folder(path: Path, name: str) -> None:
    parts = (*PARTS, *SECOND_TEXT_PARTS) if is_sdxl_folder(path) else PARTS
    for part in parts:
        if not (path / part).is_dir():
            raise UserError(
                f"base {name!r}: {path} has no folder {part!r}",
                allowed=f"a diffusers folder with {', '.join(parts)}",
                do="give another --base, or rebuild the embedded one with scripts/make_base.py",
            )


def is_sdxl_folder(path: Path) -> bool:
    """Whether the UNet also reads a pooled text and sizes, as its config says."""
    config = path / "unet" / "config.json"
    return config.is_file() and json.loads(config.read_text()).get("addition_embed_type") == "text_time"


def _read_folder(path: Path, dtype: torch.dtype) -> BaseParts:
    is_sdxl = is_sdxl_folder(path)
    # First the text encoders, which are read whole before they are cast: by then little else is in memory.
    text_encoder = load_text_encoder(path / "text_encoder", dtype=dtype)
    second = _read_second_text(path, dtype) if is_sdxl else {}
    vae_class = json.loads((path / "vae" / "config.json").read_text())["_class_name"]
    vae = _empty(path, "vae", AutoencoderTiny if vae_class == "AutoencoderTiny" else AutoencoderKL)
    _fill(vae, path, "vae", vae_dtype(vae, dtype, is_sdxl=is_sdxl))
    unet = _empty(path, "unet", UNet2DConditionModel)
    if unet.config.in_channels != vae.config.latent_channels:
        raise UserError(
            f"the UNet in {path} reads {unet.config.in_channels} channels, its VAE has {vae.config.latent_channels}",
            allowed="text-to-image models; those for inpainting, depth or editing read more than noise",
            do="give another --base",
        )
    if second:
        check_added_inputs(unet, second["text_encoder_2"].config.projection_dim, path.name)
    _fill(unet, path, "unet", dtype)
    modules = {"UNet": unet, "VAE": vae, "text encoder": text_encoder}
    if second:
        modules["second text encoder"] = second["text_encoder_2"]
    return BaseParts(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(path, subfolder="tokenizer"),
        # Latents go beyond [-1, 1]; folders of samplers that never clip do not say so, and DDIM would. Those of Stable
        # Diffusion 1 are older than other predictions than that of noise.
        scheduler_config={
            "clip_sample": False,
            "prediction_type": "epsilon",
            **DDIMScheduler.load_config(path, subfolder="scheduler"),
        },
        found=f"{'SDXL, ' if second else ''}a folder in diffusers' layout",
        matched={part: len(module.state_dict()) for part, module in modules.items()},
        **second,
    )


def _empty(path: Path, part: str, kind: Any) -> Any:
    with init_empty_weights():
        return kind.from_config(kind.load_config(path, subfolder=part))


def _fill(module: nn.Module, path: Path, part: str, dtype: torch.dtype) -> None:
    """Gives an empty module the weights of its folder; not `from_pretrained`, which has them twice when it casts."""
    given: dict[str, Tensor] = {}
    for file in _weight_files(path / part):
        for name, tensor in read_tensors(file, dtype_of=lambda _: dtype).items():
            given[_OLD_ATTENTION.sub(lambda found: _OLD_NAMES[found[0]], name)] = tensor
    wanted = {name: tensor.shape for name, tensor in module.state_dict().items()}
    shared = wanted.keys() & given.keys()
    info = {
        "missing_keys": wanted.keys() - shared,
        "unexpected_keys": given.keys() - shared,
        "mismatched_keys": {name for name in shared if given[name].shape != wanted[name]},
    }
    _check_all_matched({"unet": "UNet", "vae": "VAE"}[part], info, path)
    module.load_state_dict(given, assign=True)


def _read_second_text(path: Path, dtype: torch.dtype) -> dict[str, Any]:
    """What a folder of SDXL has beside the parts of all: fields of BaseParts."""
    encoder = load_text_encoder(path / "text_encoder_2", dtype=dtype, kind=CLIPTextModelWithProjection)
    index = path / "model_index.json"
    said = json.loads(index.read_text()) if index.is_file() else {}
    return {
        "text_encoder_2": encoder,
        "tokenizer_2": CLIPTokenizer.from_pretrained(path, subfolder="tokenizer_2"),
        "zero_empty_prompt": bool(said.get("force_zeros_for_empty_prompt", True)),
    }


def _check_all_matched(part: str, info: Mapping[str, Collection[Any]], path: Path) -> None:
    """Raises UserError for weights without a place, and for places that would keep random weights."""
    wrong = {kind: info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if wrong:
        told = ", ".join(
            f"{len(keys)} {kind.removesuffix('_keys')} (such as {min(map(str, keys))})" for kind, keys in wrong.items()
        )
        raise UserError(
            f"the {part} in {path}: {told}",
            allowed="weights that fit the folder's config.json key by key",
            do="get the folder again, or give another --base",
        )


def load_text_encoder(folder: Path, *, dtype: torch.dtype = torch.float32, kind: Any = CLIPTextModel) -> Any:
    """A text encoder of that class on the CPU, without the progress bar that transformers shows for every file."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        text_encoder, info = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    _check_all_matched("text encoder", info, folder.parent)
    return text_encoder


def find_base(name: str) -> Path:
    if name == "tiny":
        return TINY_BASE
    path = Path(name).expanduser()
    if path.exists():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.parent.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
        except (HfHubHTTPError, OSError) as error:  # no network, no such model, no leave to read it, a full disk
            raise UserError(
                f"base {name!r} can not be had from the hub ({str(error).strip().splitlines()[0]})",
                allowed="the id of a model that you may read, and a network to reach it; what was fetched once is kept",
                do="check the id given with --base, or give a local folder or file",
            ) from error
    raise UserError(
        f"base {name!r}: no such folder or file",
        allowed="'tiny', a local diffusers folder, a .safetensors or .ckpt file, or a hub id 'owner/model'",
        do="check the path given with --base",
    )


def weights_hash(path: Path) -> str:
    """16 hex digits of the SHA-256 over the weight files of UNet, text encoders and VAE, names included.

    Only files that are read: variants beside them (fp16) do not matter.

    Of a single file it is the SHA-256 of its bytes, whose first digits the web interfaces show as the model's hash.

    Raises:
        UserError: as `_weight_files`.
    """
    digest = hashlib.sha256()
    if path.is_file():
        _digest_file(digest, path)
        return digest.hexdigest()[:16]
    for part in (*HASHED_PARTS, *(["text_encoder_2"] if is_sdxl_folder(path) else [])):
        for file in _weight_files(path / part):
            digest.update(f"{part}/{file.name}".encode())
            _digest_file(digest, file)
    return digest.hexdigest()[:16]


def _weight_files(folder: Path) -> list[Path]:
    """One file, or its shards. Raises UserError where there are no safetensors weights."""
    files = sorted(file for pattern in _WEIGHTS for file in folder.glob(pattern))
    if not files:
        raise UserError(
            f"{folder} holds no .safetensors weights",
            allowed="weights in safetensors files (no pickle, no variant), named as diffusers names them",
            do="convert the base to safetensors, or give another --base",
        )
    return files


def _digest_file(digest: hashlib._Hash, file: Path) -> None:
    """Piece by piece: the whole file would be a second copy of the weights in memory."""
    with file.open("rb") as opened:
        while piece := opened.read(2**20):
            digest.update(piece)
