"""What the UNet is shown: every picture in several augmented variants, encoded once, and prompts that tell its size."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from cdvideo.base.latents import encode_pixels
from cdvideo.base.loader import Base
from cdvideo.base.offload import at_work
from cdvideo.concept.config import DataConfig
from cdvideo.concept.masks import learned_masks, subject_masks
from cdvideo.concept.phrases import CLOSE_UP, FAR_AWAY, fill, training_prompts
from cdvideo.errors import UserError
from cdvideo.media.images import Picture

Size: TypeAlias = Literal["small", "full", "large"]


@dataclass(frozen=True)
class Variant:
    """One picture as it is shown: pixels_CHW in [-1, 1], the region that counts (mask_1HW, in pixels), and its size.

    sizes_6, for SDXL (arXiv 2307.01952, section 2.2): height and width of the picture before it was scaled, what was
    cut off above and on the left, height and width of what is shown; in pixels.
    """

    pixels_CHW: Tensor
    mask_1HW: Tensor
    size: Size
    sizes_6: Tensor


def augment(image: Image.Image, size: int, config: DataConfig, rng: random.Random, *, cell: int) -> Variant:
    """One random variant of a picture, as Custom Diffusion makes them (arXiv 2212.04488, section 3.2).

    Enlarged pictures are cut; reduced ones are pasted onto grey, and the loss counts only where the picture lies, less
    one latent cell at each edge, whose content the VAE mixes with the grey.

    Args:
        image: RGB of any shape; its middle square is taken.
        size: Side of the result, in pixels.
        rng: Draws flip, scale and place.
        cell: Pixels to a side of a latent cell.
    """
    if config.flip and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    scale = 1.0
    if rng.random() < config.rescale:
        scale = rng.choice((rng.uniform(config.smallest_scale, 1), rng.uniform(1, config.largest_scale)))
    side = max(3 * cell, round(size * scale / cell) * cell)
    square = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
    gap = abs(size - side)
    x, y = rng.randint(0, gap), rng.randint(0, gap)
    mask_1HW = torch.ones(1, size, size)
    if side >= size:
        canvas = square.crop((x, y, x + size, y + size))
    else:
        x, y = x // cell * cell, y // cell * cell
        canvas = Image.new("RGB", (size, size), (128, 128, 128))
        canvas.paste(square, (x, y))
        mask_1HW.zero_()
        mask_1HW[:, y + cell : y + side - cell, x + cell : x + side - cell] = 1
    pixels_HWC = torch.from_numpy(np.asarray(canvas, dtype=np.float32) / 127.5 - 1)
    enlarged = side / min(image.size)
    top, left = (round((length * enlarged - side) / 2) for length in (image.height, image.width))
    if side >= size:
        top, left = top + y, left + x
    return Variant(
        pixels_HWC.permute(2, 0, 1),
        mask_1HW,
        "small" if side < size else "large" if side > size else "full",
        torch.tensor([image.height, image.width, top, left, size, size], dtype=torch.float32),
    )


@dataclass(frozen=True)
class Batch:
    """What a step is shown: latents_BCHW, and for each a prompt, and the same prompt of the class alone.

    masks_B1HW: 1 where the picture is to be learned; around_B1HW: 1 where it only surrounds the subject. sizes_B6: as a
    variant has them.
    """

    latents_BCHW: Tensor
    masks_B1HW: Tensor
    around_B1HW: Tensor
    sizes_B6: Tensor
    prompts: list[str]
    class_prompts: list[str]


@dataclass(frozen=True)
class LatentCache:
    """All variants of one subject as latents: latents_NCHW, masks_N1HW and around_N1HW in their cells, their sizes.

    `phrase` and `class_phrase` name the subject in prompts ("sks dog", "dog").
    """

    phrase: str
    class_phrase: str
    latents_NCHW: Tensor
    masks_N1HW: Tensor
    around_N1HW: Tensor
    sizes_N6: Tensor
    sizes: tuple[Size, ...]
    templates: tuple[str, ...]

    def draw(self, batch_size: int, generator: torch.Generator) -> Batch:
        """A batch, drawn with a generator of the CPU."""
        picks = torch.randint(len(self.sizes), (batch_size,), generator=generator)
        wordings = torch.randint(len(self.templates), (batch_size,), generator=generator).tolist()
        templates = [
            self._template(self.sizes[n], self.templates[t]) for n, t in zip(picks.tolist(), wordings, strict=True)
        ]
        picks = picks.to(self.latents_NCHW.device)
        prompts, class_prompts = ([fill(t, phrase) for t in templates] for phrase in (self.phrase, self.class_phrase))
        masks_B1HW, around_B1HW = self.masks_N1HW[picks], self.around_N1HW[picks]
        return Batch(self.latents_NCHW[picks], masks_B1HW, around_B1HW, self.sizes_N6[picks], prompts, class_prompts)

    def _template(self, size: Size, template: str) -> str:
        return (CLOSE_UP if size == "large" else template) + (FAR_AWAY if size == "small" else "")


def draw_mixed(caches: Sequence[LatentCache], batch_size: int, generator: torch.Generator) -> Batch:
    """A batch from several subjects, each as likely as the others for every place in it."""
    counts = torch.randint(len(caches), (batch_size,), generator=generator).bincount(minlength=len(caches)).tolist()
    return joined([cache.draw(count, generator) for cache, count in zip(caches, counts, strict=True) if count])


def joined(batches: Sequence[Batch]) -> Batch:
    """Several batches as one."""
    return Batch(
        torch.cat([batch.latents_BCHW for batch in batches]),
        torch.cat([batch.masks_B1HW for batch in batches]),
        torch.cat([batch.around_B1HW for batch in batches]),
        torch.cat([batch.sizes_B6 for batch in batches]),
        [prompt for batch in batches for prompt in batch.prompts],
        [prompt for batch in batches for prompt in batch.class_prompts],
    )


def picture_side(base: Base, resolution: int | None) -> int:
    """The side in pixels of the pictures that a concept is learned from; None is the base's own.

    Raises:
        UserError: no multiple of the pixels that one latent stands for.
    """
    cell = 2 ** (len(base.vae.config.block_out_channels) - 1)
    if resolution is not None and resolution % cell:
        raise UserError(
            f"resolution={resolution}",
            allowed=f"multiples of {cell}, the pixels to a side of one latent of base {base.name}",
            do=f"set resolution={resolution // cell * cell}",
        )
    return resolution or base.resolution


@torch.no_grad()
def cache_latents(
    base: Base,
    pictures: Sequence[Picture],
    config: DataConfig,
    *,
    phrase: str,
    class_phrase: str,
    seed: int,
    resolution: int | None = None,
    at_once: int = 4,
    quiet: bool = False,
) -> LatentCache:
    """Encodes `config.variants` variants of every picture; the first of each is the picture as it is.

    Args:
        resolution: Side of the pictures in pixels; None is the base's own.
        at_once: Pictures that the UNet is shown at once, where it is asked what it sees.
    """
    rng, generator = random.Random(seed), torch.Generator(base.device).manual_seed(seed)
    cell, side = 2 ** (len(base.vae.config.block_out_channels) - 1), picture_side(base, resolution)
    as_it_is = DataConfig(flip=False, rescale=0)
    variants = [
        augment(picture.image, side, as_it_is if number == 0 else config, rng, cell=cell)
        for picture in pictures
        for number in range(config.variants)
    ]
    bar = tqdm(variants, desc="encoding pictures", leave=False, disable=quiet)
    with at_work(base.device, base.vae):
        latents = [encode_pixels(base.vae, v.pixels_CHW[None], generator=generator).float() for v in bar]
    latents_NCHW = torch.cat(latents)
    pasted_N1HW = torch.stack([v.mask_1HW[:, ::cell, ::cell] for v in variants]).to(base.device)
    masks_N1HW = pasted_N1HW
    if config.focus == "subject":
        class_prompt = fill(training_prompts(config.style)[0], class_phrase)
        subject_N1HW = subject_masks(base, latents_NCHW, class_prompt, seed=seed, at_once=at_once)
        names = [picture.name for picture in pictures]
        masks_N1HW = learned_masks(pasted_N1HW, subject_N1HW, names, class_phrase=class_phrase)
    around_N1HW = pasted_N1HW - masks_N1HW
    sizes_N6 = torch.stack([v.sizes_6 for v in variants]).to(base.device)
    sizes, templates = tuple(v.size for v in variants), training_prompts(config.style)
    return LatentCache(phrase, class_phrase, latents_NCHW, masks_N1HW, around_N1HW, sizes_N6, sizes, templates)
