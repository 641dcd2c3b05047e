"""Both halves of guidance at once, each in a thread of its own."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cdvideo.base.loader import Base
from cdvideo.motion.modules import MotionModules
from cdvideo.motion.video_unet import VideoUNet
from cdvideo.sampling.halves import two_halves
from cdvideo.sampling.prompt_kv import compile_prompts, reading

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def four_threads() -> object:
    former = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(former)


@torch.inference_mode()
def test_each_copy_reads_its_own_prompt(tiny_base: Base, tiny_motion: MotionModules) -> None:
    walk = VideoUNet(tiny_base.unet, tiny_motion)
    channels = tiny_base.unet.config.in_channels
    latents_BFCHW = torch.randn(2, 3, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    with reading(tiny_base.unet, compile_prompts(tiny_base, ["a dog", "a cat", "a fox", "a bear"])):
        expected = walk(latents_BFCHW, 500, None, copies=2)
        with two_halves(CPU) as halves:
            found = walk(latents_BFCHW, 500, None, copies=2, apart=halves)
        torch.testing.assert_close(walk(latents_BFCHW, 500, None, copies=2), expected, rtol=0, atol=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (found[:2] - found[2:]).abs().max() > 1e-2, "the prompts must matter"


def test_they_run_at_once_on_half_of_the_threads_each() -> None:
    meet = threading.Barrier(2, timeout=20)

    def half() -> Tensor:
        meet.wait()  # broken, if one had to wait for the other
        return torch.tensor([torch.get_num_threads()])

    with two_halves(CPU) as halves:
        assert halves is not None
        assert halves(half).tolist() == [2, 2]
    assert torch.get_num_threads() == 4


def test_a_failure_of_one_is_told() -> None:
    with pytest.raises(RuntimeError, match="of no use"), two_halves(CPU) as halves:
        assert halves is not None
        halves(lambda: (_ for _ in ()).throw(RuntimeError("of no use")))
    assert torch.get_num_threads() == 4


def test_not_where_it_gains_nothing_or_hides_what_is_looked_at() -> None:
    with two_halves(torch.device("cuda")) as halves:
        assert halves is None
    with FlopCounterMode(display=False), two_halves(CPU) as halves:
        assert halves is None
    torch.set_num_threads(1)
    with two_halves(CPU) as halves:
        assert halves is None
