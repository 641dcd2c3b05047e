"""Load a base: the embedded one, a local diffusers folder or single file, or a hub id where the user writes one."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Condition, get_ident
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from cdvideo.base.folder import (
    CONFIGS,
    HASHED_PARTS,
    PARTS,
    SECOND_TEXT_PARTS,
    VARIANT_FILES,
    VARIANTS,
    WEIGHTS,
    is_sdxl_folder,
    matching,
    read_folder,
    variant_of,
    weight_files,
)
from cdvideo.base.hashes import kept_hash
from cdvideo.base.latents import Vae, vae_dtype
from cdvideo.base.single_file import read_single_file
from cdvideo.config import as_path
from cdvideo.errors import UserError

logger = logging.getLogger(__name__)

TINY_BASE = Path(__file__).parent / "tiny"
HUB_ID = r"[\w.-]+/[\w.-]+(@[\w./-]+)?"  # "owner/model", or "owner/model@revision"


HUB_FILES = (
    "model_index.json",
    *(
        f"{part}/{name}"
        for part in (*PARTS, *SECOND_TEXT_PARTS)
        for name in (*CONFIGS, *WEIGHTS, "*.safetensors.index.json")
    ),
)


class Lock:
    """Lets one thread at a time in; that one may enter again. A copy of its owner gets a lock of its own.

    Unlike threading.RLock it may be left from another thread, as generators are that nobody has read to their end.
    """

    def __init__(self) -> None:
        self._changed, self._holder, self._depth = Condition(), 0, 0

    def __enter__(self) -> None:
        me = get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._depth == 0 or self._holder == me)
            self._holder, self._depth = me, self._depth + 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._depth -= 1
            self._changed.notify_all()

    def __deepcopy__(self, _memo: object) -> Lock:
        return Lock()


@dataclass
class Base:
    """An image model with all that belongs to it, modules in eval mode and frozen.

    resolution: native pixels.
    text_encoder_2, tokenizer_2: SDXL's second ones; None of other bases.
    zero_empty_prompt: whether the empty prompt is zeros in place of its encoding, as SDXL learned guidance.
    in_use: held while something works with the modules, which sampling and training change for as long as they take; a
        second thread waits.
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
    in_use: Lock = field(default_factory=Lock, repr=False, compare=False)

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
            Diffusion 1.x, 2.x or XL, or a hub id "owner/model" or "owner/model@revision" (a branch, a tag or a
            commit); only a hub id ever touches the network.
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
    parts = read_single_file(path, dtype=dtype) if path.is_file() else read_folder(path, dtype)
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


def find_base(name: str) -> Path:
    """Where a base lies; what a hub id names is fetched, once in a process."""
    if name == "tiny":
        return TINY_BASE
    path = as_path(name)
    if path.exists():
        return path
    if re.fullmatch(HUB_ID, name) and not path.parent.is_dir():
        return _fetched(name)
    raise UserError(
        f"base {name!r}: no such folder or file",
        allowed="'tiny', a local diffusers folder, a .safetensors or .ckpt file, or a hub id 'owner/model@revision'",
        do="check the path given with --base",
    )


@cache
def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    owner_and_model, _, revision = name.partition("@")
    options: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        path = Path(snapshot_download(owner_and_model, allow_patterns=list(HUB_FILES), **options))
        for variant in VARIANTS:  # of the parts that have no other weights
            parts = [part for part in (*HASHED_PARTS, "text_encoder_2") if (path / part).is_dir()]
            bare = [part for part in parts if variant_of(path / part) is None and not matching(path / part, WEIGHTS)]
            if bare:
                patterns = [f"{part}/{file}" for part in bare for file in VARIANT_FILES[variant]]
                patterns += [f"{part}/*.safetensors.index.*json" for part in bare]
                snapshot_download(owner_and_model, allow_patterns=patterns, **options)
        return path
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        # no network, no such model or revision, no leave to read it, a full disk
        raise UserError(
            f"base {name!r} can not be had from the hub ({str(error).strip().splitlines()[0]})",
            allowed="the id of a model that you may read, and a network to reach it; what was fetched once is kept",
            do="check the id given with --base, or give a local folder or file",
        ) from error


def weights_hash(path: Path) -> str:
    """16 hex digits of the SHA-256 over the weight files of UNet, text encoders and VAE, names included.

    Only files that are read: variants beside them (fp16) do not matter.

    Of a single file it is the SHA-256 of its bytes, whose first digits the web interfaces show as the model's hash.

    Raises:
        UserError: as `weight_files`.
    """
    if path.is_file():
        files = {"": path}
    else:
        parts = (*HASHED_PARTS, *(["text_encoder_2"] if is_sdxl_folder(path) else []))
        files = {f"{part}/{file.name}": file for part in parts for file in weight_files(path / part)}
    return kept_hash(files)
