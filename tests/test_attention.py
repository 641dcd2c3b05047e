"""Backends of attention: against the formula, within the limits of their kernels, and told where they can not run."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cdvideo.attention import (
    BACKENDS,
    MOST_BATCH,
    attend,
    attention_backend,
    by_xformers,
    check_attention,
    check_backend,
)
from cdvideo.base.loader import Base
from cdvideo.errors import UserError
from cdvideo.motion.modules import FrameAttention
from cdvideo.sampling import kernels
from cdvideo.sampling.attention import attending
from cdvideo.sampling.image import sample_images
from cdvideo.sampling.kernels import attend_rows, by_heads

CPU = torch.device("cpu")
CRASH = "CUDA error: invalid configuration argument"


def limited(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with xformers' layouts, (batch, length, heads, channels) or heads folded, and its kernels' limit."""
    assert all(tensor.is_contiguous() for tensor in (q, k, v))
    if q.shape[0] > 65_535:
        raise RuntimeError(CRASH)
    if q.ndim == 3:
        return F.scaled_dot_product_attention(q, k, v)
    return (
        F.scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in (q, k, v))).transpose(1, 2).contiguous()
    )


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """In place of xformers: notes the shapes with which it is called."""
    shapes: list[torch.Size] = []

    def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shapes.append(q.shape)
        return limited(q, k, v)

    ops = ModuleType("xformers.ops")
    ops.memory_efficient_attention = operator  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return shapes


@torch.inference_mode()
def test_the_classic_crash_can_not_happen(xformers: list[torch.Size]) -> None:
    """Two films of 64 x 64 latents with 8 heads: folded into the batch, one more than a grid can count."""
    frames, heads = 2, 8
    layer = FrameAttention(16, heads)
    tokens_PFC = torch.randn(2 * 64 * 64, frames, 16)
    folded = torch.zeros(len(tokens_PFC) * heads, frames, 2)
    assert len(folded) == 65_536
    with pytest.raises(RuntimeError, match=CRASH):
        limited(folded, folded, folded)
    expected_PFC = layer(tokens_PFC)
    with attention_backend("xformers", CPU, torch.float32):
        xformers.clear()
        found_PFC = layer(tokens_PFC)
    assert xformers == [(8192, frames, heads, 2)]
    assert (found_PFC - expected_PFC).abs().max() < 1e-5


@torch.inference_mode()
def test_a_batch_beyond_the_limit_is_split(xformers: list[torch.Size]) -> None:
    q, k, v = torch.randn(3, MOST_BATCH + 5, 1, 2, 4).unbind()
    with pytest.raises(RuntimeError, match=CRASH):
        by_xformers(q, k, v)
    with attention_backend("xformers", CPU, torch.float32):
        xformers.clear()
        found = attend(q, k, v)
    assert xformers == [(MOST_BATCH, 2, 1, 4), (5, 2, 1, 4)]
    assert (found - attend(q, k, v)).abs().max() < 1e-6


@torch.inference_mode()
def test_more_pixels_than_the_limit_over_frames(xformers: list[torch.Size]) -> None:
    """The sampler's own attention over frames: more pixels than a kernel's grid has places, with heads of their own."""
    query_NLC, keys_NLC, values_NLC = torch.randn(3, MOST_BATCH + 1, 80, 2).unbind()
    keys_NHTE, values_NHTE = by_heads(keys_NLC, 1), by_heads(values_NLC, 1)
    with attention_backend("xformers", CPU, torch.float32):
        xformers.clear()
        found = attend_rows(query_NLC, keys_NHTE, values_NHTE)
    assert xformers == [(MOST_BATCH, 80, 1, 2), (1, 80, 1, 2)]
    assert (found - attend(query_NLC.unsqueeze(1), keys_NHTE, values_NHTE).squeeze(1)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("places", [5, 64, 65])
@torch.inference_mode()
def test_rows_attend_by_heads(places: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short and long attention alike are the formula, and in as many parts as the scores that are computed at once."""
    query_NLC, keys_NTC, values_NTC = torch.randn(3, 7, 12).to(dtype), *torch.randn(2, 3, places, 12).to(dtype)
    keys_NHTE, values_NHTE = by_heads(keys_NTC, 2), by_heads(values_NTC, 2)
    scores_NHLT = by_heads(query_NLC, 2).float() @ keys_NHTE.float().transpose(-1, -2) / 6**0.5
    expected_NLC = (scores_NHLT.softmax(-1) @ values_NHTE.float()).transpose(1, 2).flatten(2)
    for most in (kernels.SCORES, 1):
        monkeypatch.setattr(kernels, "SCORES", most)
        found_NLC = attend_rows(query_NLC, keys_NHTE, values_NHTE)
        assert (found_NLC.float() - expected_NLC).abs().max() <= (1e-5 if dtype == torch.float32 else 2e-2)


def test_projections_reach_xformers_without_a_copy(xformers: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    pointers = []
    ops = sys.modules["xformers.ops"]
    monkeypatch.setattr(
        ops, "memory_efficient_attention", lambda *qkv: pointers.extend(t.data_ptr() for t in qkv) or qkv[0]
    )
    projected = [torch.randn(3, 5, 8) for _ in range(3)]
    by_xformers(*(tensor.unflatten(-1, (2, 4)).transpose(1, 2) for tensor in projected))
    assert pointers == [tensor.data_ptr() for tensor in projected]


def test_a_picture_by_xformers_is_the_same(xformers: list[torch.Size], tiny_base: Base) -> None:
    options = {"seeds": [0], "steps": 2}
    expected_BCHW = sample_images(tiny_base, ["a dog"], **options)
    before = {name: type(processor) for name, processor in tiny_base.unet.attn_processors.items()}
    with attending(tiny_base, "xformers"):
        xformers.clear()
        found_BCHW = sample_images(tiny_base, ["a dog"], **options)
    assert len(xformers) == 2 * len(before), "every attention at every step"
    assert (found_BCHW - expected_BCHW).abs().max() < 1e-4
    assert {name: type(processor) for name, processor in tiny_base.unet.attn_processors.items()} == before


def test_a_backend_that_computes_something_else_is_refused(
    xformers: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["xformers.ops"], "memory_efficient_attention", lambda q, k, v: q)
    with (
        pytest.raises(UserError, match=r"attention xformers on cpu in float32: wrong by"),
        attention_backend("xformers", CPU, torch.float32),
    ):
        pass


def test_what_can_not_run_is_told() -> None:
    for name in ("cudnn", "xformers"):
        with (
            pytest.raises(UserError, match=rf"attention {name} on cpu in float32: .+[\s\S]*leave --attention out"),
            attention_backend(name, CPU, torch.float32),
        ):
            pass


@torch.inference_mode()
def test_flash_is_asked_first_and_the_former_backend_returns() -> None:
    q = torch.randn(1, 2, 8, 4)
    expected = attend(q, q, q)
    with attention_backend("flash", CPU, torch.float32):
        assert (attend(q, q, q) - expected).abs().max() < 1e-6
        with pytest.raises(KeyError), attention_backend("sdpa", CPU, torch.float32):
            raise KeyError
        assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.equal(attend(q, q, q), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_is_attention(dtype: torch.dtype) -> None:
    assert check_backend("sdpa", CPU, dtype).startswith("largest error")


def test_wrong_attention_is_found() -> None:
    def unscaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v

    with pytest.raises(ValueError, match="wrong by"):
        check_attention(unscaled, CPU, torch.float32)
    with pytest.raises(ValueError, match="wrong by nan"):
        check_attention(lambda q, k, v: q * float("nan"), CPU, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_that_runs_on_the_gpu_is_attention(name: str) -> None:
    gpu = torch.device("cuda:0")
    try:
        told = check_backend(name, gpu, torch.bfloat16)
    except (RuntimeError, ImportError, NotImplementedError) as error:
        pytest.skip(f"{name} does not run here: {error}")
    assert told.startswith("largest error")
