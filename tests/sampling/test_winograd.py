"""Convolutions by tiles against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cdvideo.sampling import winograd
from cdvideo.sampling.winograd import by_tiles, convolve, pays


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken for any width and size."""
    monkeypatch.setattr(winograd, "CHANNELS", 1)
    monkeypatch.setattr(winograd, "PIXELS", 1)
    monkeypatch.setattr(winograd, "AT_ONCE", 16)


@pytest.mark.parametrize("shape", [(3, 8, 8, 8), (5, 6, 9, 14), (1, 3, 1, 1), (2, 4, 4, 3), (1, 5, 30, 7)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kept", [700, 10_000], ids=["outputs in parts", "outputs at once"])
@pytest.mark.usefixtures("narrow")
def test_convolve(shape: tuple[int, ...], bias: bool, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "KEPT", kept)
    torch.manual_seed(0)
    hidden_NCHW, weight_OCYX = torch.randn(shape), torch.randn(7, shape[1], 3, 3)
    bias_O = torch.randn(7) if bias else None
    expected = F.conv2d(
        hidden_NCHW.double(), weight_OCYX.double(), None if bias_O is None else bias_O.double(), padding=1
    )
    for layout in (torch.contiguous_format, torch.channels_last):
        found = convolve(hidden_NCHW.to(memory_format=layout), weight_OCYX.to(memory_format=layout), bias_O)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-4 * expected.std(correction=0)


def test_where_it_pays() -> None:
    weight_OCYX = torch.empty(320, 320, 3, 3)
    assert pays(torch.empty(2, 320, 32, 32), weight_OCYX)
    assert not pays(torch.empty(1, 320, 12, 16), weight_OCYX), "few pixels"
    assert not pays(torch.empty(2, 64, 64, 64), torch.empty(64, 64, 3, 3)), "few channels"
    assert not pays(torch.empty(2, 320, 32, 32, dtype=torch.bfloat16), weight_OCYX), "the transforms lose two digits"


@pytest.mark.usefixtures("narrow")
def test_by_tiles_takes_plain_convolutions_and_gives_them_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, stride=2),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(8, 4, 1),
    )
    pixels = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        expected = model(pixels)
        with by_tiles(model):
            assert ["forward" in module.__dict__ for module in model] == [True, False, False, False, False]
            found = model(pixels)
    assert not torch.equal(found, expected), "by another way"
    assert (found - expected).abs().max() <= 1e-4
    assert not any("forward" in module.__dict__ for module in model)
