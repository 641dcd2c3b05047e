"""What tensors take, counted on shapes alone, against what the same code takes with numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from cdvideo.base import memory
from cdvideo.base.loader import Base, load_base
from cdvideo.base.memory import META, Meter, Needs, advise, base_from_configs, metered, total, weight_bytes
from cdvideo.base.single_file import CLIP_VOCABULARY
from tests.base.ldm_names import make_text_encoder, make_unet, make_vae, official, official_xl
from tests.sdxl import POOLED
from tests.sdxl import save_folder as save_sdxl

CPU = torch.device("cpu")


def test_live_and_peak_are_what_tensors_take() -> None:
    with metered() as meter:
        kept = torch.empty(1000, dtype=torch.float32, device=META)
        view = kept.view(10, 100)[2:]
        assert (meter.live, meter.peak) == (4000, 4000)
        other = view + 1
        assert (meter.live, meter.peak) == (7200, 7200)
        del other
        assert (meter.live, meter.peak) == (4000, 7200)
        del view
        assert meter.live == 4000, "a view's end is not the tensor's"


def test_attention_is_counted_as_a_fused_kernel_stores_it() -> None:
    q, k, v = (torch.empty(1, 2, 512, 32, device=META, requires_grad=True) for _ in range(3))
    with metered() as meter:
        out = F.scaled_dot_product_attention(q, k, v)
    assert meter.live < 2 * out.numel() * 4 < 2 * 512 * 512 * 4  # nothing of the size of all pairs
    plain = F.scaled_dot_product_attention(*(torch.ones(1, 1, 4, 8) for _ in range(3)))
    assert torch.equal(plain, torch.ones(1, 1, 4, 8)), "afterwards it is torch's again"


def step(base: Base) -> int:
    """The peak of a forward and backward pass of the UNet."""
    text_BLD = torch.zeros(2, 24, base.unet.config.cross_attention_dim, device=base.device).requires_grad_()
    pooled_BP, sizes_B6 = torch.zeros(2, POOLED, device=base.device), torch.zeros(2, 6, device=base.device)
    with metered() as meter:
        noisy_BCHW = torch.zeros(2, 4, 16, 16, device=base.device)
        added = {"text_embeds": pooled_BP, "time_ids": sizes_B6} if base.is_sdxl else None
        loss = base.unet(noisy_BCHW, 10, text_BLD, added_cond_kwargs=added).sample.square().mean()
        torch.autograd.grad(loss, [text_BLD])
    return meter.peak


@pytest.fixture(params=["tiny_base_folder", "sdxl_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_shapes_alone_tell_what_numbers_take(folder: Path, checkpointing: bool) -> None:
    outline = base_from_configs(str(folder), dtype=torch.float32)
    loaded = load_base(str(folder), device=CPU)
    assert outline is not None
    if checkpointing:
        assert step(outline) > (outline.unet.enable_gradient_checkpointing(), step(outline))[1]
        loaded.unet.enable_gradient_checkpointing()
    assert step(outline) == pytest.approx(step(loaded), rel=0.02)  # attention's backward keeps a little more there


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_counted_without_being_read(folder: Path, dtype: torch.dtype) -> None:
    """SDXL's VAE stays in float32 where the rest is float16."""
    outline = base_from_configs(str(folder), dtype=dtype)
    loaded = load_base(str(folder), device=CPU, dtype=dtype)
    assert outline is not None and outline.resolution == loaded.resolution and outline.device == META
    for one, other in zip(outline.modules, loaded.modules, strict=True):
        assert {t.device.type for t in one.parameters()} == {"meta"}
        assert {n: t.shape for n, t in one.state_dict().items()} == {n: t.shape for n, t in other.state_dict().items()}
        assert weight_bytes(one) == weight_bytes(other) > 0


@pytest.fixture(scope="module", params=["1", "2", "XL"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of this family in one file."""
    folder = tmp_path_factory.mktemp("file")
    if request.param == "XL":
        base = load_base(str(save_sdxl(folder / "sdxl", CLIP_VOCABULARY)), device=CPU)
        tensors = official_xl(base.unet, base.vae, *base.text_encoders.values())
    else:
        family = int(request.param)
        tensors = official(family, make_unet(family), make_vae(), make_text_encoder(family))
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "base.safetensors")
    return folder / "base.safetensors"


def test_a_single_file_s_header_tells_as_much(file: Path) -> None:
    outline, loaded = base_from_configs(str(file), dtype=torch.bfloat16), load_base(str(file), device=CPU)
    loaded.to(CPU, torch.bfloat16)
    assert outline is not None
    assert (outline.resolution, outline.is_sdxl) == (loaded.resolution, loaded.is_sdxl)
    for one, other in zip(outline.modules, loaded.modules, strict=True):
        assert {n: t.shape for n, t in one.state_dict().items()} == {n: t.shape for n, t in other.state_dict().items()}
        assert weight_bytes(one) == weight_bytes(other) > 0


def test_what_is_no_whole_base_is_left_to_the_loader(tmp_path: Path) -> None:
    assert base_from_configs(str(tmp_path), dtype=torch.float32) is None


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 4_900_000_000)
    monkeypatch.setattr(memory, "ROOMY", 10**9)


def cures(_: Base) -> Iterator[tuple[str, Needs]]:
    yield "useless=true", {"training": 5_800_000_000}
    yield "optim.batch_size=1", {"training": 4_700_000_000}
    yield "resolution=384", {"training": 4_000_000_000}
    raise AssertionError("asked on, though it fits")


def test_what_does_not_fit_is_warned_of_with_what_helps(
    tiny_base_folder: Path, scarce: None, caplog: pytest.LogCaptureFixture
) -> None:
    needs = {"training": 5_800_000_000, "decoding": 1_000_000_000}
    told: list[str] = []
    assert not advise(str(tiny_base_folder), CPU, torch.float32, lambda _: needs, cures, report=told.append)
    assert told == []
    assert caplog.messages == [
        "needs about 6.1 GB of memory (training), 4.9 GB free: try optim.batch_size=1 resolution=384 (about 4.3 GB)"
    ]


def test_what_fits_is_told(tiny_base_folder: Path, scarce: None, caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []
    needs = {"training": 4_000_000_000}
    assert advise(str(tiny_base_folder), CPU, torch.float32, lambda _: needs, cures, report=told.append)
    assert told == ["needs about 4.3 GB of memory (training), 4.9 GB free"] and caplog.messages == []
    assert total(needs) == 4_300_000_000


def test_where_there_is_room_nothing_is_reckoned(tiny_base_folder: Path) -> None:
    def refuse(_: Base) -> Needs:
        raise AssertionError

    assert advise(str(tiny_base_folder), CPU, torch.float32, refuse, cures, report=refuse)


def test_the_meter_sees_every_storage_once() -> None:
    linear = nn.Linear(8, 8).requires_grad_(False)
    with Meter() as meter:
        out = linear(torch.zeros(2, 8))
        assert meter.live == out.nbytes, "and not the weight's, which it was multiplied by as a view"
    assert out.untyped_storage()._cdata in meter._storages
