"""Settings of the embedded base's training (imports no torch)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cdvideo.config import check

STAGES = ("sprites", "data", "vae", "text", "latents", "unet", "motion", "export")
WAN_STAGES = ("sprites", "data", "wan-vae", "wan-latents", "wan", "wan-export")
"""The stages of the embedded Wan, from the same world."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What is rendered, once, before any training."""

    scenes: int = 120_000
    """Stills of training triples."""
    heldout_scenes: int = 512
    """Stills of held-out triples, for measuring; never trained on."""
    clips: int = 5_000
    """Films of training triples."""
    frames: int = 16
    """Frames per clip."""
    captions: int = 4
    """Captions per scene and clip."""

    def __post_init__(self) -> None:
        check(
            (self.scenes >= 1, f"scenes={self.scenes}: must be at least 1"),
            (self.heldout_scenes >= 1, f"heldout_scenes={self.heldout_scenes}: must be at least 1"),
            (self.clips >= 1, f"clips={self.clips}: must be at least 1"),
            (1 <= self.frames <= 32, f"frames={self.frames}: must be 1 to 32"),
            (self.captions >= 1, f"captions={self.captions}: must be at least 1"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """The common part of every training loop: batches, steps, learning rate, how often to log and show samples."""

    steps: int
    """Optimizer steps; the learning rate falls to zero over the last ``decay`` of them."""
    batch: int
    lr: float
    """AdamW's learning rate; Muon's too (its update is scaled to AdamW's size)."""
    warmup: int = 100
    """Steps over which the learning rate rises."""
    decay: float = 0.3
    """Part of the steps, at the end, over which the learning rate falls linearly to zero."""
    ema: float = 0.999
    """Decay of the moving average of the weights, which is what gets exported."""
    log_every: int = 50
    sample_every: int = 1000
    """Steps between grids of samples."""
    compile: bool = False
    """torch.compile the trained model; an error there ends the run."""

    def __post_init__(self) -> None:
        check(
            (self.steps >= 1, f"steps={self.steps}: must be at least 1"),
            (self.batch >= 1, f"batch={self.batch}: must be at least 1"),
            (self.lr > 0, f"lr={self.lr}: must be above 0"),
            (self.warmup >= 1, f"warmup={self.warmup}: must be at least 1"),
            (0 <= self.decay <= 1, f"decay={self.decay}: must be 0 to 1"),
            (0 <= self.ema < 1, f"ema={self.ema}: must be at least 0 and below 1"),
            (self.log_every >= 1, f"log_every={self.log_every}: must be at least 1"),
            (self.sample_every >= 1, f"sample_every={self.sample_every}: must be at least 1"),
        )


def _loop(**values: int | float | bool) -> LoopConfig:
    return field(default_factory=lambda: LoopConfig(**values))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeConfig:
    """AutoencoderTiny, f = 8."""

    width: int = 48
    latent_channels: int = 8
    encoder_blocks: tuple[int, int, int, int] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, int, int, int] = (3, 3, 3, 1)
    crop: int = 64
    """Side of the training crops in pixels; whole scenes from ``whole_from`` on."""
    whole_from: float = 0.9
    """Part of the steps after which whole scenes are trained on, in batches of the same number of pixels."""
    latent_noise: float = 0.1
    """Most noise added to the latents before decoding, so that the decoder forgives the UNet's errors."""
    loop: LoopConfig = _loop(steps=14_000, batch=256, lr=1.5e-3, log_every=100, sample_every=2000)

    def __post_init__(self) -> None:
        check(
            (self.width >= 4, f"width={self.width}: must be at least 4"),
            (self.latent_channels >= 1, f"latent_channels={self.latent_channels}: must be at least 1"),
            (self.crop >= 16 and self.crop % 8 == 0, f"crop={self.crop}: must be a multiple of 8, at least 16"),
            (0 <= self.whole_from <= 1, f"whole_from={self.whole_from}: must be 0 to 1"),
            (self.latent_noise >= 0, f"latent_noise={self.latent_noise}: must be at least 0"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """Tokenizer and CLIPTextModel."""

    vocabulary: int = 2500
    length: int = 48
    """Tokens of a prompt, start and end of text included."""
    width: int = 192
    layers: int = 3
    heads: int = 4
    image_size: int = 64
    """Side to which pictures are shrunk for the image tower."""
    image_width: int = 64
    """Channels of the image tower's first level."""
    factor_weight: float = 0.5
    """Weight of naming subject, thing, setting and colour from the text feature, beside the contrastive loss."""
    loop: LoopConfig = _loop(steps=4_000, batch=1024, lr=1e-3, warmup=200, decay=0.5, log_every=100, sample_every=2000)

    def __post_init__(self) -> None:
        check(
            (self.vocabulary >= 600, f"vocabulary={self.vocabulary}: must be at least 600"),
            (8 <= self.length <= 77, f"length={self.length}: must be 8 to 77"),
            (self.width % self.heads == 0, f"width={self.width}: must be a multiple of heads={self.heads}"),
            (self.layers >= 1, f"layers={self.layers}: must be at least 1"),
            (self.image_size % 16 == 0, f"image_size={self.image_size}: must be a multiple of 16"),
            (self.factor_weight >= 0, f"factor_weight={self.factor_weight}: must be at least 0"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class UnetConfig:
    """UNet2DConditionModel, v prediction, zero terminal SNR."""

    channels: tuple[int, ...] = (96, 144)
    layers: int = 2
    heads: int = 3
    norm_groups: int = 16
    subject_weight: float = 4.0
    """Loss weight of the subject and what it wears, against 1 for the rest."""
    empty_captions: float = 0.1
    """Part of the captions replaced by the empty prompt, for classifier-free guidance."""
    noisy_captions: float = 0.1
    """Part of the captions with unknown words put in."""
    gamma: float = 5.0
    """SNR above which the loss weight falls."""
    loop: LoopConfig = _loop(steps=8_000, batch=512, lr=1.5e-3, warmup=200, sample_every=1000)

    def __post_init__(self) -> None:
        check(
            (len(self.channels) >= 2, f"channels={self.channels}: must be at least two levels"),
            (
                all(c % self.heads == 0 and c % self.norm_groups == 0 for c in self.channels),
                f"channels={self.channels}: must be multiples of heads={self.heads} and norm_groups={self.norm_groups}",
            ),
            (self.layers >= 1, f"layers={self.layers}: must be at least 1"),
            (self.subject_weight >= 1, f"subject_weight={self.subject_weight}: must be at least 1"),
            (0 <= self.empty_captions <= 1, f"empty_captions={self.empty_captions}: must be 0 to 1"),
            (0 <= self.noisy_captions <= 1, f"noisy_captions={self.noisy_captions}: must be 0 to 1"),
            (self.gamma > 0, f"gamma={self.gamma}: must be above 0"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MotionTrainingConfig:
    """Motion modules over the frozen UNet."""

    heads: int = 3
    max_frames: int = 32
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a fraction of the memory, about a third more time."""
    loop: LoopConfig = _loop(steps=3_000, batch=32, lr=1e-3, warmup=100, sample_every=500)

    def __post_init__(self) -> None:
        check((1 <= self.max_frames <= 64, f"max_frames={self.max_frames}: must be 1 to 64"))


@dataclass(frozen=True, kw_only=True, slots=True)
class WanVaeConfig:
    """AutoencoderKLWan, 8 x 8 x 4 pixels a latent: learned on single frames and short clips in every step."""

    width: int = 32
    multipliers: tuple[int, ...] = (1, 2, 2)
    """Channels of each level in widths; the last two are equal, as the residual form asks."""
    blocks: int = 1
    latent_channels: int = 16
    crop: int = 64
    """Side of the training crops in pixels; whole pictures from ``whole_from`` on."""
    frames: int = 9
    """Frames of a training clip, 4 n + 1."""
    clips: int = 64
    """Clips in a batch, beside ``loop.batch`` single frames."""
    whole_from: float = 0.85
    """Part of the steps after which whole frames are trained on, in batches of the same number of pixels."""
    kl_weight: float = 2e-4
    """Weight of the latents' divergence from a unit Gaussian, per number."""
    loop: LoopConfig = _loop(steps=6_000, batch=256, lr=1.5e-3, log_every=50, sample_every=1000)

    def __post_init__(self) -> None:
        check(
            (self.width >= 4, f"width={self.width}: must be at least 4"),
            (
                len(self.multipliers) == 3 and self.multipliers[-1] == self.multipliers[-2],
                f"multipliers={self.multipliers}: must be three, the last two equal",
            ),
            (self.blocks >= 1, f"blocks={self.blocks}: must be at least 1"),
            (self.latent_channels >= 1, f"latent_channels={self.latent_channels}: must be at least 1"),
            (self.crop >= 16 and self.crop % 16 == 0, f"crop={self.crop}: must be a multiple of 16, at least 16"),
            (self.frames % 4 == 1, f"frames={self.frames}: must be 4 n + 1"),
            (self.clips >= 1, f"clips={self.clips}: must be at least 1"),
            (0 <= self.whole_from <= 1, f"whole_from={self.whole_from}: must be 0 to 1"),
            (self.kl_weight >= 0, f"kl_weight={self.kl_weight}: must be at least 0"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class WanConfig:
    """WanTransformer3DModel and UMT5EncoderModel, learned together by flow matching on stills and clips."""

    width: int = 192
    heads: int = 4
    layers: int = 8
    ffn: int = 560
    """Channels of the feed-forward layers."""
    vocabulary: int = 2000
    text_width: int = 128
    text_layers: int = 2
    text_heads: int = 4
    text_tokens: int = 40
    """Longest caption in tokens, the end of text included; longer ones are cut."""
    clips: int = 128
    """Clips in a batch, beside ``loop.batch`` stills."""
    shift: float = 2.0
    """Shift of the training times towards noise: t' = s t / (1 + (s - 1) t)."""
    subject_weight: float = 4.0
    """Loss weight of the subject and what it wears in stills, against 1 for the rest."""
    empty_captions: float = 0.1
    noisy_captions: float = 0.1
    loop: LoopConfig = _loop(steps=10_000, batch=512, lr=1.5e-3, warmup=200, log_every=50, sample_every=2000)

    def __post_init__(self) -> None:
        check(
            (self.width % self.heads == 0, f"width={self.width}: must be a multiple of heads={self.heads}"),
            (self.width // self.heads % 2 == 0, f"width={self.width}: must be an even number of channels a head"),
            (self.layers >= 1, f"layers={self.layers}: must be at least 1"),
            (self.ffn >= 1, f"ffn={self.ffn}: must be at least 1"),
            (self.vocabulary >= 300, f"vocabulary={self.vocabulary}: must be at least 300"),
            (
                self.text_width % self.text_heads == 0,
                f"text_width={self.text_width}: must be a multiple of text_heads={self.text_heads}",
            ),
            (self.text_layers >= 1, f"text_layers={self.text_layers}: must be at least 1"),
            (8 <= self.text_tokens < 512, f"text_tokens={self.text_tokens}: must be 8 to 511"),
            (self.clips >= 1, f"clips={self.clips}: must be at least 1"),
            (self.shift > 0, f"shift={self.shift}: must be above 0"),
            (self.subject_weight >= 1, f"subject_weight={self.subject_weight}: must be at least 1"),
            (0 <= self.empty_captions <= 1, f"empty_captions={self.empty_captions}: must be 0 to 1"),
            (0 <= self.noisy_captions <= 1, f"noisy_captions={self.noisy_captions}: must be 0 to 1"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MakeBaseConfig:
    """Everything about the embedded base's training."""

    seed: int = 0
    out: Path = Path(".cache/base")
    """Training states, metrics, samples, and the model as far as it is trained."""
    cache: Path = Path(".cache/world")
    """Rendered scenes and clips, and their latents."""
    device: str = "auto"
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Precision of autocast; weights and optimizers stay fp32."""
    workers: int = 0
    """Processes that render; 0 takes all cores."""
    resolution: int = 128
    data: DataConfig = field(default_factory=DataConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    text: TextConfig = field(default_factory=TextConfig)
    unet: UnetConfig = field(default_factory=UnetConfig)
    motion: MotionTrainingConfig = field(default_factory=MotionTrainingConfig)
    wan_vae: WanVaeConfig = field(default_factory=WanVaeConfig)
    wan: WanConfig = field(default_factory=WanConfig)

    def __post_init__(self) -> None:
        check(
            (self.seed >= 0, f"seed={self.seed}: must be at least 0"),
            (self.workers >= 0, f"workers={self.workers}: must be at least 0"),
            (self.resolution % 64 == 0, f"resolution={self.resolution}: must be a multiple of 64"),
            (
                self.vae.crop <= self.resolution,
                f"vae.crop={self.vae.crop}: must be at most resolution={self.resolution}",
            ),
            (
                self.data.frames <= self.motion.max_frames,
                f"data.frames={self.data.frames}: must be at most motion.max_frames={self.motion.max_frames}",
            ),
            (
                self.wan_vae.crop <= self.resolution,
                f"wan_vae.crop={self.wan_vae.crop}: must be at most resolution={self.resolution}",
            ),
        )
