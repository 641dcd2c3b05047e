"""Weights in a mapped file: let go of after use, never lost."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cdvideo.base import mapped
from cdvideo.base.checkpoint import read_tensors
from cdvideo.base.mapped import file_spans, letting_go, mapped_files
from cdvideo.base.offload import at_work

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell what is mapped")
CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path: Path) -> nn.Sequential:
    """Two layers of 256 pages each, whose weights lie in a file, and one in memory."""
    torch.manual_seed(0)
    layers = [nn.Linear(512, 512) for _ in range(3)]
    save_file({f"{i}.{k}": v for i in (0, 1) for k, v in layers[i].state_dict().items()}, tmp_path / "w.safetensors")
    made = nn.Sequential(*layers).requires_grad_(False)
    made.load_state_dict(read_tensors(tmp_path / "w.safetensors"), strict=False, assign=True)
    return made.requires_grad_(False)


def pages_in_memory(layer: nn.Module) -> int:
    count = 0
    for start, end in file_spans(layer.parameters(), mapped_files()):
        with open("/proc/self/pagemap", "rb") as pagemap:
            pagemap.seek(start // mmap.PAGESIZE * 8)
            entries = np.frombuffer(pagemap.read((end - start) // mmap.PAGESIZE * 8), dtype=np.uint64)
        count += int((entries >> np.uint64(63)).sum())
    return count


@torch.inference_mode()
def test_a_module_lets_go_when_it_has_worked(model: nn.Sequential) -> None:
    rows_NC = torch.randn(4, 512)
    expected_NC = model(rows_NC)
    assert pages_in_memory(model[0]) >= 255 and pages_in_memory(model[2]) == 0
    seen: list[tuple[int, int]] = []
    with at_work(CPU, model):
        model[1].register_forward_hook(lambda *_: seen.append((pages_in_memory(model[0]), pages_in_memory(model[1]))))
        for _ in range(2):
            assert torch.equal(model(rows_NC), expected_NC)
    assert seen == [(0, 0), (0, 0)]
    model(rows_NC)
    assert pages_in_memory(model[0]) >= 255, "after the block they stay"


@torch.inference_mode()
def test_what_was_written_since_stays(model: nn.Sequential) -> None:
    model[0].weight.data[300].fill_(7)
    model[2].weight.data[0].fill_(5)
    expected_NC = model(torch.ones(1, 512))
    with letting_go([model]):
        assert torch.equal(model(torch.ones(1, 512)), expected_NC)
        assert pages_in_memory(model[0]) >= 255 and pages_in_memory(model[1]) == 0
    assert torch.equal(model(torch.ones(1, 512)), expected_NC)
    assert (model[0].weight[300] == 7).all() and (model[2].weight[0] == 5).all()


@torch.inference_mode()
def test_where_the_system_does_not_tell_what_was_written_all_stays(
    model: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(mapped, "open", closed, raising=False)
    with letting_go([model]):
        model(torch.ones(1, 512))
        assert pages_in_memory(model[0]) >= 255


def test_spans_are_whole_pages_of_files_alone(model: nn.Sequential) -> None:
    page, weight = mmap.PAGESIZE, model[0].weight
    ((start, end),) = file_spans(model.parameters(), mapped_files())
    assert start % page == end % page == 0 and 2 * weight.nbytes - 2 * page <= end - start <= 2 * weight.nbytes + page
    assert file_spans(model[2].parameters(), mapped_files()) == []
    assert file_spans([weight[0, :1]], mapped_files()) == [], "less than a page"
    assert file_spans(model.parameters(), []) == []
