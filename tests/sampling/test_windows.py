"""Which frames windows show, and how what is said of them is put together."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from cdvideo.errors import UserError
from cdvideo.sampling.options import Windows
from cdvideo.sampling.windows import (
    Window,
    blend_weights,
    halving,
    looped_windows,
    straight_windows,
    window_size,
    windowed,
    windows_at,
)

SCHEDULES = [Windows(size=6, overlap=2, schedule=name) for name in ("uniform", "static", "looped")]


def test_static_windows_by_hand() -> None:
    assert [(w[0], w[-1]) for w in straight_windows(19, 8, 5, turn=0)] == [(0, 7), (5, 12), (10, 17), (11, 18)]
    assert [w[0] for w in straight_windows(18, 8, 5, turn=0)] == [0, 5, 10]


def test_uniform_windows_move_and_stay_inside() -> None:
    assert [w[0] for w in straight_windows(19, 8, 5, turn=0.5)] == [0, 3, 8, 11]
    assert [w[0] for w in straight_windows(19, 8, 5, turn=0.25)] == [0, 4, 9, 11]


def test_looped_windows_by_hand() -> None:
    assert looped_windows(8, 4, 3, turn=0) == [(0, 1, 2, 3), (3, 4, 5, 6), (5, 6, 7, 0)]
    assert looped_windows(8, 4, 4, turn=0.25) == [(2, 3, 4, 5), (6, 7, 0, 1)]
    assert looped_windows(4, 4, 3, turn=0.5) == [(2, 3, 0, 1)], "a film of one window turns as a whole"


@pytest.mark.parametrize("windows", SCHEDULES, ids=lambda w: w.schedule)
@pytest.mark.parametrize("frames", [7, 8, 13, 24, 65])
def test_windows_show_every_frame_and_lie_at_most_a_stride_apart(windows: Windows, frames: int) -> None:
    for step in range(9):
        listed = windows_at(step, frames=frames, size=6, windows=windows)
        assert {frame for window in listed for frame in window} == {*range(frames)}
        assert all(len({*window}) == 6 for window in listed)
        starts = sorted(window[0] for window in listed)
        assert all(after - before <= 4 for before, after in pairwise(starts))
        around = {(a + 1) % frames == b for window in listed for a, b in pairwise(window)}
        assert around == {True}, "frames stand in the film's order"


def test_the_work_is_linear_in_the_length() -> None:
    for windows in (Windows(), Windows(schedule="static"), Windows(schedule="looped")):
        counts = {
            n: sum(len(windows_at(step, frames=n, size=16, windows=windows)) for step in range(25)) for n in (64, 512)
        }
        assert 0.85 < counts[512] / 8 / counts[64] < 1.1, windows.schedule


def test_every_pair_of_frames_is_inside_of_a_window_at_most_steps() -> None:
    """Moved windows have no seam that stays; the looped ones join the end to the beginning too."""
    for windows, frames in [(Windows(overlap=0), 40), (Windows(overlap=0, schedule="looped"), 40)]:
        pairs = range(frames if windows.schedule == "looped" else frames - 1)
        for frame in pairs:
            joined = [
                any(
                    {frame, (frame + 1) % frames} <= {*w}
                    for w in windows_at(s, frames=frames, size=16, windows=windows)
                )
                for s in range(16)
            ]
            assert sum(joined) >= 10, (windows.schedule, frame)


def test_halving_is_van_der_corputs_sequence() -> None:
    assert [halving(step) for step in range(8)] == [0, 0.5, 0.25, 0.75, 0.125, 0.625, 0.375, 0.875]


def test_blend_weights() -> None:
    assert blend_weights(5, Windows()).tolist() == [1, 2, 3, 2, 1]
    assert blend_weights(6, Windows()).tolist() == [1, 2, 3, 3, 2, 1]
    assert blend_weights(3, Windows(blend="flat")).tolist() == [1, 1, 1]


def test_pyramid_equals_diffusers() -> None:
    from diffusers.models.attention import FreeNoiseTransformerBlock

    block = FreeNoiseTransformerBlock(8, 2, 4)
    for size in (8, 15, 16):
        assert blend_weights(size, Windows()).tolist() == block._get_frame_weights(size, "pyramid")


def test_window_size() -> None:
    assert window_size(32, 32, Windows()) == 32, "what fits is made at once"
    assert window_size(33, 32, Windows()) == 16
    assert window_size(33, 8, Windows()) == 8
    assert window_size(12, 32, Windows(size=8)) == 8
    assert window_size(6, 32, Windows(size=8)) == 6
    with pytest.raises(UserError, match=r"windows of 40 frames[\s\S]*2 to 32"):
        window_size(64, 32, Windows(size=40))
    with pytest.raises(UserError, match=r"windows of 4 frames that share 4[\s\S]*overlap=1"):
        window_size(9, 4, Windows())


@pytest.mark.parametrize("windows", SCHEDULES, ids=lambda w: w.schedule)
def test_a_model_that_looks_at_each_frame_alone_is_not_changed(windows: Windows) -> None:
    latents_BFCHW = torch.randn(2, 13, 4, 3, 3, generator=torch.Generator().manual_seed(0))

    def predict_at(_window: Window) -> object:
        return lambda latents, timestep, step: latents * 2 + timestep

    predict = windowed(
        predict_at,  # type: ignore[arg-type]
        lambda step: windows_at(step, frames=13, size=6, windows=windows),
        blend_weights(6, windows),
    )
    for step in range(4):
        film = predict(latents_BFCHW, torch.tensor(5.0), step)
        torch.testing.assert_close(film, latents_BFCHW * 2 + 5, rtol=1e-6, atol=1e-6)


def test_overlaps_are_weighted_means() -> None:
    """Each window says its first frame's number; where two overlap, the pyramid mixes them."""
    seen: list[tuple[Window, tuple[int, ...]]] = []

    def predict_at(window: Window) -> object:
        def predict(latents: Tensor, timestep: Tensor, step: int) -> Tensor:
            seen.append((window, tuple(latents.shape)))
            return torch.full_like(latents, float(window[0]))

        return predict

    listed = [(0, 1, 2, 3), (2, 3, 4, 5)]
    predict = windowed(predict_at, lambda _step: listed, torch.tensor([1.0, 2.0, 2.0, 1.0]))  # type: ignore[arg-type]
    film = predict(torch.zeros(1, 6, 1, 1, 1), torch.tensor(0), 0)
    assert film.flatten().tolist() == pytest.approx([0, 0, 2 / 3, 4 / 3, 2, 2])
    assert seen == [(window, (1, 4, 1, 1, 1)) for window in listed]
