"""Semantic drift in what is drawn: does the class itself become the concept? Asked without the concept's token.

A concept that leaks shows in pictures of "a dog", drawn with the concept attached: other dogs become this dog.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from cdvideo.base.loader import Base
from cdvideo.concept.concept import Concept
from cdvideo.concept.phrases import fill
from cdvideo.evaluation.drawing import Pictures
from cdvideo.media.images import contact_sheet
from cdvideo.sampling.image import sample_images
from cdvideo.sampling.video import to_uint8

CLASS_PROMPT = "a picture of a {}"


def draw_class(
    base: Base,
    class_word: str,
    seeds: Sequence[int],
    *,
    concept: Concept | None,
    steps: int = 25,
    guidance: float = 5.0,
    batch: int = 16,
) -> Pictures:
    """Pictures of the class prompt from the noise of these seeds: images_BHWC. None draws what the base had drawn."""
    prompt = fill(CLASS_PROMPT, class_word)
    parts = [seeds[start : start + batch] for start in range(0, len(seeds), batch)]
    drawn = [
        sample_images(base, [prompt] * len(part), seeds=part, concept=concept, steps=steps, guidance=guidance)
        for part in parts
    ]
    return np.concatenate([to_uint8(pixels_BCHW) for pixels_BCHW in drawn])


def before_and_after(before_BHWC: Pictures, after_BHWC: Pictures, seeds: Sequence[int], *, title: str) -> Image.Image:
    """The class prompt's pictures, without the concept above, with it below, seed by seed."""
    captions = [f"{when}, seed {seed}" for when in ("before", "after") for seed in seeds]
    both_BHWC = np.concatenate([before_BHWC, after_BHWC])
    return contact_sheet(both_BHWC, captions, title=title, side=128, columns=len(seeds))
