"""What makes sampling fast, each with its switch, and the presets of `--speed` (imports no torch).

The exact switches leave nothing out: what they change is the order of additions, and with it roundings. Winograd's
convolutions are another sum of the same value, with five digits of float32's seven. The approximate ones leave work
out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cdvideo.errors import UserError

STOCHASTIC = ("lcm",)  # samplers that add fresh noise after a step: what was answered before it says nothing of it


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The switches of the sampler. All exact ones but compiling are on by default, all approximate ones off."""

    time_table: bool = True
    """Exact: what the resnets add for the time is computed once for each step, in the bias of their convolutions."""
    shared_prefix: bool = True
    """Exact: the two halves of guidance are one until the first cross-attention reads text."""
    resnets: bool = True
    """Exact: resnets keep channels last; the group norm needs two sums, the shortcut joins its matrix product."""
    attentions: bool = True
    """Exact: spatial transformers without copies between layouts; sums, gates and GELU join the matrix products, and on
    CPUs so do the keys and values of short texts."""
    motion: bool = True
    """Exact: motion modules likewise; frames attend to each other in batched products, not in many small calls."""
    upsampling: bool = True
    """Exact: enlarging by doubling pixels, then a 3x3 convolution, is four 2x2 convolutions of the small picture."""
    winograd: bool = True
    """Exact but for two of seven digits: on CPUs in float32 3x3 convolutions from 96 channels on, the VAE's too, with a
    quarter of the products (Winograd)."""
    halves: bool = True
    """Exact: on CPUs, from where the halves of guidance differ they are computed at once, each by half of the cores;
    with the shared prefix, and where no deep feature is kept."""
    compiled: bool = False
    """Exact: the UNet is one compiled graph, in place of all above but the prefix; asked for apart (--compile)."""

    asked: tuple[float, ...] = ()
    """Approximate: the steps at which the model is asked, as shares of the film's, most of them early, where the
    composition is decided; in between its answer is forecast. () asks at every step."""
    deep_every: int = 1
    """Approximate: the inner layers are computed at every n-th step, and their last output is used in between
    (DeepCache, arXiv 2312.00858)."""
    deep_layers: int = 1
    """How many of the last up layers, and as few of the first down layers, `deep_every` leaves at every step."""
    guided_until: float = 1.0
    """Approximate: share of the steps, from the start, that are guided; the rest go without (arXiv 2404.07724)."""

    @property
    def is_exact(self) -> bool:
        return not self.asked and self.deep_every == 1 and self.guided_until >= 1

    def on(self, device: str) -> Speed:
        """What of it is used on a kind of device ("cpu", "cuda"): the one place that chooses blocks by the device."""
        return self if device == "cpu" else switched_off(self, *CPU_ALONE)

    def computed_steps(self, steps: int) -> list[int]:
        """The steps at which the model is asked."""
        if not self.asked:
            return list(range(steps))
        return sorted({min(round(share * steps), steps - 1) for share in self.asked})


# Written for CPUs. Of these, an H200 films 1.4 to 2.6 % faster without each of the first four (README, "On a GPU").
CPU_ALONE = ("time_table", "resnets", "motion", "upsampling", "winograd", "halves")


def switched_off(speed: Speed, *switches: str) -> Speed:
    """The same without these exact switches."""
    off: dict[str, Any] = dict.fromkeys(switches, False)
    return replace(speed, **off)


PLAIN = Speed(  # the reference: every block as diffusers computes it
    time_table=False,
    shared_prefix=False,
    resnets=False,
    attentions=False,
    motion=False,
    upsampling=False,
    winograd=False,
    halves=False,
)
EXACT = Speed()
# Measured on the embedded base, 16 frames, 25 DDIM steps, fp32, five films of "a dog wearing headphones surfing"
# against diffusers' (scripts/benchmark.py sampler): 34.0 dB (32.7 to 34.6), and 25.4 dB (23.8 to 27.7).
PRESETS: dict[str, Speed] = {
    "exact": EXACT,
    "balanced": Speed(asked=(0, 0.04, 0.08, 0.12, 0.16, 0.2, 0.24, 0.32, 0.4, 0.52, 0.68, 0.88)),
    "fast": Speed(asked=(0, 0.04, 0.08, 0.16, 0.24, 0.36, 0.56, 0.84)),
}


def check_speed(speed: Speed, sampler: str) -> None:
    """Raises UserError for approximations that carry answers over a step after which the sampler draws new noise."""
    if sampler in STOCHASTIC and not speed.is_exact:
        raise UserError(
            f"a speed that forecasts or reuses answers, with the sampler {sampler}, which adds new noise at every step",
            allowed=f"speed=exact with {sampler}; other speeds with ddim, dpm++ and euler",
            do="leave --speed out: such a sampler takes few steps as it is",
        )
