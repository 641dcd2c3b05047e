"""Each switch of the sampler against the plain walk; and what the approximate ones may leave out."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.concept.concept import Concept
from cdvideo.motion.modules import MotionModules
from cdvideo.motion.video_unet import DeepFeature, VideoUNet
from cdvideo.sampling import prepared as prepared_blocks
from cdvideo.sampling.forecast import forecasting
from cdvideo.sampling.options import Control, FilmSettings, Windows
from cdvideo.sampling.prepared import TimeTable, prepared
from cdvideo.sampling.prompt_kv import read_text, reading
from cdvideo.sampling.speed import EXACT, PLAIN, PRESETS, Speed
from cdvideo.sampling.video import Film, sample_latents, sample_video

EXACT_SWITCHES = [field.name for field in fields(Speed) if field.default is True]
BLOCKS = [name for name in EXACT_SWITCHES if name not in ("time_table", "shared_prefix", "halves")]
STABLE_DIFFUSION_LIKE: dict[str, Any] = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": 2,
}


def make_models(norm_mode: Any = "diffusers", **shape: Any) -> tuple[UNet2DConditionModel, MotionModules]:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=8,
        **{**STABLE_DIFFUSION_LIKE, **shape},
    )
    motion = MotionModules.for_unet(unet, motion_num_attention_heads=2, norm_mode=norm_mode)
    for parameter in motion.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return unet.eval().requires_grad_(False), motion.eval().requires_grad_(False)


def inputs(films: int = 2, frames: int = 3, size: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents_BFCHW = torch.randn(films, frames, 4, *size, generator=generator)
    return latents_BFCHW, torch.randn(films, 5, 24, generator=generator)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def speed_of(*names: str) -> Speed:
    return replace(PLAIN, **dict.fromkeys(names, True))


@pytest.mark.parametrize("shape", [{}, {"use_linear_projection": True}], ids=["conv", "linear"])
@pytest.mark.parametrize("norm_mode", ["diffusers", "original"])
@pytest.mark.parametrize("names", [(name,) for name in BLOCKS] + [tuple(BLOCKS)], ids="+".join)
@torch.no_grad()
def test_prepared_blocks_are_the_plain_ones(names: tuple[str, ...], norm_mode: Any, shape: dict[str, Any]) -> None:
    unet, motion = make_models(norm_mode, **shape)
    latents_BFCHW, text_BLD = inputs()
    video_unet = VideoUNet(unet, motion)
    with reading(unet, read_text(unet, text_BLD)):
        expected = video_unet(latents_BFCHW, 321, None)
        with prepared(unet, motion, speed_of(*names)):
            replaced = [module for module in [*unet.modules(), *motion.modules()] if "forward" in vars(module)]
            found = video_unet(latents_BFCHW, 321, None)
    assert replaced, "nothing was prepared"
    print(f"{len(replaced)} modules, relative difference {relative(found, expected):.1e}")
    assert relative(found, expected) <= 5e-6
    assert not [module for module in [*unet.modules(), *motion.modules()] if "forward" in vars(module)]


@pytest.mark.parametrize("size", [(7, 10), (16, 20)], ids=["odd", "long attention"])
@torch.no_grad()
def test_other_sizes(size: tuple[int, int]) -> None:
    """Odd sizes make the upsampler keep its own way; with many pixels attention takes torch's fused kernel."""
    unet, motion = make_models()
    latents_BFCHW, text_BLD = inputs(size=size)
    with reading(unet, read_text(unet, text_BLD)):
        expected = VideoUNet(unet, motion)(latents_BFCHW, 5, None)
        with prepared(unet, motion, EXACT):
            found = VideoUNet(unet, motion)(latents_BFCHW, 5, None)
    assert relative(found, expected) <= 5e-6


@pytest.mark.parametrize(("tokens", "joined"), [(5, True), (40, False)], ids=["short", "long"])
@torch.no_grad()
def test_short_texts_join_the_layers_around_them(tokens: int, joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    unet, motion = make_models(block_out_channels=(16, 16, 16))
    latents_BFCHW, _ = inputs(size=(16, 16))
    text_BLD = torch.randn(2, tokens, 24, generator=torch.Generator().manual_seed(2))
    calls = []
    read = prepared_blocks._read_short_text
    monkeypatch.setattr(prepared_blocks, "_read_short_text", lambda *a, **k: calls.append(a) or read(*a, **k))
    video_unet = VideoUNet(unet, motion)
    with reading(unet, read_text(unet, text_BLD)):
        expected = video_unet(latents_BFCHW, 321, None)
        with prepared(unet, motion, speed_of("attentions")):
            found = video_unet(latents_BFCHW, 321, None)
    assert bool(calls) == joined
    assert relative(found, expected) < 1e-5


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_the_plain_walk() -> None:
    unet, motion = make_models()
    latents_BFCHW, text_BLD = inputs()

    def predict(speed: Speed) -> Tensor:
        text = text_BLD.to(unet.dtype)
        with reading(unet, read_text(unet, text)), prepared(unet, motion, speed):
            return VideoUNet(unet, motion)(latents_BFCHW.to(unet.dtype), 321, None).float()

    exact = predict(PLAIN)
    torch.nn.Module.to(unet, torch.bfloat16), motion.to(torch.bfloat16)
    plain, fast = relative(predict(PLAIN), exact), relative(predict(EXACT), exact)
    print(f"distance to float32: plain {plain:.1e}, prepared {fast:.1e}")
    assert 0 < fast <= 1.5 * plain


@torch.no_grad()
def test_norms_over_whole_films() -> None:
    """AnimateDiff v1's joint norms are hooks within the resnets, which therefore keep their own way."""
    unet, _ = make_models()
    motion = MotionModules.for_unet(unet, motion_num_attention_heads=2, joint_image_norms=True).eval()
    latents_BFCHW, text_BLD = inputs()
    with reading(unet, read_text(unet, text_BLD)):
        expected = VideoUNet(unet, motion)(latents_BFCHW, 5, None)
        with prepared(unet, motion, EXACT):
            assert relative(VideoUNet(unet, motion)(latents_BFCHW, 5, None), expected) <= 5e-6


@torch.no_grad()
def test_hooks_still_act_and_all_is_as_before_after_a_failure() -> None:
    unet, motion = make_models()
    module = motion.down_blocks[0].motion_modules[0]
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt), prepared(unet, motion, EXACT):
        handle = module.register_forward_hook(lambda *_: seen.append(1))
        module(torch.randn(2, 16, 4, 4), 2)
        handle.remove()
        raise KeyboardInterrupt
    assert seen == [1]
    assert not [each for each in [*unet.modules(), *motion.modules()] if "forward" in vars(each)]


@torch.no_grad()
def test_time_table() -> None:
    unet, motion = make_models()
    latents_BFCHW, text_BLD = inputs()
    timesteps = [900, 321, 7]
    table = TimeTable(unet, torch.tensor(timesteps))
    with reading(unet, read_text(unet, text_BLD)):
        for table.step, timestep in enumerate(timesteps):
            expected = VideoUNet(unet, motion)(latents_BFCHW, timestep, None)
            with prepared(unet, motion, speed_of("resnets"), table=table):
                assert relative(VideoUNet(unet, motion)(latents_BFCHW, timestep, None), expected) <= 5e-6
                other = VideoUNet(unet, motion)(latents_BFCHW, 500, None)
                assert relative(other, expected) <= 5e-6, "the table's step counts"


@pytest.mark.parametrize("first", ["CrossAttnDownBlock2D", "DownBlock2D"])
@torch.no_grad()
def test_shared_prefix(first: str) -> None:
    unet, motion = make_models(down_block_types=(first, "CrossAttnDownBlock2D", "DownBlock2D"))
    latents_BFCHW, _ = inputs()
    _, text_BLD = inputs(films=4)
    sizes: list[int] = []
    unet.conv_in.register_forward_hook(lambda _module, args, _out: sizes.append(len(args[0])))
    with reading(unet, read_text(unet, text_BLD)):
        expected = VideoUNet(unet, motion)(torch.cat([latents_BFCHW, latents_BFCHW]), 5, None)
        found = VideoUNet(unet, motion)(latents_BFCHW, 5, None, copies=2)
    assert sizes == [12, 6]
    assert relative(found, expected) <= 5e-6


@pytest.mark.parametrize("layers", [1, 2, 5, 99])
@torch.no_grad()
def test_deep_feature_of_the_same_latents_changes_nothing(layers: int) -> None:
    unet, motion = make_models()
    latents_BFCHW, text_BLD = inputs()
    video_unet, deep = VideoUNet(unet, motion), DeepFeature(layers)
    with reading(unet, read_text(unet, text_BLD)):
        expected = video_unet(latents_BFCHW, 5, None)
        assert torch.equal(video_unet(latents_BFCHW, 5, None, deep=deep), expected)
        counted: list[int] = []
        handle = unet.mid_block.resnets[0].register_forward_hook(lambda *_: counted.append(1))
        assert torch.equal(video_unet(latents_BFCHW, 5, None, deep=deep), expected)
        handle.remove()
        assert counted == []
        moved = video_unet(latents_BFCHW + 1, 5, None, deep=deep)
        assert not torch.allclose(moved, expected), "the outer layers see the latents"


def film(base: Base, motion: MotionModules, speed: Speed, **options: Any) -> np.ndarray:
    settings: dict[str, Any] = {"seed": 1, "frames": 3, "steps": 6, "guidance": 3.0, **options}
    return sample_video(base, motion, "a sks dog surfing", speed=speed, **settings)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++"])
@pytest.mark.parametrize("name", EXACT_SWITCHES)
def test_every_exact_switch_leaves_the_film(
    tiny_base: Base, tiny_motion: MotionModules, tiny_concept: Concept, name: str, scheduler: Any
) -> None:
    options: dict[str, Any] = {"concept": tiny_concept, "scheduler": scheduler, "steps": 3}
    plain = film(tiny_base, tiny_motion, PLAIN, **options)
    alone = speed_of(name, "shared_prefix") if name == "halves" else speed_of(name)
    for speed in (alone, replace(EXACT, **{name: False})):
        assert np.abs(film(tiny_base, tiny_motion, speed, **options).astype(int) - plain).max() <= 1


APPROXIMATE = {
    "deep": Speed(deep_every=2),
    "deep layers": Speed(deep_every=2, deep_layers=2),
    "forecast": PRESETS["fast"],
    "guided": Speed(guided_until=0.5),
    "all": replace(PRESETS["fast"], deep_every=3),
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximate_films_are_near_and_repeatable(tiny_base: Base, tiny_motion: MotionModules, name: str) -> None:
    exact = film(tiny_base, tiny_motion, EXACT)
    near = film(tiny_base, tiny_motion, APPROXIMATE[name])
    assert np.array_equal(near, film(tiny_base, tiny_motion, APPROXIMATE[name]))
    assert 0 < np.abs(near.astype(int) - exact).mean() < 20


def test_without_guidance_in_any_step_it_is_guidance_one(tiny_base: Base, tiny_motion: MotionModules) -> None:
    never = film(tiny_base, tiny_motion, Speed(guided_until=0))
    assert np.abs(never.astype(int) - film(tiny_base, tiny_motion, EXACT, guidance=1.0)).max() <= 1


def test_computed_steps() -> None:
    assert EXACT.computed_steps(5) == [0, 1, 2, 3, 4]
    assert Speed(asked=(0, 0.04, 0.08, 0.16, 0.24, 0.36, 0.56, 0.84)).computed_steps(25) == [0, 1, 2, 4, 6, 9, 14, 21]
    assert Speed(asked=(0, 0.1, 0.2, 0.9)).computed_steps(4) == [0, 1, 3]
    for speed in PRESETS.values():
        assert all(speed.computed_steps(steps)[-1] < steps for steps in range(1, 60))


def test_forecasts_go_on_along_the_latents_and_damp_the_rest() -> None:
    """Two films of two numbers: what is along the latents grows by 2 and by 1 in each step, what is across by 4."""
    latents_BN = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    slope_BN = torch.tensor([[2.0, 4.0], [4.0, 1.0]])

    def predict(_latents: Tensor, _timestep: Tensor, step: int) -> Tensor:
        return slope_BN * step

    model = forecasting(predict, Speed(asked=(0, 0.125, 0.5)), steps=8)
    for _film in range(2):
        found = [model(latents_BN, latents_BN, step) for step in range(8)]
        for step, answer_BN in enumerate(found):
            last = max(asked for asked in (0, 1, 4) if asked <= step)
            damped = 4 * (last + sum(0.25**ahead for ahead in range(1, step - last + 1)))
            torch.testing.assert_close(answer_BN, torch.tensor([[2.0 * step, damped], [damped, 1.0 * step]]))
    late = [model(latents_BN, latents_BN, step) for step in range(2, 8)]
    assert torch.equal(torch.stack(late[:3]), slope_BN * torch.tensor([2, 3, 4])[:, None, None]), (
        "the first two are asked"
    )


def test_what_is_left_out(tiny_base: Base, tiny_motion: MotionModules) -> None:
    """Rows that the last convolution and the middle see at each of six steps, of two frames."""
    unet = tiny_base.unet
    outer: list[int] = []
    inner: list[int] = []
    unet.conv_out.register_forward_hook(lambda _module, args, _out: outer.append(len(args[0])))
    unet.mid_block.resnets[0].register_forward_hook(lambda _module, args, _out: inner.append(len(args[0])))
    film(tiny_base, tiny_motion, Speed(deep_every=2, guided_until=0.7), frames=2)
    assert (outer, inner) == ([4, 4, 4, 4, 4, 2], [4, 4, 4, 2])  # the last step is the first without guidance
    outer.clear()
    film(tiny_base, tiny_motion, PRESETS["fast"], frames=2)
    assert sum(outer) == 4 * len(PRESETS["fast"].computed_steps(6)) == 20


def test_concepts_in_one_batch_are_each_as_alone(
    tiny_base: Base, tiny_motion: MotionModules, tiny_concept: Concept
) -> None:
    other = replace(tiny_concept, weights={name: -tensor for name, tensor in tiny_concept.weights.items()})
    films = [Film(prompt="a sks dog", seed=2, concept=concept) for concept in (tiny_concept, other)]
    for speed in (EXACT, APPROXIMATE["all"]):
        settings = FilmSettings(frames=3, steps=4, guidance=3.0, speed=speed)
        together = list(sample_latents(tiny_base, tiny_motion, films, settings, batch=2))
        for film_together, each in zip(together, films, strict=True):
            (alone,) = sample_latents(tiny_base, tiny_motion, [each], settings)
            assert (film_together - alone).abs().max() <= 1e-4
        assert (together[0] - together[1]).abs().max() > 1e-2, "the concepts must matter"


@pytest.mark.parametrize("speed", [EXACT, APPROXIMATE["all"]], ids=["exact", "approximate"])
def test_windows_travel_and_motion_strength_go_with_it(
    tiny_base: Base, tiny_motion: MotionModules, speed: Speed
) -> None:
    """Films in windows, of prompts that differ from frame to frame, whose motion is scaled: as the plain walk."""
    made = Film(prompt={0: "a dog", 6: "a cat"}, seed=1, control=Control(motion_strength="0.7"))

    def latents(speed: Speed) -> Tensor:
        settings = FilmSettings(frames=10, steps=4, guidance=3.0, windows=Windows(size=6, overlap=2), speed=speed)
        (found,) = sample_latents(tiny_base, tiny_motion, [made], settings)
        return found

    switches = dict.fromkeys(EXACT_SWITCHES, False)
    assert (latents(speed) - latents(replace(speed, **switches))).abs().max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("speed", [PLAIN, EXACT], ids=["plain", "exact"])
@torch.no_grad()
def test_traced_without_breaks(speed: Speed) -> None:
    unet, motion = make_models()
    latents_BFCHW, text_BLD = inputs()
    with reading(unet, read_text(unet, text_BLD)), prepared(unet, motion, speed):
        walk = VideoUNet(unet, motion)
        found = torch._dynamo.explain(lambda latents, time: walk(latents, time, None))(latents_BFCHW, torch.tensor(5))
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def test_presets() -> None:
    assert PRESETS["exact"] == EXACT
    assert [name for name, speed in PRESETS.items() if speed.is_exact] == ["exact"]
    assert not any(getattr(PLAIN, name) for name in EXACT_SWITCHES)
    assert all(getattr(speed, name) for speed in PRESETS.values() for name in EXACT_SWITCHES)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "euler"])
@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_no_step_waits_for_the_device(tiny_base: Base, tiny_motion: MotionModules, preset: str, sampler: Any) -> None:
    """On the meta device a film takes the way of a GPU's, and whatever looks at a number of the device's raises."""
    meta, settings = torch.device("meta"), FilmSettings(frames=3, steps=4, scheduler=sampler, speed=PRESETS[preset])
    base, motion = copy.deepcopy(tiny_base).to(meta, torch.float32), copy.deepcopy(tiny_motion).to(meta)
    (latents_FCHW,) = sample_latents(base, motion, [Film(prompt="a dog", seed=0)], settings)
    assert latents_FCHW.device == meta and latents_FCHW.shape[0] == 3


def test_what_is_for_cpus_alone_is_left_out_elsewhere(tiny_base: Base, tiny_motion: MotionModules) -> None:
    assert EXACT.on("cpu") == EXACT
    assert EXACT.on("cuda") == replace(PLAIN, shared_prefix=True, attentions=True)
    assert PLAIN.on("cuda") == PLAIN
    plain, there = (film(tiny_base, tiny_motion, speed, steps=3) for speed in (PLAIN, EXACT.on("cuda")))
    assert np.abs(there.astype(int) - plain).max() <= 1
