"""Rendering, on sprites drawn here: the artists' pictures are fetched when a base is built, and are not kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cdvideo.errors import UserError
from cdvideo.world.figures import HATS, THINGS
from cdvideo.world.heldout import HELDOUT_INDIVIDUALS, SETTINGS
from cdvideo.world.individuals import Individual, paint_face, sample_individual
from cdvideo.world.motions import move
from cdvideo.world.palette import COLOURS, dominant_colour, fur_mask, mix, shade
from cdvideo.world.samples import SAMPLE_SETTINGS, write_samples
from cdvideo.world.scenes import compose, render_clip, render_frame, render_scene, sample_scene
from cdvideo.world.sprites import ARTISTS, SCENERY_CODES, SUBJECT_DRAWINGS, SUBJECTS, THING_CODES, Sprites, load_sprites


@pytest.fixture(scope="module")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> Sprites:
    folder = tmp_path_factory.mktemp("sprites")
    for a, artist in enumerate(ARTISTS):
        (folder / artist).mkdir()
        for i, name in enumerate([*SUBJECT_DRAWINGS, *THING_CODES, *SCENERY_CODES]):
            if name in SUBJECT_DRAWINGS and getattr(SUBJECT_DRAWINGS[name], artist) is None:
                continue
            picture = Image.new("RGBA", (60, 64))
            pen = ImageDraw.Draw(picture)
            pen.ellipse(
                [1, 1, 58, 62], fill=(90 + (i * 37 + a * 50) % 150, 80 + (i * 61) % 160, 60 + (i * 17) % 180, 255)
            )
            pen.ellipse([18, 24, 24, 32], fill=(20, 20, 20, 255))
            pen.ellipse([36, 24, 42, 32], fill=(20, 20, 20, 255))
            picture.save(folder / artist / f"{name}.png")
    return load_sprites(folder)


def test_every_setting_and_every_thing_renders(sprites: Sprites) -> None:
    rng = np.random.default_rng(0)
    for i in range(max(len(SETTINGS), len(THINGS))):
        subject = SUBJECTS[i % len(SUBJECTS)]
        individual = sample_individual(rng, subject, sprites.artists(subject))
        scene = compose(rng, individual, thing=THINGS[i % len(THINGS)], setting=SETTINGS[i % len(SETTINGS)])
        pixels, mask = render_scene(scene, sprites)
        assert pixels.shape == (128, 128, 3) and pixels.dtype == np.uint8
        assert mask.shape == (128, 128) and 0.03 < (mask > 127).mean() < 0.9


def test_the_same_scene_gives_the_same_pixels(sprites: Sprites) -> None:
    a, b = (sample_scene(np.random.default_rng(5)) for _ in range(2))
    assert a == b
    assert np.array_equal(render_scene(a, sprites)[0], render_scene(b, sprites)[0])


def test_a_still_is_the_first_frame_of_its_clip_and_clips_move(sprites: Sprites) -> None:
    rng = np.random.default_rng(1)
    for setting in SETTINGS:
        scene = compose(rng, sample_individual(rng, "dog", ("fluent",)), thing="", setting=setting)
        clip = render_clip(scene, sprites, num_frames=4)
        assert np.array_equal(clip[0], render_scene(scene, sprites)[0])
        change = np.abs(np.diff(clip.astype(int), axis=0)).mean(axis=(1, 2, 3))
        assert (change > 0.05).all(), setting
        assert (change < 45).all(), setting  # smooth: no cut between neighbours


@pytest.mark.parametrize("thing", THINGS)
def test_a_thing_changes_the_figure(sprites: Sprites, thing: str) -> None:
    bare = compose(np.random.default_rng(2), Individual("bear", "noto"), thing="", setting="plain")
    worn = compose(np.random.default_rng(2), Individual("bear", "noto"), thing=thing, setting="plain")
    difference = np.abs(render_scene(bare, sprites)[0].astype(int) - render_scene(worn, sprites)[0]).sum(axis=-1)
    assert (difference > 30).sum() > 60


def test_recolouring_changes_the_fur_and_keeps_the_eyes(sprites: Sprites) -> None:
    plain = np.array(paint_face(Individual("cat", "fluent"), sprites)[0])
    blue = np.array(paint_face(Individual("cat", "fluent", fur="blue", fur_rgb=COLOURS["blue"]), sprites)[0])
    height, width = plain.shape[:2]
    forehead, eye = (round(height * 0.2), width // 2), (round(height * 0.44), round(width * 0.35))
    assert blue[forehead][2] > blue[forehead][0] + 40
    assert np.abs(blue[eye].astype(int) - plain[eye]).max() < 12


def test_doings_move_in_ways_of_their_own() -> None:
    times = np.linspace(0, 12, 40)
    paths = {s: np.array([[*move(s, t).offset, move(s, t).angle] for t in times]) for s in SETTINGS}
    names = ("surfing", "skateboarding", "flying", "skiing", "dancing", "walking")
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert np.abs(paths[a] - paths[b]).max() > 4, (a, b)


def test_the_sample_concept_is_one_individual_in_five_places(sprites: Sprites, tmp_path: Path) -> None:
    write_samples("dog", tmp_path, sprites)
    files = sorted(tmp_path.glob("*.png"))
    assert len(files) == len(SAMPLE_SETTINGS) == 5
    assert all(Image.open(f).size == (128, 128) for f in files)


def test_every_heldout_individual_can_be_drawn(sprites: Sprites) -> None:
    for h in HELDOUT_INDIVIDUALS.values():
        assert getattr(SUBJECT_DRAWINGS[h.subject], h.artist) is not None
        assert {h.fur, h.marking_colour} <= set(COLOURS)


def test_the_mask_covers_the_figure_and_not_the_corner(sprites: Sprites) -> None:
    scene = compose(np.random.default_rng(3), Individual("pig", "noto"), thing="crown", setting="plain")
    _, mask = render_frame(scene, sprites, 0.0)
    assert mask[0, 0] == 0 and mask.max() == 255


def test_missing_sprites_are_told_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make_base.py"):
        load_sprites(tmp_path)


def test_dominant_colour_and_mask_find_the_larger_area() -> None:
    picture = np.zeros((10, 10, 4), dtype=np.uint8)
    picture[..., 3] = 255
    picture[:7, :, :3] = (200, 120, 60)
    picture[7:, :, :3] = (60, 200, 220)
    fur = dominant_colour(picture)
    assert np.allclose(fur * 255, (200, 120, 60), atol=1)
    mask = fur_mask(picture, fur)
    assert mask[:7].min() > 0.9 and mask[7:].max() < 0.1


def test_shades_stay_near_their_colour() -> None:
    rng = np.random.default_rng(4)
    assert mix((0, 0, 0), (100, 200, 50), 0.5) == (50, 100, 25)
    for name, rgb in COLOURS.items():
        shades = np.array([shade(rng, name) for _ in range(50)])
        assert np.abs(shades - np.array(rgb)).max() < 60, name


def test_hats_are_things() -> None:
    assert set(HATS) <= set(THINGS)
