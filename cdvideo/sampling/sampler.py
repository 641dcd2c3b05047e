"""The sampler, its steps and the guidance of a film where nobody says (no torch)."""

from __future__ import annotations

import dataclasses

from cdvideo.errors import UserError
from cdvideo.motion.config import MotionConfig
from cdvideo.sampling.config import AnimateConfig

LCM_STEPS = 50  # the steps that latent consistency models were distilled from; fewer are chosen from them


def settled(config: AnimateConfig, motion: MotionConfig | None) -> AnimateConfig:
    """The settings with sampler, steps and guidance chosen: as asked for, else as the motion modules were made for.

    Raises:
        UserError: More steps than LCM's sampler has.
    """
    made_for = motion or MotionConfig()
    sampler = (made_for.sampler or "ddim") if config.scheduler == "auto" else config.scheduler
    steps, guidance = config.steps or made_for.steps or 25, config.guidance or made_for.guidance or 5.0
    if sampler == "lcm" and steps > LCM_STEPS:
        raise UserError(
            f"{steps} steps of LCM's sampler", allowed=f"1 to {LCM_STEPS} steps", do="ask for 4 to 8: --steps 6"
        )
    return dataclasses.replace(config, scheduler=sampler, steps=steps, guidance=guidance)


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
