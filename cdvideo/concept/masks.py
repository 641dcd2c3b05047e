"""Where a concept's pictures are learned: only where the base itself sees the class, and how a person sees that."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.base.prompts import encode_prompts, latent_sizes, repeated
from cdvideo.base.schedule import add_noise, make_scheduler
from cdvideo.media.images import Picture, contact_sheet

logger = logging.getLogger(__name__)

MASKS_FILE = "masks.png"
FEWEST_SEEN, MOST_SEEN = 0.02, 0.98  # of a picture: beyond them a mask tells the subject from nothing
DRAWS = 4  # of noise
THRESHOLD = 0.2  # of the contrast where the subject is clearest
NOISED_AT_ONCE = 16  # pictures; a seed's masks do not depend on how many go through the UNet at once


@torch.no_grad()
def subject_masks(base: Base, latents_NCHW: Tensor, class_prompt: str, *, seed: int, at_once: int = 32) -> Tensor:
    """Where the base itself sees the class in each picture: masks_N1HW, 0 or 1.

    DiffEdit (arXiv 2210.11427, section 3.2): half of the noise is added, and where the predictions for two prompts,
    here the class's and the empty one, differ most, there the subject is. Smoothing leaves a narrow border around it.

    Args:
        class_prompt: Such as "a picture of a dog".
        seed: Of the noise.
        at_once: Latents that go through the UNet together. As many as in a training step take less memory than it does.
    """
    generator = torch.Generator().manual_seed(seed)
    scheduler = make_scheduler(base.scheduler_config)
    text = encode_prompts(base, [class_prompt, ""])
    masks = []
    for part_BCHW in latents_NCHW.split(NOISED_AT_ONCE):
        timesteps_B = torch.full((len(part_BCHW),), scheduler.config["num_train_timesteps"] // 2, device=base.device)
        text_RLD = text.hidden_BLD.repeat_interleave(len(part_BCHW), dim=0)
        added = repeated(text.added(latent_sizes(base, part_BCHW)), len(part_BCHW))
        contrast_B1HW = torch.zeros_like(part_BCHW[:, :1])
        for _ in range(DRAWS):
            noise_BCHW = torch.randn(part_BCHW.shape, generator=generator).to(base.device)
            noisy_RCHW = add_noise(scheduler, part_BCHW, noise_BCHW, timesteps_B).to(base.dtype).repeat(2, 1, 1, 1)
            rows = [slice(start, start + at_once) for start in range(0, len(noisy_RCHW), at_once)]
            prediction_RCHW = torch.cat([
                base.unet(
                    noisy_RCHW[part],
                    timesteps_B[0],
                    text_RLD[part],
                    added_cond_kwargs=added and {name: each[part] for name, each in added.items()},
                ).sample
                for part in rows
            ]).float()  # fmt: skip
            with_class_BCHW, without_BCHW = prediction_RCHW.chunk(2)
            contrast_B1HW += (with_class_BCHW - without_BCHW).abs().mean(dim=1, keepdim=True)
        width = 2 * (part_BCHW.shape[-1] // 16) + 1  # about an eighth of a side
        smooth_B1HW = F.avg_pool2d(contrast_B1HW, width, stride=1, padding=width // 2, count_include_pad=False)
        clearest_B111 = smooth_B1HW.flatten(1).quantile(0.95, dim=1).view(-1, 1, 1, 1)
        masks.append((smooth_B1HW > THRESHOLD * clearest_B111).float())
    return torch.cat(masks)


def learned_masks(pasted_N1HW: Tensor, subject_N1HW: Tensor, names: Sequence[str], *, class_phrase: str) -> Tensor:
    """Where the loss counts in each variant: masks_N1HW, 0 or 1, with at least one cell each.

    That is where the subject is seen within what was pasted. A picture in which it is seen nearly nowhere or nearly
    everywhere is learned whole, in all its variants, and that is said; so is, in silence, a variant that has next to
    none of the subject.

    Args:
        pasted_N1HW: Where the pictures lie in their canvas.
        subject_N1HW: Where the base sees the class.
        names: The pictures' file names; each has equally many variants, the first of which is the picture as it is.
        class_phrase: How the class was asked for ("dog").
    """
    masks_N1HW = pasted_N1HW * subject_N1HW
    shares_N = masks_N1HW.sum(dim=(1, 2, 3)) / pasted_N1HW.sum(dim=(1, 2, 3))
    whole_N = shares_N < FEWEST_SEEN
    variants = len(masks_N1HW) // len(names)
    for number, (name, share) in enumerate(zip(names, shares_N[::variants].tolist(), strict=True)):
        if not FEWEST_SEEN <= share <= MOST_SEEN:
            whole_N[number * variants : (number + 1) * variants] = True
            logger.warning(
                "%s: the base sees a %s in %.1f %% of it, which tells nothing apart; it is learned whole",
                name,
                class_phrase,
                100 * share,
            )
    return torch.where(whole_N[:, None, None, None], pasted_N1HW, masks_N1HW)


def mask_sheet(pictures: Sequence[Picture], masks_N1HW: Tensor, *, title: str, side: int = 256) -> Image.Image:
    """Draws each picture as it is trained on, and beside it what is learned of it: the rest is pale and grey.

    Args:
        masks_N1HW: 1 where a picture is learned, in latent cells.
        title: A line above all.
        side: Of a picture on the sheet, in pixels.
    """
    pairs, captions = [], []
    for picture, mask_1HW in zip(pictures, masks_N1HW.cpu(), strict=True):
        image = ImageOps.fit(picture.image, (side, side), Image.Resampling.LANCZOS)
        pale = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, "white"), 0.7)
        mask = Image.fromarray((255 * mask_1HW[0]).byte().numpy()).resize(image.size, Image.Resampling.NEAREST)
        pair = Image.new("RGB", (2 * side + 16, side), "white")
        pair.paste(image, (0, 0))
        pair.paste(Image.composite(image, pale, mask), (side + 4, 0))
        pairs.append(np.asarray(pair))
        name = picture.name if len(picture.name) <= 48 else f"{picture.name[:32]}...{picture.name[-13:]}"
        captions.append(f"{name}: {'whole' if mask_1HW.all() else f'{mask_1HW.mean():.0%}'}")
    return contact_sheet(np.stack(pairs), captions, title=title, side=2 * side + 16, columns=2)
