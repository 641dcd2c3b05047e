from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cdvideo.errors import UserError
from cdvideo.media.images import contact_sheet, read_pictures

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def three(folder: Path) -> Path:
    """A folder of three good pictures."""
    for name in "abc":
        Image.new("RGB", (48, 40), RED).save(folder / f"{name}.png")
    return folder


def only(folder: Path) -> Image.Image:
    (picture,) = read_pictures(folder)
    assert picture.image.mode == "RGB"
    return picture.image


def test_pictures_come_in_order_and_a_good_number_is_no_news(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures = read_pictures(three(tmp_path))
    assert [picture.name for picture in pictures] == ["a.png", "b.png", "c.png"]
    assert pictures[0].image.size == (48, 40) and not caplog.records


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 40), BLUE)
    image.paste(RED, (0, 0, 32, 40))  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    read = only(tmp_path)
    assert read.size == (40, 64)
    assert read.getpixel((20, 5))[0] > 200 and read.getpixel((20, 60))[2] > 200  # red is on top now


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 20, 40))
    image.convert(mode).save(tmp_path / "a.png", **({"transparency": 0} if mode == "P" else {}))
    assert only(tmp_path).getpixel((30, 10)) == (255, 255, 255)


def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in (GREEN, RED)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert only(tmp_path).getpixel((0, 0)) == GREEN


def test_cmyk_grey_and_palette_become_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (40, 40), (0, 255, 255, 0)).save(tmp_path / "a.tiff")
    Image.new("L", (40, 40), 100).save(tmp_path / "b.png")
    Image.new("RGB", (40, 40), BLUE).quantize(4).save(tmp_path / "c.png")
    cmyk, grey, palette = (picture.image.getpixel((3, 3)) for picture in read_pictures(tmp_path))
    assert cmyk == RED and grey == (100, 100, 100) and palette == BLUE


def test_sixteen_bits_keep_their_brightness(tmp_path: Path) -> None:
    Image.fromarray(np.full((40, 40), 32768, dtype=np.uint16)).save(tmp_path / "a.png")
    Image.fromarray(np.full((40, 40), 0.25, dtype=np.float32)).save(tmp_path / "b.tiff")
    sixteen, floating = (picture.image.getpixel((3, 3)) for picture in read_pictures(tmp_path))
    assert sixteen == (128, 128, 128) and floating == (64, 64, 64)


def test_large_pictures_are_reduced_and_small_ones_left(tmp_path: Path) -> None:
    Image.new("RGB", (900, 600), RED).save(tmp_path / "a.jpg")
    Image.new("RGB", (70, 60), RED).save(tmp_path / "b.jpg")
    large, small = read_pictures(tmp_path, short_side=200)
    assert large.image.size == (300, 200) and small.image.size == (70, 60)


def test_other_files_are_ignored_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    three(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    assert len(read_pictures(tmp_path)) == 3
    (record,) = caplog.records
    assert ".hidden.png, notes.txt" in record.message and "\n" not in record.message


@pytest.mark.parametrize(("count", "warned"), [(1, True), (2, True), (3, False), (20, False), (21, True)])
def test_too_few_and_too_many_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int, warned: bool
) -> None:
    for number in range(count):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{number:02}.png")
    assert len(read_pictures(tmp_path)) == count
    assert [f"{count} pictures" in record.message for record in caplog.records] == [True] * warned


def test_no_folder_and_no_pictures_are_errors(tmp_path: Path) -> None:
    (tmp_path / "file.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for folder, given in (("missing", "there is no folder"), ("file.png", "is a file"), ("empty", "no pictures in")):
        with pytest.raises(UserError, match=given) as caught:
            read_pictures(tmp_path / folder)
        assert "allowed: a folder of 3 to 20 pictures" in str(caught.value) and "--images" in caught.value.do


def test_all_unusable_pictures_are_told_at_once(tmp_path: Path) -> None:
    three(tmp_path)
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:900])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "phone.heic").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match="4 of 7 pictures") as caught:
        read_pictures(tmp_path)
    message = caught.value.given
    assert "dot.png: only 1 x 1 pixels" in message and "phone.heic: can not be read (HEIC" in message
    assert "cut.png: can not be read" in message and "text.jpg: can not be read" in message


def test_a_contact_sheet_holds_every_picture_with_its_caption() -> None:
    frames_BHWC = np.stack([np.full((16, 16, 3), colour, dtype=np.uint8) for colour in (RED, GREEN, BLUE)])
    captions = ["a dog", "a dog wearing headphones surfing on the sea", "a cat"]
    sheet = contact_sheet(frames_BHWC, captions, title="step 3", side=100, columns=2)
    assert sheet.width == 200
    top = next(y for y in range(sheet.height) if sheet.getpixel((50, y)) == RED)
    assert sheet.getpixel((150, top + 50)) == GREEN
    below = sheet.crop((0, top + 100, 100, sheet.height))
    row = next(y for y in range(below.height) if below.getpixel((50, y)) == BLUE)
    assert below.crop((0, 0, 100, row)).convert("L").getextrema()[0] < 100  # ink of the caption
    assert sheet.crop((0, 0, 200, top)).convert("L").getextrema()[0] < 100  # ink of the title
