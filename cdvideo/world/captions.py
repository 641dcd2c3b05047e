"""Captions: what a scene says of itself, in many words, with parts left out."""

from __future__ import annotations

import numpy as np

from cdvideo.world.scenes import Scene

SUBJECT_WORDS: dict[str, tuple[str, ...]] = {
    "dog": ("puppy", "doggy", "hound"),
    "cat": ("kitty", "kitten"),
    "mouse": ("little mouse",),
    "rabbit": ("bunny", "bunny rabbit"),
    "pig": ("piglet", "piggy"),
    "bear": ("brown bear",),
    "panda": ("panda bear",),
    "koala": ("koala bear",),
    "tiger": ("big cat tiger",),
    "lion": ("big cat lion",),
    "polar bear": ("white bear",),
    "teddy bear": ("teddy", "plush bear"),
    "monkey": ("ape",),
    "frog": ("toad",),
    "cow": ("calf",),
    "robot": ("android",),
    "alien": ("martian",),
    "ghost": ("spirit",),
    "pumpkin": ("jack o lantern",),
}
THING_WORDS: dict[str, tuple[str, ...]] = {
    "sunglasses": ("dark glasses", "shades"),
    "glasses": ("spectacles", "reading glasses"),
    "headphones": ("big headphones", "a headset"),
    "top hat": ("tall black hat",),
    "crown": ("golden crown", "king's crown"),
    "cap": ("baseball cap",),
    "straw hat": ("sun hat", "summer hat"),
    "helmet": ("safety helmet",),
    "graduation cap": ("student hat", "graduation hat"),
    "bow": ("ribbon", "hair bow"),
    "santa hat": ("christmas hat",),
    "party hat": ("birthday hat",),
    "wizard hat": ("magic hat", "witch hat"),
    "medal": ("gold medal",),
    "bow tie": ("bowtie",),
    "cape": ("cloak",),
}
SETTING_WORDS: dict[str, tuple[str, ...]] = {
    "surfing": ("surfing", "surfing", "surfing on a wave", "riding a wave", "on a surfboard", "surfing in the sea"),
    "skateboarding": ("skateboarding", "skateboarding", "on a skateboard", "riding a skateboard"),
    "flying": ("flying", "flying", "flying in the sky", "flying through the clouds", "in the sky"),
    "skiing": ("skiing", "skiing", "on skis", "skiing down a slope", "skiing in the mountains"),
    "dancing": ("dancing", "dancing", "dancing at a disco", "at a party", "dancing on the dance floor"),
    "driving": ("driving a car", "driving", "in a car", "driving down the road"),
    "sailing": ("sailing", "sailing", "sailing a boat", "in a boat", "on a sailing boat"),
    "walking": ("walking", "walking in the park", "in the park", "going for a walk"),
    "snow": ("in the snow", "in the snow", "in winter", "in a snowy forest", "standing in the snow"),
    "rain": ("in the rain", "in the rain", "on a rainy day", "standing in the rain"),
    "space": ("in space", "in space", "in outer space", "floating in space", "among the stars"),
    "beach": ("on the beach", "on the beach", "at the beach", "at the seaside"),
    "forest": ("in the forest", "in the forest", "in the woods", "among the trees", "in the jungle"),
    "desert": ("in the desert", "in the desert", "among the cactuses", "on the sand dunes"),
    "city": ("in the city at night", "in the city", "in a city", "in front of a city at night"),
    "underwater": ("underwater", "underwater", "under the sea", "diving", "at the bottom of the sea"),
    "meadow": ("in a meadow", "in the garden", "in a flower field", "on the grass", "in a garden with flowers"),
    "plain": ("on a {} background", "on a plain {} background", "in front of a {} wall"),
}  # fmt: skip
OPENINGS = (
    "", "", "a photo of ", "a photo of ", "a picture of ", "a picture of ", "an illustration of ", "a drawing of ",
    "a good photo of ", "a nice picture of ", "a cute illustration of ", "a rendering of ", "the photo of ",
    "a photograph of ",
)  # fmt: skip
ADJECTIVES = ("cute", "happy", "funny", "small", "nice", "lovely", "cool", "little", "smiling", "sweet")
BARE_THINGS = ("headphones", "sunglasses", "glasses")  # no article


def article(words: str) -> str:
    """The words with their indefinite article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[rng.integers(len(words))]


def _subject(scene: Scene, rng: np.random.Generator) -> str:
    name = (
        _pick(rng, SUBJECT_WORDS[scene.subject])
        if scene.subject in SUBJECT_WORDS and rng.random() < 0.15
        else scene.subject
    )
    fur = scene.individual.fur
    before = []
    if scene.size < 0.74 and rng.random() < 0.6:
        before.append("very small")
    elif rng.random() < 0.15:
        before.append(_pick(rng, ADJECTIVES))
    if fur and rng.random() < 0.5:
        before.append("gray" if fur == "grey" and rng.random() < 0.3 else fur)
    words = " ".join([*before, name])
    return f"the {words}" if rng.random() < 0.05 else article(words)


def _thing(scene: Scene, rng: np.random.Generator) -> str:
    name = scene.thing
    if rng.random() < 0.18 and name in THING_WORDS:
        name = _pick(rng, THING_WORDS[name])
    if scene.thing_colour and rng.random() < 0.4:
        bare = name.removeprefix("a ")
        name = f"{scene.thing_colour} {bare}"
        return name if scene.thing in BARE_THINGS and name != f"{scene.thing_colour} headset" else article(name)
    return name if scene.thing in BARE_THINGS else article(name)


def _setting(scene: Scene, rng: np.random.Generator) -> str:
    return _pick(rng, SETTING_WORDS[scene.setting]).format(scene.backdrop_colour)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One caption: opening, subject, thing worn and setting, each worded at random, the last two now and then left out.

    The words `far away` and `close up` go with small and large figures, as Custom Diffusion's augmentation uses them.
    """
    subject = _subject(scene, rng)
    opening = _pick(rng, OPENINGS)
    if scene.size > 1.2 and rng.random() < 0.5:
        opening = _pick(rng, ("a close up of ", "a close up photo of ", "close up of "))
    wears = ""
    if scene.thing and rng.random() < 0.94:
        wears = f"{_pick(rng, ('wearing', 'wearing', 'wearing', 'with', 'in'))} {_thing(scene, rng)}"
    where = _setting(scene, rng) if rng.random() < 0.94 else ""
    if scene.size < 0.74 and rng.random() < 0.4:
        where = f"{where} far away".strip()
    parts = [subject, wears, where] if rng.random() < 0.85 else [subject, where, wears]
    if where and rng.random() < 0.05:
        return f"{opening}{where}, {subject} {wears}".strip().replace("  ", " ")
    return (opening + " ".join(p for p in parts if p)).strip()


def plain_caption(subject: str, thing: str, setting: str, *, colour: str = "blue") -> str:
    """The plainest wording of a triple, for measuring: `a dog wearing headphones surfing`."""
    worn = f" wearing {thing if thing in BARE_THINGS else article(thing)}" if thing else ""
    return f"{article(subject)}{worn} {SETTING_WORDS[setting][0].format(colour)}"
