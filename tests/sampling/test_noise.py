"""The noise of long films, and FreeInit's mixture of frequencies, against diffusers' loops."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.free_init_utils import FreeInitMixin

from cdvideo.errors import UserError
from cdvideo.sampling.denoise import draw_noise
from cdvideo.sampling.noise import film_noise, low_pass, mix_frequencies, reinitialised, shuffled_order
from cdvideo.sampling.options import Noise

FREE = Noise(kind="freenoise")
SHAPE = (4, 8, 8)


def scheduler(**options: object) -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **options)


def test_fresh_noise_is_what_it_always_was() -> None:
    noise_BFCHW = film_noise([3, 4], (9, *SHAPE), Noise(), window=4, stride=3)
    assert torch.equal(noise_BFCHW, draw_noise([3, 4], (9, *SHAPE)))
    assert torch.equal(
        noise_BFCHW, torch.cat([film_noise([s], (9, *SHAPE), Noise(), window=4, stride=3) for s in (3, 4)])
    )


@pytest.mark.parametrize("noise", [Noise(), FREE], ids=lambda noise: noise.kind)
def test_a_longer_film_starts_with_the_noise_of_the_shorter(noise: Noise) -> None:
    long_BFCHW = film_noise([7], (64, *SHAPE), noise, window=8, stride=6)
    for frames in (3, 8, 9, 21, 33):
        assert torch.equal(film_noise([7], (frames, *SHAPE), noise, window=8, stride=6), long_BFCHW[:, :frames])


def test_freenoise_shuffles_the_first_windows_noise() -> None:
    order = shuffled_order(1, 29, 8, 4)
    assert order[:8] == [*range(8)]
    for start in range(8, 29, 4):
        now, earlier = order[start : start + 4], order[start - 8 : start - 4]
        assert {*now} <= {*earlier} and len({*now}) == len(now)
    assert order != shuffled_order(2, 29, 8, 4)
    noise_BFCHW = film_noise([1], (29, *SHAPE), FREE, window=8, stride=4)
    assert all(torch.equal(noise_BFCHW[0, f], noise_BFCHW[0, order[f]]) for f in range(29))
    assert torch.equal(noise_BFCHW[:, :8], draw_noise([1], (8, *SHAPE)))


def test_low_pass_equals_diffusers() -> None:
    for shape, spatial, temporal in [((6, 8, 8), 0.25, 0.25), ((5, 7, 4), 0.5, 0.2)]:
        theirs = FreeInitMixin()._get_free_init_freq_filter(shape, "cpu", "butterworth", 4, spatial, temporal)
        torch.testing.assert_close(low_pass(shape, spatial=spatial, temporal=temporal), theirs)
        assert 0 < theirs.mean() < 1


@pytest.mark.parametrize("shape", [(2, 6, 4, 8, 8), (1, 5, 3, 7, 4)])
def test_mixed_frequencies_equal_diffusers(shape: tuple[int, ...]) -> None:
    low, high = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    frames, _, height, width = shape[1:]
    mask = FreeInitMixin()._get_free_init_freq_filter((frames, height, width), "cpu", "butterworth", 4, 0.25, 0.25)
    theirs = FreeInitMixin()._apply_freq_filter(low.transpose(1, 2), high.transpose(1, 2), mask).transpose(1, 2)
    torch.testing.assert_close(mix_frequencies(low, high, Noise(freeinit=1)), theirs, rtol=1e-4, atol=1e-5)


def test_reinitialised_noise_has_the_films_low_frequencies() -> None:
    film = draw_noise([1, 2], (8, *SHAPE)).mean(dim=(1, 3, 4), keepdim=True) * 0 + 3.0  # one flat colour
    film = film.expand(2, 8, *SHAPE).clone()
    first = draw_noise([1, 2], (8, *SHAPE))
    turns = [reinitialised(film, first, [1, 2], scheduler(), Noise(freeinit=2), turn=turn) for turn in (1, 2)]
    kept = scheduler().alphas_cumprod[-1].sqrt().item() * 3
    for noise_BFCHW in turns:
        assert noise_BFCHW.mean().item() == pytest.approx(kept + first.mean().item(), abs=0.05)
        assert noise_BFCHW.std().item() == pytest.approx(1, abs=0.1)
    assert (turns[0] - turns[1]).abs().max() > 1, "each time other high frequencies"
    alone = reinitialised(film[1:], first[1:], [2], scheduler(), Noise(freeinit=2), turn=1)
    torch.testing.assert_close(alone, turns[0][1:], rtol=1e-5, atol=1e-5)


def test_freeinit_is_refused_where_it_has_no_meaning() -> None:
    film = draw_noise([1], (4, *SHAPE))
    with pytest.raises(UserError, match=r"ends in pure noise[\s\S]*leave --freeinit out"):
        reinitialised(film, film, [1], scheduler(rescale_betas_zero_snr=True), Noise(freeinit=1), turn=1)
