"""Pictures as phones, cameras and programs leave them: read as a viewer shows them, or told what they are."""

from __future__ import annotations

import io
import os
import stat
import struct
import subprocess
import sys
import warnings
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from cdvideo.errors import UserError
from cdvideo.media.clips import read_clip
from cdvideo.media.images import read_pictures

RED, GREEN, BLUE, GREY = (200, 70, 60), (80, 180, 80), (60, 80, 190), (120, 120, 120)


def only(folder: Path, **options: int) -> Image.Image:
    (picture,) = read_pictures(folder, **options)
    return picture.image


def close(image: Image.Image, colour: tuple[int, ...], *, levels: int = 4) -> bool:
    seen = image.getpixel((image.width // 2, image.height // 2))
    return max(abs(a - b) for a, b in zip(seen, colour, strict=True)) <= levels


# F05: colour profiles


def fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


WHITE = (0.9642, 1.0, 0.8249)


def packed(tags: dict[bytes, bytes], kinds: bytes) -> bytes:
    """A profile by ICC.1 (section 7); `kinds` are those of the device, of its colours and of the space between."""
    tags = {b"cprt": b"text\0\0\0\0none\0", b"wtpt": b"XYZ \0\0\0\0" + b"".join(map(fixed, WHITE)), **tags}
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78)
    table, data, at = b"", b"", 132 + 12 * len(tags)
    for tag, value in tags.items():
        table += tag + struct.pack(">II", at + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    head = b"none" + bytes([2, 16, 0, 0]) + kinds + bytes(12) + b"acsp" + bytes(28)
    head += b"".join(map(fixed, WHITE)) + bytes(48)
    return struct.pack(">I", at + len(data)) + head + struct.pack(">I", len(tags)) + table + data


def profile(*, space: bytes = b"RGB ", gamma: float = 2.2, primaries: tuple[tuple[float, ...], ...] = ()) -> bytes:
    """A profile of matrix and curve; without primaries, those of sRGB."""
    primaries = primaries or ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    if space == b"GRAY":
        return packed({b"kTRC": curve}, b"mntrGRAYXYZ ")
    tags = {}
    for letter, primary in zip((b"r", b"g", b"b"), primaries, strict=True):
        tags[letter + b"XYZ"] = b"XYZ \0\0\0\0" + b"".join(map(fixed, primary))
        tags[letter + b"TRC"] = curve
    return packed(tags, b"mntrRGB XYZ ")


ADOBE = profile(primaries=((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)))
P3 = profile(primaries=((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)))
PROPHOTO = profile(gamma=1.8, primaries=((0.79767, 0.28804, 0.0), (0.13519, 0.71188, 0.0), (0.03134, 0.00009, 0.82491)))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def stored(colour: tuple[int, ...], icc: bytes, mode: str = "RGB") -> Image.Image:
    """A colour as viewers show it, in the numbers by which a file with this profile stores it."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    image = Image.new("RGB", (64, 48), colour)
    return ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), source, outputMode=mode)


@pytest.mark.parametrize("icc", [ADOBE, P3, PROPHOTO], ids=["adobe", "p3", "prophoto"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "avif"])
def test_colours_are_those_that_a_viewer_shows(tmp_path: Path, icc: bytes, suffix: str) -> None:
    if suffix == "avif" and ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow reads no AVIF")
    options = {"jpg": {"quality": 98, "subsampling": 0}, "webp": {"lossless": True}, "avif": {"quality": 98}}
    for index, colour in enumerate((RED, GREEN, BLUE)):
        image = stored(colour, icc)
        image.save(tmp_path / f"{index}.{suffix}", icc_profile=icc, **options.get(suffix, {}))
    for picture, colour in zip(read_pictures(tmp_path), (RED, GREEN, BLUE), strict=True):
        assert close(picture.image, colour, levels=6)
    assert close(Image.fromarray(read_clip(tmp_path / f"0.{suffix}")[0]), RED, levels=6)


def test_profiles_of_grey_of_palettes_and_with_transparency(tmp_path: Path) -> None:
    linear = profile(space=b"GRAY", gamma=1.0)
    as_stored = round(255 * ((120 / 255 + 0.055) / 1.055) ** 2.4)  # the formula of sRGB, IEC 61966-2-1
    Image.new("L", (64, 48), as_stored).save(tmp_path / "a.png", icc_profile=linear)
    Image.new("LA", (64, 48), (as_stored, 255)).save(tmp_path / "b.png", icc_profile=linear)
    Image.new("L", (64, 48), as_stored).save(tmp_path / "c.jpg", icc_profile=profile(gamma=1.0))  # one of colours
    Image.fromarray(np.full((48, 64), as_stored * 257, np.uint16)).save(tmp_path / "d.png", icc_profile=linear)
    stored(RED, ADOBE).quantize(4).save(tmp_path / "e.png", icc_profile=ADOBE)
    opaque = stored(RED, ADOBE)
    opaque.putalpha(255)
    opaque.save(tmp_path / "f.png", icc_profile=ADOBE)
    clear = stored(RED, ADOBE)
    clear.putalpha(0)
    clear.save(tmp_path / "g.png", icc_profile=ADOBE)
    greys, reds, white = (pictures := read_pictures(tmp_path))[:4], pictures[4:6], pictures[6]
    assert all(close(picture.image, GREY, levels=5) for picture in greys)
    assert all(close(picture.image, RED) for picture in reds) and close(white.image, (255, 255, 255), levels=0)


def ink_profile() -> bytes:
    """A profile of a table: cyan alone is seen as a grey of L* 50, paper as white, all else black."""
    seen = {(0, 0, 0, 0): [255, 128, 128], (1, 0, 0, 0): [128, 128, 128]}
    grid = b"".join(bytes(seen.get(inks, [0, 128, 128])) for inks in product((0, 1), repeat=4))
    same = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + b"".join(map(fixed, (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    return packed({b"A2B0": table + same * 4 + grid + same * 3}, b"prtrCMYKLab ")


@pytest.mark.parametrize("suffix", ["tiff", "jpg"])
def test_inks_by_their_profile(tmp_path: Path, suffix: str) -> None:
    Image.new("CMYK", (64, 48), (255, 0, 0, 0)).save(tmp_path / f"a.{suffix}", icc_profile=ink_profile())
    assert close(only(tmp_path), (119, 119, 119))


def test_a_profile_of_srgb_changes_no_pixel(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=SRGB)
    assert np.array_equal(np.asarray(only(tmp_path)), pixels)


@pytest.mark.parametrize(
    "icc", [b"no profile at all", ADOBE[:200], profile(space=b"GRAY"), bytes(128)], ids=["text", "cut", "grey", "zeros"]
)
def test_a_broken_profile_is_said_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture, icc: bytes) -> None:
    for name in "abc":
        Image.new("RGB", (64, 48), RED).save(tmp_path / f"{name}.png", icc_profile=icc)
    assert all(close(picture.image, RED, levels=0) for picture in read_pictures(tmp_path))
    assert ["b.png: its colour profile can not be used" in record.getMessage() for record in caplog.records].count(
        True
    ) == 1
    assert len(caplog.records) == 3


# F06: many pixels


def peak_of(script: str) -> tuple[str, float]:
    """What a script prints in a process of its own, and by how much it grew, in MB."""
    measured = "from cdvideo.cli import peak_memory_bytes\nimport cdvideo.media.images\nimport PIL.ImageCms\n"
    measured += f"before = peak_memory_bytes()\n{script}\nprint((peak_memory_bytes() - before) / 1e6)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run([sys.executable, "-c", measured], capture_output=True, text=True, env=environment, check=True)
    assert not ran.stderr, ran.stderr
    *lines, grown = ran.stdout.splitlines()
    return "\n".join(lines), float(grown)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photo of 200 megapixels."""
    folder = tmp_path_factory.mktemp("large")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        Image.new("L", (16320, 12240), 90).save(folder / "photo.jpg", quality=30)
    return folder


def test_a_photo_of_200_megapixels_is_read_within_bounds(photo: Path) -> None:
    script = (
        "import warnings; warnings.simplefilter('error')\n"
        "from pathlib import Path\nfrom cdvideo.media.images import read_picture\n"
        f"print(read_picture(Path({str(photo / 'photo.jpg')!r}), 1024).size)"
    )
    printed, grown = peak_of(script)
    assert printed == "(1365, 1024)" and grown < 120


def test_a_photo_of_200_megapixels_as_the_first_frame(photo: Path) -> None:
    frame = read_clip(photo / "photo.jpg", frames=1, size=(64, 48))
    assert frame.shape == (1, 48, 64, 3) and abs(int(frame[0, 20, 20, 0]) - 90) < 3


def png_of(width: int, height: int) -> bytes:
    """The beginning of a grey PNG: so much is read before its pixels are asked for."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1000))
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (header, data))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_what_is_too_large_is_told_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "huge.png").write_bytes(png_of(60_000, 60_000))
    with pytest.raises(UserError) as caught:
        read_pictures(tmp_path)
    assert "huge.png: can not be read (60000 x 60000 pixels, more than 178 million: make it smaller)" in str(
        caught.value
    )
    assert "attack" not in str(caught.value)
    with pytest.raises(UserError, match="60000 x 60000 pixels, more than 178 million"):
        read_clip(tmp_path / "huge.png")


def test_no_raw_warning_of_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (300, 200), RED).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)  # as 89 megapixels are to a picture of 108
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert only(tmp_path).size == (300, 200)
    assert Image.MAX_IMAGE_PIXELS == 40_000


def test_what_pillow_warns_of_is_said_in_a_line_with_the_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (64, 48), RED).save(tmp_path / "torn.tiff", description="a" * 400)
    content = (tmp_path / "torn.tiff").read_bytes()
    length = content.index(struct.pack("<HHI", 270, 2, 401)) + 4
    (tmp_path / "torn.tiff").write_bytes(content[:length] + struct.pack("<I", 1 << 20) + content[length + 4 :])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert close(only(tmp_path), RED) and close(Image.fromarray(read_clip(tmp_path / "torn.tiff")[0]), RED)
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("torn.tiff: ")]
    assert len(told) == 1 and "\n" not in told[0]


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_large_pictures_are_made_smaller_step_by_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Turned and in a wide colour space, as a camera's TIFF is; the bound is put down to where a test is fast."""
    from cdvideo.media import images

    image = stored(RED, ADOBE).resize((900, 600))
    image.paste((0, 0, 0), (0, 0, 450, 600))
    image = image.convert(mode) if mode != "P" else image.quantize(16)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.tiff", exif=exif, **({"icc_profile": ADOBE} if mode != "L" else {}))
    whole = only(tmp_path, short_side=100)
    monkeypatch.setattr(images, "_LARGE", 1000)
    reduced = only(tmp_path, short_side=100)
    assert reduced.size == whole.size == (100, 150)
    difference = np.abs(np.asarray(whole).astype(int) - np.asarray(reduced))
    assert difference.mean() < 2 and whole.getpixel((50, 20)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "I;16"])
def test_a_turned_tiff_of_every_mode(tmp_path: Path, mode: str) -> None:
    image = Image.new("L", (90, 60), 255)
    image.paste(0, (0, 0, 45, 60))  # black on the left; upright, above
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    image = image.convert("RGB").convert(mode) if mode == "CMYK" else image if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / "a.tiff", tiffinfo={0x0112: 6})
    read = only(tmp_path)
    assert read.size == (60, 90)
    assert read.getpixel((30, 10)) == (0, 0, 0) and read.getpixel((30, 80)) == (255, 255, 255)


# F31, F32, M7, and what else is no picture


def test_heic_by_any_name(tmp_path: Path) -> None:
    head = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    for name in ("a.jpg", "b.HEIC", "c.png"):
        (tmp_path / name).write_bytes(head)
    (tmp_path / "d.heic").write_bytes(bytes(100))
    with pytest.raises(UserError, match="4 of 4 pictures") as caught:
        read_pictures(tmp_path)
    assert str(caught.value).count("HEIC, which is not supported: save it as JPEG") == 4
    with pytest.raises(UserError, match="HEIC, which is not supported"):
        read_clip(tmp_path / "a.jpg")
    Image.new("RGB", (64, 48), RED).save(tmp_path / "e.jpg")
    (tmp_path / "e.jpg").rename(tmp_path / "d.heic")
    for name in ("a.jpg", "b.HEIC", "c.png"):
        (tmp_path / name).unlink()
    assert close(only(tmp_path), RED), "a JPEG of that name is read"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n", "PostScript"),
        (b"%PDF-1.7\n", "a PDF"),
        (b"8BPS\0\1", "a Photoshop file"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"\xff\x0a" + bytes(40), "JPEG XL"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42", "a film"),
        (b"", "an empty file"),
        (b"no picture", "no picture"),
    ],
)
def test_what_else_lies_under_a_pictures_name(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "dog.jpg").write_bytes(content)
    with pytest.raises(UserError, match=rf"dog\.jpg: can not be read \({told}"):
        read_pictures(tmp_path)


def test_no_picture_starts_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PostScript file, by its own name and by a photo's, beside a `gs` that would leave a mark."""
    programs, pictures = tmp_path / "bin", tmp_path / "pictures"
    for folder in (programs, pictures):
        folder.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (programs / "gs").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    for name in ("dog.jpg", "cat.eps", "mouse.ps"):
        (pictures / name).write_bytes(postscript)
        with pytest.raises(UserError):
            read_clip(pictures / name)
    with pytest.raises(UserError, match="1 of 1 pictures"):
        read_pictures(pictures)
    assert not (tmp_path / "started").exists()


def test_pillow_never_chooses_among_all_its_readers() -> None:
    package = Path(__file__).parents[2] / "cdvideo"
    calls = [
        line for file in package.rglob("*.py") for line in file.read_text("utf-8").splitlines() if "Image.open(" in line
    ]
    assert calls and all("formats=" in line for line in calls)


def test_pictures_in_subfolders_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """kohya's layout: the parent is given."""
    deeper = tmp_path / "img" / "10_sks dog"
    deeper.mkdir(parents=True)
    for index in range(4):
        Image.new("RGB", (64, 48), RED).save(deeper / f"{index}.png")
    with pytest.raises(
        UserError, match=r"no pictures in .* itself, but below it: img.10_sks dog \(4 pictures\)"
    ) as caught:
        read_pictures(tmp_path)
    assert caught.value.do == f'name the folder that holds them: --images "{deeper}"'
    assert len(read_pictures(deeper)) == 4 and not caplog.records
    for index in range(3):
        Image.new("RGB", (64, 48), RED).save(tmp_path / f"{index}.png")
    assert len(read_pictures(tmp_path)) == 3
    (record,) = caplog.records
    assert "passed over" in record.getMessage() and "10_sks dog (4 pictures)" in record.getMessage()


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_is_taken_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str
) -> None:
    first, second = (Image.new("RGB", (64, 48), colour) for colour in (RED, BLUE))
    first.save(
        tmp_path / f"a.{suffix}",
        save_all=True,
        append_images=[second],
        **({"lossless": True} if suffix == "webp" else {}),
    )
    assert close(only(tmp_path), RED)
    assert f"a.{suffix} holds several pictures: the first is taken" in caplog.text


def test_a_cameras_jpeg_of_two_pictures_is_one_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in "abc":
        large, small = Image.new("RGB", (64, 48), RED), Image.new("RGB", (64, 48), BLUE)
        large.save(tmp_path / f"{name}.jpg", format="MPO", save_all=True, append_images=[small])
    assert all(close(picture.image, RED) for picture in read_pictures(tmp_path)) and not caplog.records
    assert len(read_clip(tmp_path / "a.jpg")) == 1


def test_text_beyond_all_measure_in_a_png(tmp_path: Path) -> None:
    text = PngInfo()
    text.add_text("Comment", "a" * 80_000_000, zip=True)
    Image.new("RGB", (64, 48), RED).save(tmp_path / "a.png", pnginfo=text)
    with pytest.raises(UserError, match=r"a\.png: can not be read"):
        read_pictures(tmp_path)
