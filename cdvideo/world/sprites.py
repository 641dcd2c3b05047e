"""The world's pictures: which ones, where they come from, and loading them.

They are fetched once, when a base is built, through the npm and Debian clients, in releases that are fixed, and cut to
small PNG files in a folder.
Two artists drew them: `fluent` (Fluent Emoji, MIT) and `noto` (Noto Color Emoji, OFL-1.1). See NOTICE.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cdvideo.errors import UserError
from cdvideo.world.palette import dominant_colour, fur_mask

ARTISTS = ("fluent", "noto")


@dataclass(frozen=True)
class Package:
    """A release of somebody's work, whose bytes are known: another one would draw another world."""

    name: str
    version: str
    sha256: str


FLUENT_PACKAGE = Package(
    "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
)
WORDS_PACKAGE = Package("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
NOTO_PACKAGE = Package(
    "fonts-noto-color-emoji",
    "2.042-0+deb12u1",
    "a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
)
LONGEST_SIDE = 128  # pixels of a stored sprite; a head is drawn at about 110, then halved


@dataclass(frozen=True)
class Anchors:
    """Where things go on a face, as fractions of the sprite's opaque box.

    top: where a hat's brim sits. eyes: height of the eyes. spread: half the distance between the eyes, of the width.
    side: half the width of the skull at the ears. chin: lower end of the face (1 where the sprite is a face alone).
    """

    top: float
    eyes: float
    spread: float
    side: float = 0.42
    chin: float = 1.0


@dataclass(frozen=True)
class Drawing:
    """One artist's picture of a subject. `figure`: it has a body of its own; a face alone gets one drawn."""

    code: str
    fluent: Anchors | None
    noto: Anchors | None
    figure: bool = False


A = Anchors
# fmt: off
SUBJECT_DRAWINGS: dict[str, Drawing] = {
    "dog": Drawing("1f436", A(.06, .36, .10, .38), A(.05, .50, .16, .36)),
    "cat": Drawing("1f431", A(.20, .45, .17, .44), A(.18, .54, .20, .40)),
    "mouse": Drawing("1f42d", A(.22, .54, .12, .30), A(.14, .60, .13, .30)),
    "hamster": Drawing("1f439", A(.14, .52, .14, .42), A(.12, .55, .20, .42)),
    "rabbit": Drawing("1f430", A(.42, .64, .12, .46), A(.46, .58, .17, .40)),
    "fox": Drawing("1f98a", A(.28, .58, .16, .40), A(.30, .57, .12, .38)),
    "bear": Drawing("1f43b", A(.10, .45, .13, .46), A(.10, .47, .14, .44)),
    "panda": Drawing("1f43c", A(.10, .45, .17, .46), A(.07, .47, .20, .44)),
    "koala": Drawing("1f428", A(.07, .53, .25, .38), A(.05, .42, .16, .36)),
    "tiger": Drawing("1f42f", A(.10, .48, .12, .46), A(.06, .42, .20, .44)),
    "lion": Drawing("1f981", A(.08, .50, .12, .46), A(.10, .38, .12, .40)),
    "cow": Drawing("1f42e", A(.08, .33, .17, .32), A(.12, .40, .20, .36)),
    "pig": Drawing("1f437", A(.08, .43, .18, .46), A(.10, .50, .20, .46)),
    "frog": Drawing("1f438", A(.10, .18, .25, .46), A(.10, .22, .26, .44)),
    "monkey": Drawing("1f435", A(.04, .45, .10, .38), A(.05, .42, .12, .36)),
    "wolf": Drawing("1f43a", A(.25, .48, .13, .42), A(.22, .46, .12, .38)),
    "raccoon": Drawing("1f99d", A(.10, .55, .18, .46), A(.10, .52, .14, .44)),
    "polar bear": Drawing("1f43b-200d-2744-fe0f", A(.10, .45, .13, .46), A(.05, .30, .15, .42)),
    "robot": Drawing("1f916", A(.08, .43, .18, .42), A(.27, .52, .20, .40)),
    "alien": Drawing("1f47d", A(.03, .42, .22, .46), A(.03, .42, .25, .46)),
    "pumpkin": Drawing("1f383", A(.12, .35, .22, .48), A(.16, .50, .20, .48)),
    "clown": Drawing("1f921", A(.06, .40, .18, .44), A(.05, .37, .18, .42)),
    "penguin": Drawing("1f427", A(.02, .20, .09, .26, .42), None, figure=True),
    "owl": Drawing("1f989", A(.05, .25, .24, .44, .50), A(.07, .25, .15, .38, .44), figure=True),
    "ghost": Drawing("1f47b", A(.02, .24, .17, .36, .62), A(.02, .22, .13, .30, .62), figure=True),
    "teddy bear": Drawing("1f9f8", A(.03, .22, .09, .24, .44), A(.04, .20, .12, .26, .42), figure=True),
}
THING_CODES = {
    "top hat": "1f3a9", "crown": "1f451", "cap": "1f9e2", "straw hat": "1f452", "helmet": "26d1-fe0f",
    "graduation cap": "1f393", "bow": "1f380", "sunglasses": "1f576-fe0f", "glasses": "1f453", "medal": "1f3c5",
}
SCENERY_CODES = {
    "pine": "1f332", "tree": "1f333", "palm": "1f334", "cactus": "1f335", "mountain": "26f0-fe0f",
    "parasol": "1f3d6-fe0f", "moon": "1f315", "crescent": "1f319",
    "saturn": "1fa90", "earth": "1f30d", "star": "2b50", "cloud": "2601-fe0f",
    "wave": "1f30a", "fish": "1f41f", "tropical fish": "1f420", "daisy": "1f33c", "tulip": "1f337",
    "mushroom": "1f344", "building": "1f3e2", "house": "1f3e0",
    "coral": "1fab8", "disco ball": "1faa9", "balloon": "1f388", "sun": "2600-fe0f",
    "rainbow": "1f308", "castle": "1f3f0",
}
# fmt: on

SUBJECTS = tuple(SUBJECT_DRAWINGS)
RECOLOURED_THINGS = ("cap", "bow", "helmet")


@dataclass(frozen=True)
class Sprites:
    """RGBA uint8 pictures by (name, artist); for those that can be recoloured, the main colour (3 numbers in [0, 1])
    and where it lies ((H, W) in [0, 1]); `words` are everyday English words for the tokenizer."""

    pictures: dict[tuple[str, str], NDArray[np.uint8]] = field(repr=False)
    furs: dict[tuple[str, str], tuple[NDArray[np.float32], NDArray[np.float32]]] = field(repr=False)
    words: tuple[str, ...] = field(default=(), repr=False)

    def get(self, name: str, artist: str) -> NDArray[np.uint8]:
        """The artist's picture of `name`, or the other artist's where this one drew none."""
        for who in (artist, *ARTISTS):
            if (name, who) in self.pictures:
                return self.pictures[name, who]
        raise KeyError(name)

    def artists(self, name: str) -> tuple[str, ...]:
        """Who drew `name`."""
        return tuple(who for who in ARTISTS if (name, who) in self.pictures)


def load_sprites(folder: Path) -> Sprites:
    """Reads what `fetch_sprites` wrote. Raises UserError where the folder holds no sprites."""
    files = sorted(folder.glob("*/*.png"))
    if not files:
        raise UserError(
            f"no sprites in {folder}",
            allowed="a folder written by fetch_sprites, holding fluent/*.png and noto/*.png",
            do="python scripts/make_base.py --stage sprites",
        )
    pictures = {(f.stem, f.parent.name): np.array(Image.open(f, formats=["PNG"]).convert("RGBA")) for f in files}
    furs = {}
    for (name, artist), picture in pictures.items():
        if name in SUBJECT_DRAWINGS or name in RECOLOURED_THINGS:
            fur = dominant_colour(picture)
            furs[name, artist] = fur, fur_mask(picture, fur)
    words = folder / "words.json"
    return Sprites(pictures, furs, tuple(json.loads(words.read_text())) if words.exists() else ())


def fetch_sprites(folder: Path) -> None:
    """Downloads both artists' pictures and a list of English words by npm and apt; cuts the pictures to PNG files."""
    codes = {name: d.code for name, d in SUBJECT_DRAWINGS.items()} | THING_CODES | SCENERY_CODES
    for artist in ARTISTS:
        (folder / artist).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        _write_fluent(work, folder / "fluent", codes)
        _write_noto(work, folder / "noto", codes)
        _write_words(work, folder / "words.json")


def _trim(picture: Image.Image) -> Image.Image:
    """Cut to the opaque box and brought to LONGEST_SIDE."""
    box = picture.getchannel("A").point(lambda a: 255 * (a > 40)).getbbox()
    picture = picture.crop(box)
    scale = LONGEST_SIDE / max(picture.size)
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)


def check_package(file: Path, package: Package) -> Path:
    """The file of a package, if it is the one that is meant. Raises UserError for other bytes."""
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != package.sha256:
        raise UserError(
            f"{package.name} {package.version} has other bytes than the world was drawn with (SHA-256 {found})",
            allowed=f"the release whose SHA-256 is {package.sha256}",
            do="get that release from an archive, or write the new hash into cdvideo/world/sprites.py: another world",
        )
    return file


def _fetch(command: Sequence[str], package: Package, work: Path) -> str:
    """What the client prints. Raises UserError where there is no such client, or it has no such release."""
    try:
        return subprocess.run(command, cwd=work, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        told = (getattr(error, "stderr", "") or str(error)).strip()
        raise UserError(
            f"{package.name} {package.version} can not be fetched ({told.splitlines()[-1]})",
            allowed=f"a machine with {command[0]}, whose sources have that release",
            do="run it where they do, or copy the folder of sprites from a machine that has it",
        ) from error


def _npm_pack(package: Package, work: Path) -> tarfile.TarFile:
    listing = _fetch(["npm", "pack", "--json", f"{package.name}@{package.version}"], package, work)
    return tarfile.open(check_package(work / json.loads(listing)[0]["filename"], package))


def _read_member(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    assert member is not None, name
    return member.read()


def _write_fluent(work: Path, folder: Path, codes: dict[str, str]) -> None:
    with _npm_pack(FLUENT_PACKAGE, work) as archive:
        for name, code in codes.items():
            data = _read_member(archive, f"package/assets/{code}.webp")
            _trim(Image.open(io.BytesIO(data), formats=["WEBP"]).convert("RGBA")).save(folder / f"{name}.png")


def _write_noto(work: Path, folder: Path, codes: dict[str, str]) -> None:
    _fetch(["apt-get", "download", f"{NOTO_PACKAGE.name}={NOTO_PACKAGE.version}"], NOTO_PACKAGE, work)
    file = check_package(next(work.glob("*.deb")), NOTO_PACKAGE)
    subprocess.run(["dpkg", "-x", file, "noto"], cwd=work, check=True)
    font = ImageFont.truetype(next(work.glob("noto/**/NotoColorEmoji.ttf")), 109)  # the font's only bitmap size
    for name, code in codes.items():
        if name in SUBJECT_DRAWINGS and SUBJECT_DRAWINGS[name].noto is None:
            continue
        picture = Image.new("RGBA", (170, 170))
        text = "".join(chr(int(c, 16)) for c in code.split("-"))
        ImageDraw.Draw(picture).text((15, 15), text, font=font, embedded_color=True)
        _trim(picture).save(folder / f"{name}.png")


def _write_words(work: Path, file: Path) -> None:
    with _npm_pack(WORDS_PACKAGE, work) as archive:
        entries = json.loads(_read_member(archive, "package/en/data.json"))
    words = {word for e in entries for tag in (e["label"], *e.get("tags", ())) for word in tag.lower().split()}
    file.write_text(json.dumps(sorted(w for w in words if w.isascii() and w.isalpha() and len(w) > 2)))
