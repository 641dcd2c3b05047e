from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cdvideo.errors import UserError
from cdvideo.evaluation.config import JudgeConfig
from cdvideo.evaluation.judge.model import (
    CLASSES,
    HEADS,
    MAX_BYTES,
    WEIGHTS_FILE,
    Judge,
    label_indices,
    load_judge,
    save_judge,
)

CPU = torch.device("cpu")


@pytest.fixture
def judge() -> Judge:
    return Judge(widths=(4, 8, 8, 8), blocks=(0, 1, 0, 1), side=32).eval()


def test_there_is_a_logit_for_every_class(judge: Judge) -> None:
    logits = judge(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert {head: tuple(values.shape) for head, values in logits.items()} == {
        head: (2, len(names)) for head, names in CLASSES.items()
    }
    assert [len(CLASSES[head]) for head in HEADS] == [26, 18, 18]


def test_verdicts_do_not_depend_on_the_batch(judge: Judge) -> None:
    pixels_BCHW = torch.rand(5, 3, 48, 48) * 2 - 1  # of another size than its own
    together, alone = judge.judge(pixels_BCHW), judge.judge(pixels_BCHW, batch=2)
    assert torch.equal(together.labels_BH, alone.labels_BH)
    assert torch.allclose(together.features_BD, alone.features_BD, atol=1e-5)
    assert together.confidence_BH.shape == (5, 3)
    assert ((together.confidence_BH > 0) & (together.confidence_BH <= 1)).all()


def test_temperature_changes_confidence_alone(judge: Judge) -> None:
    pixels_BCHW = torch.rand(4, 3, 32, 32) * 2 - 1
    before = judge.judge(pixels_BCHW)
    judge.temperature_H[0] = 0.1
    after = judge.judge(pixels_BCHW)
    assert torch.equal(before.labels_BH, after.labels_BH)
    assert (after.confidence_BH[:, 0] > before.confidence_BH[:, 0]).all()
    assert torch.equal(after.confidence_BH[:, 1:], before.confidence_BH[:, 1:])


def test_names_read_back_the_indices(judge: Judge) -> None:
    verdicts = judge.judge(torch.zeros(1, 3, 32, 32))
    names = dict(zip(HEADS, verdicts.names(0), strict=True))
    assert label_indices(names) == verdicts.labels_BH[0].tolist()
    assert label_indices({"subject": "dog", "thing": "", "setting": "surfing"}) == [0, 0, 0]


def test_a_saved_judge_judges_the_same(judge: Judge, tmp_path: Path) -> None:
    pixels_BCHW = torch.rand(3, 3, 32, 32) * 2 - 1
    judge.temperature_H.copy_(torch.tensor([0.5, 2.0, 1.0]))
    path = save_judge(judge, tmp_path)
    loaded = load_judge(tmp_path, device=CPU)
    assert torch.allclose(loaded.judge(pixels_BCHW).features_BD, judge.judge(pixels_BCHW).features_BD, atol=1e-2)
    assert loaded.temperature_H.tolist() == [0.5, 2.0, 1.0]
    assert loaded.temperature_H.dtype == torch.float32
    assert {t.dtype for t in load_file(path).values()} == {torch.float16, torch.int64}
    assert not any(p.requires_grad for p in loaded.parameters())


def test_the_judge_of_the_default_sizes_may_ship(tmp_path: Path) -> None:
    config = JudgeConfig()
    judge = Judge(widths=config.widths, blocks=config.blocks, side=config.side)
    assert 1_200_000 <= sum(p.numel() for p in judge.parameters()) <= 1_520_000
    assert save_judge(judge, tmp_path).stat().st_size <= MAX_BYTES
    (tmp_path / "plain").touch()
    assert (tmp_path / WEIGHTS_FILE).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_no_judge_in_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no judge in"):
        load_judge(tmp_path, device=CPU)


def test_a_judge_of_other_classes_is_refused(judge: Judge, tmp_path: Path) -> None:
    path = save_judge(judge, tmp_path)
    other = {**CLASSES, "setting": ("the moon",)}
    save_file(load_file(path), path, metadata={"classes": json.dumps(other), "sizes": "{}"})
    with pytest.raises(UserError, match="other classes"):
        load_judge(tmp_path, device=CPU)


def test_training_mode_does_not_judge(judge: Judge) -> None:
    with pytest.raises(AssertionError, match="training mode"):
        judge.train().judge(torch.zeros(1, 3, 32, 32))
