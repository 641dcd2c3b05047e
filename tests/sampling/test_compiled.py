"""The compiled UNet: the same films, in one graph, which the next film finds again."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from cdvideo.base.loader import Base
from cdvideo.concept.concept import Concept
from cdvideo.errors import UserError
from cdvideo.motion.modules import MotionModules
from cdvideo.motion.video_unet import VideoUNet
from cdvideo.sampling.compiled import compiled
from cdvideo.sampling.options import Control, FilmSettings, Windows
from cdvideo.sampling.speed import EXACT, Speed
from cdvideo.sampling.video import Film, sample_latents

COMPILED = replace(EXACT, compiled=True)
QUICK = FilmSettings(frames=2, steps=2, guidance=3.0)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are made as ever, and then run as they are: no minutes of a C++ compiler."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def latents(base: Base, motion: MotionModules, film: Film, settings: FilmSettings) -> Tensor:
    (found,) = sample_latents(base, motion, [film], settings)
    return found


FILMS: dict[str, tuple[int, Film, dict[str, Any]]] = {  # with the graphs that it takes
    "plain": (1, Film(prompt="a dog", seed=1), {}),
    "unguided": (1, Film(prompt="a dog", seed=1), {"guidance": 1.0}),
    "in windows": (1, Film(prompt="a dog", seed=1), {"frames": 4, "windows": Windows(size=3, overlap=1)}),
    "travelling": (1, Film(prompt={0: "a dog", 1: "a cat"}, seed=1), {}),
    "deep": (2, Film(prompt="a dog", seed=1), {"steps": 3, "speed": Speed(deep_every=2)}),
    "guided in part": (2, Film(prompt="a dog", seed=1), {"speed": Speed(guided_until=0.5)}),
}


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "plain" else pytest.mark.slow) for name in FILMS]
)
def test_every_kind_of_film_is_traced_whole(tiny_base: Base, tiny_motion: MotionModules, name: str) -> None:
    """Without a single break, which would be an error here."""
    graphs, film, options = FILMS[name]
    settings = replace(QUICK, **options)
    expected = latents(tiny_base, tiny_motion, film, settings)
    found = latents(tiny_base, tiny_motion, film, replace(settings, speed=replace(settings.speed, compiled=True)))
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    assert (found - expected).abs().max() <= 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_the_next_film_finds_the_graph(tiny_base: Base, tiny_motion: MotionModules, tiny_concept: Concept) -> None:
    settings = replace(QUICK, speed=COMPILED)
    for film in (Film(prompt="a dog", seed=1), Film(prompt="a sks dog surfing", seed=2, concept=tiny_concept)):
        found = latents(tiny_base, tiny_motion, film, settings)
        assert (found - latents(tiny_base, tiny_motion, film, QUICK)).abs().max() <= 1e-4
    assert counters["stats"]["unique_graphs"] == 1, "one for all steps of both films"
    latents(tiny_base, tiny_motion, Film(prompt="a dog", seed=1), replace(settings, frames=3))
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
def test_compiled_films_are_the_exact_ones(tiny_base: Base, tiny_motion: MotionModules, tiny_concept: Concept) -> None:
    torch._dynamo.reset()
    film = Film(prompt="a sks dog", seed=1, concept=tiny_concept)
    expected = latents(tiny_base, tiny_motion, film, QUICK)
    found = latents(tiny_base, tiny_motion, film, replace(QUICK, speed=COMPILED))
    difference = (found - expected).abs().max().item()
    print(f"max abs difference of latents {difference:.1e}")
    assert 0 < difference <= 1e-4


@pytest.mark.usefixtures("traced")
def test_a_hook_is_not_passed_by(tiny_base: Base, tiny_motion: MotionModules) -> None:
    """torch would take the graph that it made before there was one."""
    film, settings = Film(prompt="a dog", seed=1), replace(QUICK, speed=COMPILED)
    before = latents(tiny_base, tiny_motion, film, settings)
    module = tiny_motion.down_blocks[0].motion_modules[0]
    hook = module.register_forward_hook(lambda _module, inputs, _moved: inputs[0])
    hooked = latents(tiny_base, tiny_motion, film, settings)
    assert (hooked - latents(tiny_base, tiny_motion, film, QUICK)).abs().max() <= 1e-4
    hook.remove()
    assert (hooked - before).abs().max() > 1e-3


def test_what_comes_and_goes_within_a_film_is_refused(tiny_base: Base, tiny_motion: MotionModules) -> None:
    settings = replace(QUICK, speed=COMPILED)
    moving = Film(prompt="a dog", seed=1, control=Control(motion_strength="0: 0.5 | 1: 1"))
    with pytest.raises(UserError, match=r"motion strength with --compile[\s\S]*leave --compile out"):
        latents(tiny_base, tiny_motion, moving, settings)
    joint = MotionModules.for_unet(tiny_base.unet, motion_num_attention_heads=2, joint_image_norms=True).eval()
    with pytest.raises(UserError, match="AnimateDiff v1 with --compile"):
        latents(tiny_base, joint, Film(prompt="a dog", seed=1), settings)


@pytest.mark.parametrize(
    ("device", "steady", "mode"), [("cuda", True, "reduce-overhead"), ("cuda", False, None), ("cpu", True, None)]
)
def test_a_graph_of_the_gpu_is_made_for_a_model_that_still_rests_in_ram(
    tiny_base: Base,
    tiny_motion: MotionModules,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    steady: bool,
    mode: str | None,
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda _call, **options: asked.append(options["mode"]))
    compiled(VideoUNet(tiny_base.unet, tiny_motion), [], device=torch.device(device), steady=steady)
    assert asked == [mode]
