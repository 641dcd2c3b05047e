"""Where pictures are learned: what the base sees, what becomes of a mask that tells nothing, what a person is shown."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cdvideo.base.latents import encode_pixels
from cdvideo.base.loader import Base, load_base
from cdvideo.base.memory import metered
from cdvideo.concept import data
from cdvideo.concept.config import SAMPLE_PICTURES, ConceptConfig, DataConfig
from cdvideo.concept.data import cache_latents
from cdvideo.concept.masks import learned_masks, mask_sheet, subject_masks
from cdvideo.concept.trainer import train_concept
from cdvideo.media.images import Picture
from cdvideo.runs import Run
from tests.concept.parts import changed


def cells(*shares: float) -> Tensor:
    """Masks of 20 x 20 cells, each 1 from the top as far as its share goes."""
    masks_N1HW = torch.zeros(len(shares), 1, 20, 20)
    for mask_1HW, share in zip(masks_N1HW, shares, strict=True):
        mask_1HW.view(-1)[: round(share * 400)] = 1
    return masks_N1HW


def test_a_picture_whose_mask_tells_nothing_is_learned_whole_and_named(caplog: pytest.LogCaptureFixture) -> None:
    pasted_N1HW = torch.ones(10, 1, 20, 20)
    pasted_N1HW[1::2, :, :, :10] = 0  # of each picture the second variant is pasted into the right half
    subject_N1HW = cells(0.4, 0.6, 0.0175, 0.5, 0.9825, 0.5, 0.0225, 0.5, 0.9775, 0.5)
    names = ["usual.jpg", "nowhere.jpg", "everywhere.jpg", "little.jpg", "much.jpg"]
    with caplog.at_level(logging.WARNING):
        masks_N1HW = learned_masks(pasted_N1HW, subject_N1HW, names, class_phrase="dog")
    whole = {2, 3, 4, 5}
    for number, mask_1HW in enumerate(masks_N1HW):
        seen_1HW = 1 if number in whole else subject_N1HW[number]
        assert torch.equal(mask_1HW, pasted_N1HW[number] * seen_1HW), number
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert (
        "nowhere.jpg: the base sees a dog in 1.8 %" in told[0] and "everywhere.jpg: the base sees a dog in" in told[1]
    )


def test_a_variant_without_the_subject_counts_where_it_was_pasted(caplog: pytest.LogCaptureFixture) -> None:
    """The subject of the whole picture is seen above, the small variant lies below: no cell is in both."""
    pasted_N1HW = torch.stack([torch.ones(1, 20, 20), 1 - cells(0.5)[0], torch.ones(1, 20, 20)])
    masks_N1HW = learned_masks(pasted_N1HW, cells(0.3, 0.3, 0.3), ["a.jpg"], class_phrase="dog")
    assert torch.equal(masks_N1HW, torch.stack([cells(0.3)[0], pasted_N1HW[1], cells(0.3)[0]]))
    assert not caplog.records


def test_masks_do_not_depend_on_how_many_pictures_are_asked_about_at_once() -> None:
    """The embedded base sees its dog in the same place; what it takes is by the pictures at once."""
    base = load_base("tiny", device=torch.device("cpu"))
    pixels = [np.asarray(Image.open(SAMPLE_PICTURES / f"{number}.png").convert("RGB")) for number in (1, 3)]
    pixels_NHWC = torch.from_numpy(np.stack(pixels)).float() / 127.5 - 1
    with torch.no_grad():
        latents_NCHW = encode_pixels(base.vae, pixels_NHWC.permute(0, 3, 1, 2))
    found, took = [], []
    for at_once in (1, 3, 32):
        with metered() as meter:
            found.append(subject_masks(base, latents_NCHW, "a picture of a dog", seed=0, at_once=at_once))
        took.append(meter.peak)
    assert all(torch.equal(masks, found[0]) for masks in found)
    assert 0.1 < found[0].mean() < 0.7
    assert 2 * took[0] < took[1] < took[2]


@pytest.mark.parametrize("style", ["photo", "picture"])
def test_the_base_is_asked_in_the_style_of_the_run(
    tiny_base: Base, pictures: list[Picture], monkeypatch: pytest.MonkeyPatch, style: Literal["photo", "picture"]
) -> None:
    asked = []

    def note(_base: Base, latents_NCHW: Tensor, prompt: str, *, seed: int, at_once: int) -> Tensor:
        asked.append((prompt, at_once))
        return torch.ones_like(latents_NCHW[:, :1])

    monkeypatch.setattr(data, "subject_masks", note)
    config = DataConfig(style=style, variants=1)
    cache_latents(tiny_base, pictures, config, phrase="sks owl", class_phrase="owl", seed=0, at_once=3, quiet=True)
    assert asked == [(f"a {style} of an owl", 3)]


def test_the_sheet_shows_each_picture_beside_what_is_learned_of_it() -> None:
    pictures = [Picture(name=name, image=Image.new("RGB", (90, 64), "red")) for name in ("a.jpg", "b" * 99, "c.jpg")]
    masks_N1HW = torch.ones(3, 1, 8, 8)
    masks_N1HW[0, :, :, 4:] = 0
    sheet = mask_sheet(pictures, masks_N1HW, title="what is learned", side=80)
    assert sheet.width == 2 * (2 * 80 + 16) and sheet.height > 2 * 80
    pixels_HWC = np.asarray(sheet)
    top = int(np.flatnonzero((pixels_HWC[:, 40] == (255, 0, 0)).all(axis=1))[0])
    first_HWC = pixels_HWC[top + 4 : top + 76]
    red, white = (255, 0, 0), (255, 255, 255)
    assert (first_HWC[:, :80] == red).all(), "the picture"
    assert (first_HWC[:, 80:84] == white).all(), "a gap"
    assert (first_HWC[:, 84:124] == red).all(), "what is learned"
    rest_HWC = first_HWC[:, 124:164]
    assert (rest_HWC == rest_HWC[0, 0, 0]).all() and rest_HWC[0, 0, 0] > 180, "the rest is pale and grey"
    assert (first_HWC[:, 176 : 176 + 80] == red).all() and (first_HWC[:, 176 + 84 : 176 + 164] == red).all()


@pytest.mark.parametrize("focus", ["subject", "picture"])
def test_a_run_shows_its_masks_and_tells_the_shares(
    tiny_base: Base,
    pictures: list[Picture],
    config: ConceptConfig,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    focus: Literal["subject", "picture"],
) -> None:
    """Only where it learns less than whole pictures."""

    def lower_left(_base: Base, latents_NCHW: Tensor, _prompt: str, **_: int) -> Tensor:
        return torch.ones_like(latents_NCHW[:, :1]).tril(0)

    monkeypatch.setattr(data, "subject_masks", lower_left)
    shown = {"focus": focus, "rescale": 0.0}
    config = changed(config, data=shown, preserve={"background_weight": 0.0}, sample={"every": 0})
    train_concept(tiny_base, pictures, config, run, quiet=False)
    told = capsys.readouterr().out
    assert (run.folder / "masks.png").exists() == (focus == "subject")
    assert ("0.png 56%, 1.png 56%, 2.png 56%" in told) == (focus == "subject")
    if focus == "subject":
        assert str(Path(run.folder) / "masks.png") in told
        assert Image.open(run.folder / "masks.png").width == 2 * (2 * 256 + 16)
