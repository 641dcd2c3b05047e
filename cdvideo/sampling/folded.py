"""Concepts that change more of the UNet than what reads text: while a film is made they are in its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from diffusers import UNet2DConditionModel

from cdvideo.concept.adapters import tuned
from cdvideo.concept.concept import Concept
from cdvideo.errors import UserError
from cdvideo.sampling.options import Control


@dataclass(frozen=True)
class Folded:
    """A concept in the UNet's weights, and how strongly it acts there."""

    concept: Concept
    control: Control

    @property
    def varies(self) -> bool:
        """Whether its strength depends on the step."""
        return not self.control.concept_curves[0].constant

    @contextmanager
    def acting(self, unet: UNet2DConditionModel, *, done: float) -> Iterator[None]:
        """Within the block the UNet is as the concept has tuned it, at its strength when that share is denoised."""
        over_steps, over_frames = self.control.concept_curves
        strength = over_steps.at(done) * over_frames.at(0)
        share = None if self.control.concept_is_whole else lambda name: strength * self.control.share_of(name)
        with tuned(unet, self.concept, share=share):
            yield


def folded_concept(films: Sequence[tuple[Concept | None, Control]], *, compiled: bool) -> Folded | None:
    """The concept that has to be in the UNet itself while these films are made: one that changes more than K and V.

    Raises:
        UserError: films that want different weights of the UNet at once, or at a step of a compiled one.
    """
    folded = [(each, how) for each, how in films if each is not None and each.metadata.adapter not in ("kv", "token")]
    if not folded:
        return None
    concept, control = folded[0]
    kind, found = concept.metadata.adapter, Folded(concept, control)
    if any(each is not concept for each, _ in films):
        raise UserError(
            f"films of different concepts in one batch, one of them of kind {kind}",
            allowed="concepts of token, K and V in one batch; one set of weights can hold one concept of another kind",
            do="choose a batch of 1",
        )
    if any(how != control for _, how in films) and not all(how.concept_is_whole for _, how in films):
        raise UserError(
            f"films of different strengths of a concept of kind {kind} in one batch",
            allowed="one strength in a batch, since it is in the UNet's weights",
            do="choose a batch of 1",
        )
    if not control.concept_curves[1].constant:
        raise UserError(
            f"a strength that changes over frames, for a concept of kind {kind}",
            allowed="over frames a concept of token, K and V, which the frames read one by one; over steps any",
            do="choose a strength over steps (concept_strength), or learn the concept with adapter.kind=kv",
        )
    if compiled and found.varies:
        raise UserError(
            f"a strength that changes over steps, for a concept of kind {kind}, with --compile",
            allowed="one strength all along, since the compiled graph holds the weights",
            do="leave --compile out",
        )
    return found
