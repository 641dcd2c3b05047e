"""How much memory something will take, reckoned before any weight is read.

A model is built from its config alone on torch's meta device, where tensors have shapes and no numbers, and the very
code that will run later runs there, while all tensors that live at once are added up. So gradients, checkpoints,
temporary tensors and the optimizer's state are counted and not guessed. What is not seen is what kernels and the
allocator take for themselves; `WORKSPACE` stands for it.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from cdvideo.base.checkpoint import read_tensors
from cdvideo.base.folder import is_sdxl_folder, load_tokenizer, read_json
from cdvideo.base.ldm import (
    CLIP,
    OPEN_CLIP,
    SCHEDULER,
    UNET,
    VAE,
    XL_CLIP,
    XL_OPEN_CLIP,
    count,
    family_of,
    unet_config,
    used_layers,
    vae_config,
)
from cdvideo.base.loader import Base, find_base
from cdvideo.base.single_file import load_clip_tokenizer

logger = logging.getLogger(__name__)

META = torch.device("meta")
WORKSPACE = 0.3e9  # of kernels and the allocator: 0.03 to 0.42 on the CPU in six trainings; on CUDA an assumption
ROOMY = 30  # times the weights: a reckoning takes seconds, and any usual settings fit

Needs = Mapping[str, int]  # what is done -> the most bytes it takes on the device


class Meter(TorchDispatchMode):
    """Adds up what tensors made within the block take. `live`: bytes now; `peak`: the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # A view of a weight lies where the weight does, which was there before.
        given = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def free(_: object) -> None:
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, free)
        self.live += size
        self.peak = max(self.peak, self.live)


@contextmanager
def metered() -> Iterator[Meter]:
    """Within the block, what is computed on the meta device is metered, on the assumption of fused attention.

    The meta device takes attention apart into products that no fused kernel ever stores.
    """
    plain = F.scaled_dot_product_attention
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # keeps the same tensors as CUDA's

    def fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if query.device != META:
            return plain(query, key, value, attn_mask, **options)
        return kernel(query, key, value, 0.0, options.get("is_causal", False), attn_mask=attn_mask)[0]

    with mock.patch.object(F, "scaled_dot_product_attention", fused), Meter() as meter:
        yield meter


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of the modules' weights."""
    tensors = [tensor for module in modules for tensor in [*module.parameters(), *module.buffers()]]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def base_from_configs(name: str, *, dtype: torch.dtype) -> Base | None:
    """A base on the meta device, as its configs, or a single file's header, describe it; no weight is read.

    Args:
        name: As in `load_base`.

    Returns:
        None where it is not whole, which `load_base` will tell.
    """
    path = find_base(name)
    outline = _folder_outline(path) if path.is_dir() else _file_outline(path)
    if outline is None:
        return None
    shapes, tokenizers, scheduler = outline
    tiny = shapes["vae"].get("_class_name") == "AutoencoderTiny"
    if tiny:  # it writes this into its config, and warns of it when it reads it
        shapes["vae"].pop("block_out_channels", None)
    with META:
        unet = UNet2DConditionModel.from_config(shapes["unet"])
        vae = (AutoencoderTiny if tiny else AutoencoderKL).from_config(shapes["vae"])
        text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(shapes["text_encoder"]))
        second = shapes.get("text_encoder_2")
        text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(second)) if second else None
    base = Base(
        name=name,
        path=path,
        hash="",
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizers[0],
        scheduler_config={"prediction_type": "epsilon", **scheduler},
        resolution=int(unet.config.sample_size) * 2 ** (len(vae.config.block_out_channels) - 1),
        device=META,
        dtype=dtype,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizers[1] if text_encoder_2 else None,
        zero_empty_prompt=text_encoder_2 is not None,
    )
    for module in base.modules:
        module.eval().requires_grad_(False)
    return base.to(META, dtype)


# Configs of the parts, the tokenizers, the scheduler's config.
Outline: TypeAlias = tuple[dict[str, dict[str, Any]], list[CLIPTokenizer], dict[str, Any]]


def _folder_outline(path: Path) -> Outline | None:
    numbers = ("", "_2") if is_sdxl_folder(path) else ("",)
    parts = ["unet", "vae", *(f"text_encoder{number}" for number in numbers)]
    if not all((path / part / "config.json").is_file() for part in parts):
        return None
    shapes = {part: read_json(path / part / "config.json") for part in parts}
    tokenizers = [load_tokenizer(path, f"tokenizer{number}") for number in numbers]
    return shapes, tokenizers, dict(DDIMScheduler.load_config(path, subfolder="scheduler"))


def _file_outline(path: Path) -> Outline | None:
    tensors = read_tensors(path)  # mapped, not read
    found = [
        prefix for prefix in (CLIP, OPEN_CLIP, XL_CLIP, XL_OPEN_CLIP) if any(n.startswith(prefix) for n in tensors)
    ]
    is_whole = found in ([CLIP], [OPEN_CLIP], [XL_CLIP, XL_OPEN_CLIP])
    if not is_whole or not all(any(n.startswith(part) for n in tensors) for part in (UNET, VAE)):
        return None
    try:
        family = family_of(tensors)
        # Of Stable Diffusion 2 there are models for 512 pixels and for 768; which it is, only a trial tells.
        cells = {"1.x": 64, "2.x": 96, "XL": 128}[family]
        shapes = {"unet": {**unet_config(tensors), "sample_size": cells}, "vae": vae_config(tensors)}
    except (KeyError, IndexError):
        return None
    for part, prefix in zip(("text_encoder", "text_encoder_2"), found, strict=False):
        shapes[part] = _text_shape(tensors, prefix)
    if family == "2.x":
        shapes["text_encoder"]["num_hidden_layers"] = used_layers(tensors)
    return shapes, [load_clip_tokenizer(pad_token="!") for _ in found], {**SCHEDULER}


def _text_shape(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """Close enough to count a text encoder's bytes, from its table of tokens and its layers."""
    own = {name.removeprefix(prefix): tensor.shape for name, tensor in tensors.items() if name.startswith(prefix)}
    ((vocabulary, width),) = (shape for name, shape in own.items() if name.endswith("token_embedding.weight"))
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": count(own, r".*(?:layers|resblocks)\.(\d+)\."),
        "num_attention_heads": width // 64,
        "projection_dim": own.get("text_projection", own.get("text_projection.weight", [width]))[-1],
    }


def _bytes_on_disk(path: Path) -> int:
    """Of a base's file, or of its folder's weights."""
    files = [path] if path.is_file() else [*path.glob("*/*.safetensors")]
    return sum(file.stat().st_size for file in files)


def free_bytes(device: torch.device) -> int:
    """Memory that is free for the taking: the GPU's, or the computer's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available)


def total(needs: Needs) -> int:
    """The most that is taken at any time, with what kernels take."""
    return max(needs.values()) + int(WORKSPACE)


def advise(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    needs: Callable[[Base], Needs],
    cures: Callable[[Base], Iterator[tuple[str, Needs]]],
    *,
    report: Callable[[str], object] = logger.info,
) -> bool:
    """Tells what will be needed and what is free, and warns where it will not fit; returns whether it will.

    Where the weights are less than a thirtieth of what is free, nothing is reckoned and nothing told.

    Args:
        name: Of the base, as in `load_base`.
        needs: What is needed with a base that is on the meta device.
        cures: Settings that take less, each on top of those before it, and what is needed with all of them. Asked only
            where it does not fit, and only until it does.
    """
    free = free_bytes(device)
    if ROOMY * _bytes_on_disk(find_base(name)) < free:
        return True
    base = base_from_configs(name, dtype=dtype)
    if base is None:
        return True
    of_phases = needs(base)
    needed, most = total(of_phases), max(of_phases, key=of_phases.__getitem__)
    kind = "GPU memory" if device.type == "cuda" else "memory"
    told = f"needs about {needed / 1e9:.1f} GB of {kind} ({most}), {free / 1e9:.1f} GB free"
    if needed <= free:
        report(told)
        return True
    settings: list[str] = []
    for setting, then in cures(base):
        if total(then) < needed:
            settings.append(setting)
            needed = total(then)
        if needed <= free:
            break
    cure = f"try {' '.join(settings)} (about {needed / 1e9:.1f} GB)" if settings else "no setting makes it less"
    logger.warning("%s: %s", told, cure)
    return False
