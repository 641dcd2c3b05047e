"""What learning a concept, and drawing with it, will take of the device's memory (base/memory.py says how)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from cdvideo.base.latents import decode_latents, encode_pixels
from cdvideo.base.loader import Base
from cdvideo.base.memory import Needs, metered, weight_bytes
from cdvideo.base.prompts import encode_prompts, picture_sizes, text_widths
from cdvideo.concept.adapters import make_adapter
from cdvideo.concept.attention_maps import recording
from cdvideo.concept.config import ConceptConfig
from cdvideo.concept.drift import ATTENTION_PHRASE, NOISE_LEVELS, PICTURES
from cdvideo.concept.optimizer import checkpointing
from cdvideo.concept.phrases import HELD_OUT_PHRASES, fill
from cdvideo.concept.semantic import phrase_features
from cdvideo.interchange.needs import merged_bytes
from cdvideo.motion.config import MotionConfig
from cdvideo.motion.modules import MotionModules
from cdvideo.motion.video_unet import VideoUNet
from cdvideo.sampling.config import AnimateConfig
from cdvideo.sampling.denoise import guided_prompts, latent_size
from cdvideo.sampling.prior import GUIDANCE
from cdvideo.sampling.prompt_kv import compile_prompts, reading
from cdvideo.sampling.windows import window_size

GUIDED = 5.0  # any scale but 1 takes as much; it is assumed where the motion modules are to say


def training_needs(base: Base, config: ConceptConfig, *, on_gpu: bool) -> Needs:
    """Bytes for learning a concept, by what is being done.

    Args:
        base: On the meta device.
        on_gpu: Whether the VAE is there only while it works.
    """
    side = config.resolution or base.resolution
    standing = weight_bytes(base.unet, *base.text_encoders.values()) + (0 if on_gpu else weight_bytes(base.vae))
    vae = weight_bytes(base.vae) if on_gpu else 0
    weights, learned, step = _training_step(base, config, side)
    needs = {
        "training": standing + step,  # asking where the subject is takes no more: as many pictures, without gradients
        "encoding pictures": standing + weights + vae + _encoding(base, side),
        "measuring drift": standing + learned + _measuring(base, config, side),
    }
    if config.preserve.prior_weight:
        drawing = _drawing(base, None, (side, side), pictures=1, guidance=GUIDANCE, chunk=1)
        needs["drawing pictures of the class"] = standing + drawing["denoising"]
        needs["decoding pictures of the class"] = standing + vae + drawing["decoding"]
    if config.sample.every:
        prompts = len(config.sample.prompts) * len(config.phrases)
        drawing = _drawing(base, None, (side, side), pictures=prompts, guidance=config.sample.guidance, chunk=1)
        needs["drawing contact sheets"] = standing + learned + _folded_bytes(base, config) + drawing["denoising"]
        needs["decoding contact sheets"] = standing + learned + vae + drawing["decoding"]
    return needs


def _folded_bytes(base: Base, config: ConceptConfig) -> int:
    """Bytes of the UNet's weights of which a second set is made to draw with a concept: those that it changes, but for
    K and V."""
    kind, endings = config.adapter.kind, tuple(f".{target}.weight" for target in config.adapter.targets)
    parameters = base.unet.named_parameters()
    folded = [p for name, p in parameters if kind == "unet" or (kind == "lora" and name.endswith(endings))]
    return sum(parameter.numel() * parameter.element_size() for parameter in folded)


@torch.no_grad()
def _encoding(base: Base, side: int) -> int:
    """Bytes for making latents of one picture."""
    with metered() as meter:
        encode_pixels(base.vae, torch.zeros(1, 3, side, side, device=base.device))
    return meter.peak


@torch.no_grad()
def _measuring(base: Base, config: ConceptConfig, side: int) -> int:
    """Bytes for the features of many phrases, or the attention maps of a few pictures, which no fused kernel gives."""
    phrases = [fill(template, config.phrase) for template in HELD_OUT_PHRASES]
    member_LW = torch.zeros(base.tokenizer.model_max_length, len(ATTENTION_PHRASE.split()), device=base.device)
    with metered() as meter, recording(base.unet, member_LW):
        phrase_features(base, phrases)
        _predict(base, config, {}, PICTURES * len(NOISE_LEVELS), side)
    return meter.peak


def _training_step(base: Base, config: ConceptConfig, side: int) -> tuple[int, int, int]:
    """Bytes of the weights that are learned, of these with the optimizer's state, and the most at once in a step of the
    trainer."""
    optim, preserve = config.optim, config.preserve
    with checkpointing(base.unet, optim.gradient_checkpointing), metered() as meter:
        adapter = make_adapter(base.unet, config.adapter, seed=0)
        width = sum(text_widths(base))
        rows = {token: torch.zeros(config.adapter.num_rows, width, device=base.device) for token in config.phrases}
        weights = [*adapter.weights.values(), *(rows_KD.requires_grad_() for rows_KD in rows.values())]
        numbers = sum(weight.numel() for weight in weights)
        if optim.optimizer == "adamw8bit":
            state, learned = torch.empty(2 * numbers, dtype=torch.uint8, device=base.device), 6 * numbers
        else:
            # foreach: as on CUDA; on the CPU it takes one tensor at a time. The first step makes the moments.
            optimizer, learned = torch.optim.AdamW(weights, foreach=True), 12 * numbers
            _step(optimizer, weights, [torch.zeros_like(weight) for weight in weights])
        if preserve.output_weight or preserve.background_weight:
            with torch.no_grad():
                _predict(base, config, rows, optim.batch_size, side)
        with adapter.attached():
            loss = _predict(base, config, rows, optim.batch_size * (2 if preserve.prior_weight else 1), side)
            if config.semantic.weight:
                phrases = [config.phrase] * config.semantic.phrases
                loss = loss + encode_prompts(base, phrases, rows=rows).hidden_BLD.float().mean()
            if preserve.output_weight:
                loss = loss + _predict(base, config, rows, optim.batch_size, side)
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        del loss
        if optim.optimizer == "adamw":
            _step(optimizer, weights, gradients)
        else:
            del state
    return 4 * numbers, learned, meter.peak


def _step(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    optimizer.step()
    optimizer.zero_grad()


def _predict(base: Base, config: ConceptConfig, rows: Mapping[str, Tensor], pictures: int, side: int) -> Tensor:
    """The denoising loss of some pictures, without their content."""
    height, width = latent_size(base, side, side)
    noisy_BCHW = torch.zeros(pictures, base.unet.config.in_channels, height, width, device=base.device)
    timesteps_B = torch.zeros(pictures, dtype=torch.long, device=base.device)
    text = encode_prompts(base, [config.phrase] * pictures, rows=rows)
    added = text.added(picture_sizes(side, side))
    prediction_BCHW = base.unet(noisy_BCHW.to(base.dtype), timesteps_B, text.hidden_BLD, added_cond_kwargs=added).sample
    return (prediction_BCHW.float() - noisy_BCHW).square().mean()


def film_needs(base: Base, config: AnimateConfig, *, offload: bool) -> Needs:
    """Bytes for a film, or a picture, by what is being done; with what the concepts that are named will change.

    Args:
        base: On the meta device.
        offload: Whether each module is on the device only while it works.
    """
    size = (config.height or base.resolution, config.width or base.resolution)
    with base.device:
        motion = None if config.still else MotionModules.for_unet(base.unet, motion_num_attention_heads=1)
    modules = [base.unet] if motion is None else [base.unet, motion.to(base.dtype).eval().requires_grad_(False)]
    own = {
        "encoding text": weight_bytes(*base.text_encoders.values()),
        "denoising": weight_bytes(*modules),
        "decoding": weight_bytes(base.vae),
    }
    merged_unet, merged_text = merged_bytes(base, config.concept_files)
    merged = {"encoding text": merged_text, "denoising": merged_unet, "decoding": 0}
    base.vae.use_tiling = config.vae_tiling
    working = _drawing(
        base,
        motion,
        size,
        pictures=1 if config.still else _frames_at_once(config),
        films=config.batch,
        guidance=GUIDED if config.guidance is None else config.guidance,
        chunk=config.decode_chunk,
    )
    standing = 0 if offload else sum(own.values())
    return {phase: standing + (own[phase] if offload else 0) + working[phase] + merged[phase] for phase in own}


def _frames_at_once(config: AnimateConfig) -> int:
    """Frames of a window, for motion modules of the usual reach, which are not loaded yet."""
    reach = max(MotionConfig().motion_max_seq_length, config.windows.size or 0)
    return window_size(config.frames, reach, config.windows)


@torch.inference_mode()
def _drawing(
    base: Base,
    motion: MotionModules | None,
    size: tuple[int, int],
    *,
    pictures: int,
    guidance: float,
    chunk: int,
    films: int = 1,
) -> Needs:
    """What is taken besides weights in each phase of drawing so many pictures, or films of so many frames at once."""
    height, width = latent_size(base, size[1], size[0])
    channels, films = base.unet.config.in_channels, films if motion else pictures
    with metered() as text:
        compiled = compile_prompts(base, guided_prompts(["a picture"] * films, "", guidance))
    passes = 1 if guidance == 1 else 2
    with metered() as denoising, reading(base.unet, compiled):
        if motion is None:
            latents_BCHW = torch.zeros(passes * pictures, channels, height, width, device=base.device)
            base.unet(latents_BCHW.to(base.dtype), 0, None, added_cond_kwargs=compiled.added)
        else:
            motion.config = dataclasses.replace(motion.config, motion_max_seq_length=pictures)
            latents_BFCHW = torch.zeros(passes * films, pictures, channels, height, width, device=base.device)
            VideoUNet(base.unet, motion)(latents_BFCHW.to(base.dtype), 0, None, compiled.added)
    with metered() as decoding:
        decode_latents(base.vae, torch.zeros(min(chunk, pictures), channels, height, width, device=base.device))
    return {"encoding text": text.peak, "denoising": text.live + denoising.peak, "decoding": decoding.peak}


def training_cures(base: Base, config: ConceptConfig, *, on_gpu: bool) -> Iterator[tuple[str, Needs]]:
    """Settings under which learning takes less, the least harmful first, each on top of those before it."""
    optim = config.optim
    if base.dtype == torch.float32:
        base.to(base.device, torch.bfloat16)
        yield "--dtype bf16", training_needs(base, config, on_gpu=on_gpu)
    if not optim.gradient_checkpointing:
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, gradient_checkpointing=True))
        yield "optim.gradient_checkpointing=true", training_needs(base, config, on_gpu=on_gpu)
    if on_gpu and optim.optimizer == "adamw":
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, optimizer="adamw8bit"))
        yield "optim.optimizer=adamw8bit", training_needs(base, config, on_gpu=on_gpu)
    if optim.batch_size > 1:
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, batch_size=1))
        yield "optim.batch_size=1", training_needs(base, config, on_gpu=on_gpu)
    if config.sample.every:
        config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, every=0))
        yield "sample.every=0", training_needs(base, config, on_gpu=on_gpu)
    side = _lower(config.resolution or base.resolution)
    yield f"resolution={side}", training_needs(base, dataclasses.replace(config, resolution=side), on_gpu=on_gpu)


def film_cures(base: Base, config: AnimateConfig, *, on_gpu: bool) -> Iterator[tuple[str, Needs]]:
    """Settings under which a film takes less, the least harmful first, each on top of those before it."""
    offload = on_gpu and config.offload
    if base.dtype == torch.float32:
        base.to(base.device, torch.bfloat16)
        yield "--dtype bf16", film_needs(base, config, offload=offload)
    if on_gpu and not offload:
        offload = True
        yield "--offload", film_needs(base, config, offload=offload)
    if config.batch > 1:
        config = dataclasses.replace(config, batch=1)
        yield "--batch 1", film_needs(base, config, offload=offload)
    if config.decode_chunk > 1:
        config = dataclasses.replace(config, decode_chunk=1)
        yield "decode_chunk=1", film_needs(base, config, offload=offload)
    if not config.vae_tiling:
        config = dataclasses.replace(config, vae_tiling=True)
        yield "vae_tiling=true", film_needs(base, config, offload=offload)
    width, height = _lower(config.width or base.resolution), _lower(config.height or base.resolution)
    config = dataclasses.replace(config, width=width, height=height)
    yield f"width={width} height={height}", film_needs(base, config, offload=offload)


def _lower(side: int) -> int:
    """Three quarters of a side, in whole steps of 64 pixels."""
    return max(64, side * 3 // 4 // 64 * 64)
