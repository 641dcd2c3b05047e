"""Pictures of a class as the base draws them itself: what prior preservation holds a concept's training to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from cdvideo.base.loader import Base
from cdvideo.concept.config import ConceptConfig
from cdvideo.concept.phrases import fill, training_prompts
from cdvideo.media.images import Picture
from cdvideo.media.opening import open_picture
from cdvideo.runs import atomic_path, legal_name
from cdvideo.sampling.image import sample_images
from cdvideo.sampling.video import to_uint8

FIRST_SEED = 1_000_000  # far from the seeds by which concepts are looked at and measured
STEPS, GUIDANCE = 20, 5.0  # no settings: a run that is resumed goes on with the pictures that it began with


def prior_pictures(
    base: Base, config: ConceptConfig, folder: Path, *, quiet: bool = False
) -> Mapping[str, list[Picture]]:
    """`preserve.prior_images` pictures of each class word, drawn once and kept.

    DreamBooth (arXiv 2208.12242, section 3.3) draws them so. They lie in folder/<what determines them>/<class word>;
    those that are there already are taken, and with another base, precision, style or resolution none of them is.
    """
    side = config.resolution or base.resolution
    precision = str(base.dtype).removeprefix("torch.")
    folder = folder / f"{config.data.style}-{side}-{base.hash}-{precision}"
    templates = training_prompts(config.data.style)
    found: dict[str, list[Picture]] = {}
    for class_word in dict.fromkeys(config.class_words.values()):
        pictures = found[class_word] = []
        numbers = range(config.preserve.prior_images)
        for number in tqdm(numbers, desc=f"drawing {class_word}", unit="picture", leave=False, disable=quiet):
            path = folder / legal_name(class_word.replace(" ", "-")) / f"{number:04d}.png"
            if not path.exists():
                pixels_BCHW = sample_images(
                    base,
                    [fill(templates[number % len(templates)], class_word)],
                    seeds=[FIRST_SEED + number],
                    steps=STEPS,
                    guidance=GUIDANCE,
                    width=config.resolution,
                    height=config.resolution,
                )
                with atomic_path(path) as part:
                    Image.fromarray(to_uint8(pixels_BCHW)[0]).save(part)
            with open_picture(path) as image:
                pictures.append(Picture(name=path.name, image=image.convert("RGB")))
    return found
