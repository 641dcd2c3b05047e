"""The shape of a set of motion modules, in the words of diffusers' MotionAdapter."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from cdvideo.errors import UserError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

NormMode = Literal["original", "diffusers"]
MOST_BLOCKS, MOST_LAYERS = 8, 256
MOST_BYTES = 256_000_000  # of position tables
LARGEST = 1 << 16


@dataclass(frozen=True, kw_only=True)
class MotionConfig:
    """Everything that fixes the keys and shapes of motion modules, plus how their weights were trained.

    The first nine fields bear the names, meanings and defaults of diffusers' MotionAdapter.

    norm_mode: over what the GroupNorm at a motion module's entrance takes its statistics: "original" over each
        frame (what AnimateDiff's checkpoints were trained with), "diffusers" over all frames of a film jointly.
    beta_schedule, beta_end, timestep_spacing: the noise that the weights were trained for and the steps to take through
        it, in the words of diffusers' schedulers; None is the base's own.
    sampler, steps, guidance: what the weights were distilled for (AnimateLCM, Lightning); None where any will do.
    joint_image_norms: whether the image model's own GroupNorms, those of its resnets and its output, take their
        statistics over all frames of a film, as in AnimateDiff v1.
    trained_for: hash of the base that the weights were trained on, or None where nobody knows.
    """

    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    motion_layers_per_block: int | tuple[int, ...] = 2
    motion_transformer_layers_per_block: int | tuple[int, ...] = 1
    motion_mid_block_layers_per_block: int = 1
    motion_transformer_layers_per_mid_block: int | tuple[int, ...] = 1
    motion_num_attention_heads: int | tuple[int, ...] = 8
    motion_norm_num_groups: int = 32
    motion_max_seq_length: int = 32
    use_motion_mid_block: bool = True
    norm_mode: NormMode = "original"
    beta_schedule: Literal["linear", "scaled_linear"] | None = None
    beta_end: float = 0.012
    timestep_spacing: Literal["trailing"] | None = None
    sampler: Literal["euler", "lcm"] | None = None
    steps: int | None = None
    guidance: float | None = None
    joint_image_norms: bool = False
    trained_for: str | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        for channels, heads in zip(self.block_out_channels, self.heads_per_block, strict=True):
            if channels % heads:
                raise UserError(
                    f"{heads} temporal attention heads over {channels} channels",
                    allowed="a number of heads that divides the channels of its block",
                    do="change motion_num_attention_heads",
                )
        # What is built before the first weight is looked at.
        depths = zip(self.block_out_channels, self.layers_per_block, self.transformer_layers_per_block, strict=True)
        widths = [channels for channels, layers, depth in depths for _ in range(min(2 * layers + 1, 99) * depth)]
        widths += [self.block_out_channels[-1]] * sum(self.transformer_layers_per_mid_block)
        tables = 4 * self.motion_max_seq_length * sum(widths)
        if len(widths) > MOST_LAYERS or tables > MOST_BYTES:
            raise UserError(
                f"motion modules of {len(widths)} layers with {tables / 1e6:.0f} MB of position tables",
                allowed=f"at most {MOST_LAYERS} layers and {MOST_BYTES / 1e6:.0f} MB (AnimateDiff v2: 21 and 2)",
                do="correct the motion config",
            )

    def _check_numbers(self) -> None:
        """Raises UserError for numbers that no motion modules have."""
        groups = self.motion_norm_num_groups
        broken = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.name.startswith("motion_")
            and not all(1 <= number <= LARGEST for number in _numbers(getattr(self, field.name)))
        ]
        if not 1 <= len(self.block_out_channels) <= MOST_BLOCKS:
            broken.append(f"{len(self.block_out_channels)} blocks")
        elif not all(2 <= width <= LARGEST and width % 2 == width % groups == 0 for width in self.block_out_channels):
            broken.append(f"widths {self.block_out_channels} in {groups} groups")
        if self.sampler is not None and (self.steps is None or self.guidance is None):
            broken.append(f"sampler={self.sampler} without steps and guidance")
        if not (self.steps is None or 1 <= self.steps <= 1000) or not (self.guidance is None or self.guidance >= 0):
            broken.append(f"steps={self.steps}, guidance={self.guidance}")
        if not 0 < self.beta_end < 1:
            broken.append(f"beta_end={self.beta_end}")
        if broken:
            raise UserError(
                f"motion modules with {', '.join(broken)}",
                allowed=f"1 to {MOST_BLOCKS} blocks of even widths that their groups divide, and numbers from 1 on",
                do="correct the motion config",
            )

    @property
    def layers_per_block(self) -> tuple[int, ...]:
        """Motion modules in each down block; up blocks have one more, in reverse order."""
        return _per_block(self.motion_layers_per_block, len(self.block_out_channels))

    @property
    def transformer_layers_per_block(self) -> tuple[int, ...]:
        return _per_block(self.motion_transformer_layers_per_block, len(self.block_out_channels))

    @property
    def transformer_layers_per_mid_block(self) -> tuple[int, ...]:
        return _per_block(self.motion_transformer_layers_per_mid_block, self.motion_mid_block_layers_per_block)

    @property
    def heads_per_block(self) -> tuple[int, ...]:
        return _per_block(self.motion_num_attention_heads, len(self.block_out_channels))

    @property
    def schedule(self) -> dict[str, Any]:
        """Settings of a scheduler that films need in place of the base's own."""
        betas = {"beta_schedule": self.beta_schedule, "beta_start": 0.00085, "beta_end": self.beta_end}
        return (betas if self.beta_schedule else {}) | (
            {"timestep_spacing": self.timestep_spacing} if self.timestep_spacing else {}
        )

    @classmethod
    def for_unet(cls, unet: UNet2DConditionModel, **options: Any) -> MotionConfig:
        """The config that fits `unet`; `options` are any other fields, such as `motion_num_attention_heads=4`."""
        layers = _per_block(unet.config["layers_per_block"], len(unet.config["block_out_channels"]))
        return cls(
            block_out_channels=tuple(unet.config["block_out_channels"]),
            motion_layers_per_block=layers[0] if len(set(layers)) == 1 else layers,
            **{"motion_norm_num_groups": unet.config["norm_num_groups"], **options},
        )

    def check_fits(self, unet: UNet2DConditionModel) -> None:
        """Raises UserError where these motion modules can not sit in `unet`."""
        wanted = MotionConfig.for_unet(unet)
        given = (self.block_out_channels, self.layers_per_block)
        allowed = (wanted.block_out_channels, wanted.layers_per_block)
        if given != allowed:
            raise UserError(
                f"motion modules{_made_for(given[0])} of widths {given[0]} with {given[1]} layers per block",
                allowed=f"widths {allowed[0]} with {allowed[1]} layers per block, as the image model"
                f"{_made_for(allowed[0])} has",
                do="choose motion modules that were trained for this base",
            )


def _made_for(widths: tuple[int, ...]) -> str:
    """The image model of such widths, in words, where it is a known one."""
    known = {(320, 640, 1280, 1280): "Stable Diffusion 1.x or 2.x", (320, 640, 1280): "Stable Diffusion XL"}
    return f" (of {known[widths]})" if widths in known else ""


def _numbers(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else value


def _per_block(value: int | list[int] | tuple[int, ...], count: int) -> tuple[int, ...]:
    values = (value,) * count if isinstance(value, int) else tuple(value)
    if len(values) != count or not all(isinstance(v, int) for v in values):
        raise UserError(
            f"{value!r} for {count} blocks", allowed=f"one number, or {count} numbers", do="correct the motion config"
        )
    return values
