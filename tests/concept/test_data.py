from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from cdvideo.base.latents import encode_pixels
from cdvideo.base.loader import Base, load_base
from cdvideo.concept.config import SAMPLE_PICTURES, DataConfig
from cdvideo.concept.data import augment, cache_latents, draw_mixed, picture_side
from cdvideo.errors import UserError
from cdvideo.media.images import Picture

CELL, SIZE = 8, 64
NAMES = {"phrase": "sks dog", "class_phrase": "dog"}


def half_red() -> Image.Image:
    image = Image.new("RGB", (64, 64), "blue")
    image.paste("red", (0, 0, 32, 64))
    return image


def test_without_augmentation_the_picture_is_shown_as_it_is() -> None:
    variant = augment(half_red(), SIZE, DataConfig(flip=False, rescale=0), random.Random(0), cell=CELL)
    pixels = torch.from_numpy(np.asarray(half_red(), dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
    assert torch.equal(variant.pixels_CHW, pixels)
    assert variant.size == "full" and variant.mask_1HW.all()


def test_the_middle_square_of_a_wide_picture_is_taken() -> None:
    wide = Image.new("RGB", (200, 64), "black")
    wide.paste("white", (68, 0, 132, 64))
    variant = augment(wide, SIZE, DataConfig(flip=False, rescale=0), random.Random(0), cell=CELL)
    assert variant.pixels_CHW.shape == (3, SIZE, SIZE) and variant.pixels_CHW.min() == 1


def test_half_of_the_variants_are_mirrored() -> None:
    rng, config = random.Random(0), DataConfig(rescale=0)
    red_left = [augment(half_red(), SIZE, config, rng, cell=CELL).pixels_CHW[0, 0, 0].item() > 0 for _ in range(100)]
    assert 30 < sum(red_left) < 70


def test_a_small_variant_counts_only_inside_of_the_pasted_picture() -> None:
    rng, config = random.Random(0), DataConfig(rescale=1, largest_scale=1)
    white, sides = Image.new("RGB", (64, 64), "white"), set()
    for _ in range(40):
        variant = augment(white, SIZE, config, rng, cell=CELL)
        if variant.size == "small":
            pasted_HW = (variant.pixels_CHW == 1).all(dim=0)
            assert pasted_HW.any() and not pasted_HW.all()
            assert variant.mask_1HW.any() and not variant.mask_1HW[0][~pasted_HW].any()
            rows = variant.mask_1HW[0].any(dim=1).nonzero().flatten()
            assert rows[0] % CELL == 0 and (rows[-1] + 1) % CELL == 0  # whole latent cells
            sides.add(int(pasted_HW.any(dim=1).sum()))
    assert sides and min(sides) >= round(0.6 * SIZE / CELL) * CELL


def test_a_large_variant_fills_the_canvas_and_counts_whole() -> None:
    rng, config = random.Random(0), DataConfig(rescale=1, smallest_scale=1, largest_scale=2)
    large = [v for v in (augment(half_red(), SIZE, config, rng, cell=CELL) for _ in range(30)) if v.size == "large"]
    assert large and all(variant.mask_1HW.all() and variant.pixels_CHW.shape == (3, SIZE, SIZE) for variant in large)


def test_latents_are_cached_in_variants_with_the_plain_picture_first(tiny_base: Base, pictures: list[Picture]) -> None:
    config = DataConfig(variants=5, rescale=1)
    cache = cache_latents(tiny_base, pictures, config, seed=3, quiet=True, **NAMES)
    assert cache.latents_NCHW.shape == (15, 4, 8, 8) and cache.masks_N1HW.shape == (15, 1, 8, 8)
    plain = augment(pictures[1].image, 64, DataConfig(flip=False, rescale=0), random.Random(0), cell=8)
    assert torch.equal(cache.latents_NCHW[5], encode_pixels(tiny_base.vae, plain.pixels_CHW[None])[0])
    again = cache_latents(tiny_base, pictures, config, seed=3, quiet=True, **NAMES)
    assert torch.equal(again.latents_NCHW, cache.latents_NCHW) and again.sizes == cache.sizes
    assert cache_latents(tiny_base, pictures, config, seed=4, quiet=True, **NAMES).sizes != cache.sizes


def test_prompts_tell_the_size(tiny_base: Base, pictures: list[Picture]) -> None:
    cache = cache_latents(tiny_base, pictures, DataConfig(variants=20, rescale=0.7), seed=0, quiet=True, **NAMES)
    assert set(cache.sizes) == {"small", "full", "large"}
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(60):
        batch = cache.draw(1, generator)
        (prompt,), (class_prompt,) = batch.prompts, batch.class_prompts
        index = next(n for n, latent in enumerate(cache.latents_NCHW) if torch.equal(latent, batch.latents_BCHW[0]))
        size = cache.sizes[index]
        assert torch.equal(batch.masks_B1HW[0], cache.masks_N1HW[index])
        assert class_prompt == prompt.replace("sks dog", "dog")
        assert "sks dog" in prompt
        assert (size == "small") == prompt.endswith(" far away") and (size == "large") == ("close up" in prompt)
        seen.add(size)
    assert seen == {"small", "full", "large"}


def test_a_mixed_batch_holds_every_subject_under_its_own_name(tiny_base: Base, pictures: list[Picture]) -> None:
    dog = cache_latents(tiny_base, pictures[:1], DataConfig(variants=8), seed=0, quiet=True, **NAMES)
    cat = cache_latents(
        tiny_base, pictures[1:], DataConfig(variants=1), phrase="tom cat", class_phrase="cat", seed=0, quiet=True
    )
    generator, seen = torch.Generator().manual_seed(0), {"sks dog": 0, "tom cat": 0}
    for _ in range(50):
        batch = draw_mixed([dog, cat], 4, generator)
        assert len(batch.latents_BCHW) == len(batch.masks_B1HW) == len(batch.prompts) == 4
        for latent_CHW, prompt, class_prompt in zip(
            batch.latents_BCHW, batch.prompts, batch.class_prompts, strict=True
        ):
            cache = dog if "sks dog" in prompt else cat
            assert cache.phrase in prompt and class_prompt == prompt.replace(cache.phrase, cache.class_phrase)
            assert (cache.latents_NCHW == latent_CHW).all(dim=(1, 2, 3)).any()
            seen[cache.phrase] += 1
    assert all(80 <= count <= 120 for count in seen.values())  # alike, though one has far more latents


def test_the_embedded_base_sees_where_its_subject_stands() -> None:
    """Before a plain wall the subject is what is not wall."""
    base = load_base("tiny", device=torch.device("cpu"))
    image = Image.open(SAMPLE_PICTURES / "3.png").convert("RGB")
    config = DataConfig(variants=1, focus="subject")
    cache = cache_latents(base, [Picture(name="3.png", image=image)], config, **NAMES, seed=0, quiet=True)
    pixels_HWC = np.asarray(image, dtype=np.int32)
    differs_HW = np.abs(pixels_HWC - pixels_HWC[2, 2]).max(axis=-1) > 60
    cells_HW = differs_HW.reshape(16, 8, 16, 8).mean(axis=(1, 3)) > 0.3
    seen_HW = cache.masks_N1HW[0, 0].bool().numpy()
    overlap = (cells_HW & seen_HW).sum() / (cells_HW | seen_HW).sum()
    print(f"overlap {overlap:.2f}, subject {cells_HW.mean():.2f} of the picture, seen {seen_HW.mean():.2f}")
    assert overlap > 0.6 and seen_HW.mean() < 0.6


def test_focus_only_takes_away_from_where_the_loss_counts(tiny_base: Base) -> None:
    pictures = [Picture(name="0.png", image=half_red())]
    caches = [
        cache_latents(tiny_base, pictures, DataConfig(variants=4, focus=focus), **NAMES, seed=0, quiet=True)
        for focus in ("picture", "subject")
    ]
    whole, subject = (cache.masks_N1HW for cache in caches)
    assert not caches[0].around_N1HW.any() and torch.equal(caches[1].around_N1HW, whole - subject)
    assert set(subject.unique().tolist()) <= {0.0, 1.0}
    assert (subject <= whole).all() and (subject.sum(dim=(1, 2, 3)) > 0).all()


def test_pictures_are_shown_at_the_resolution_that_is_asked_for(tiny_base: Base, pictures: list[Picture]) -> None:
    cache = cache_latents(tiny_base, pictures, DataConfig(variants=2), seed=0, resolution=72, quiet=True, **NAMES)
    assert cache.latents_NCHW.shape == (6, 4, 9, 9) and cache.masks_N1HW.shape == (6, 1, 9, 9)
    plain = augment(pictures[1].image, 72, DataConfig(flip=False, rescale=0), random.Random(0), cell=8)
    assert torch.equal(cache.latents_NCHW[2], encode_pixels(tiny_base.vae, plain.pixels_CHW[None])[0])


def test_a_resolution_between_two_latents_is_refused(tiny_base: Base) -> None:
    assert picture_side(tiny_base, None) == 64 and picture_side(tiny_base, 72) == 72
    with pytest.raises(UserError, match=r"resolution=100\n  allowed: multiples of 8.*\n  do: set resolution=96"):
        picture_side(tiny_base, 100)
