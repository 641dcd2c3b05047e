"""The sampler, its steps and the guidance of a film where nobody says (no torch)."""

from __future__ import annotations

import dataclasses

from cdvideo.errors import UserError
from cdvideo.motion.config import MotionConfig
from cdvideo.sampling.config import AnimateConfig
from cdvideo.sampling.speed import PRESETS, check_speed

LCM_STEPS = 50  # the steps that latent consistency models were distilled from; fewer are chosen from them


def settled(config: AnimateConfig, motion: MotionConfig | None) -> AnimateConfig:
    """The settings with sampler, steps and guidance chosen: as asked for, else as the motion modules were made for.

    What motion modules were distilled for goes together: another sampler has its own usual steps and guidance.

    Raises:
        UserError: More steps than LCM's sampler has, or a preset of speed that does not go with the sampler.
    """
    made_for = motion or MotionConfig()
    sampler = (made_for.sampler or "ddim") if config.scheduler == "auto" else config.scheduler
    if made_for.sampler not in (None, sampler):
        made_for = MotionConfig()
    steps, guidance = config.steps or made_for.steps or 25, config.guidance or made_for.guidance or 5.0
    if sampler == "lcm" and steps > LCM_STEPS:
        raise UserError(
            f"{steps} steps of LCM's sampler", allowed=f"1 to {LCM_STEPS} steps", do="ask for 4 to 8: --steps 6"
        )
    check_speed(PRESETS[config.speed], sampler)
    return dataclasses.replace(config, scheduler=sampler, steps=steps, guidance=guidance)


def untried(config: AnimateConfig) -> str | None:
    """Where a preset of speed was not chosen for such settings, that, in a line; of settled settings."""
    assert config.guidance is not None and config.steps is not None
    far = {
        f"guidance {config.guidance:g}": config.guidance > 6,
        f"{config.steps} steps": config.steps > 30,
        f"{config.steps} steps of dpm++": config.scheduler == "dpm++" and config.steps < 15,
    }
    reasons = " and ".join(reason for reason, is_far in far.items() if is_far)
    if config.speed == "exact" or not reasons:
        return None
    return (
        f"--speed {config.speed} was chosen at 25 steps of ddim and guidance 5, not at {reasons}: the film may differ "
        "more from the exact one than is told of it; --compare prints how far"
    )


def described(config: AnimateConfig, motion: MotionConfig | None) -> str:
    """What was settled, in words, and where that is not what the motion modules were made for."""
    assert config.guidance is not None
    line = f"sampling: {config.scheduler}, {config.steps} steps, guidance {config.guidance:g}"
    if motion is None or motion.sampler is None:
        return line
    asked = (config.scheduler, config.steps, config.guidance)
    if asked == (motion.sampler, motion.steps, motion.guidance):
        return f"{line}, as the motion modules were made for"
    return f"{line}; the motion modules were made for {motion.sampler}, {motion.steps}, {motion.guidance:g}"
