from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

from cdvideo.base.loader import Base, load_base
from cdvideo.concept.concept import Concept
from cdvideo.concept.config import ConceptConfig, DataConfig, OptimConfig
from cdvideo.concept.optimizer import check_optimizer, checkpointing, make_optimizer
from cdvideo.concept.trainer import train_concept
from cdvideo.errors import UserError
from cdvideo.media.images import Picture
from cdvideo.runs import Run, create_run

EIGHT_BIT = OptimConfig(optimizer="adamw8bit")


def test_checkpointing_ends_with_its_block_however_it_ends(tiny_base: Base) -> None:
    unet = tiny_base.unet
    for asked in (False, True):
        with checkpointing(unet, asked):
            assert unet.is_gradient_checkpointing == asked
        assert not unet.is_gradient_checkpointing
    with pytest.raises(KeyboardInterrupt), checkpointing(unet, True):
        raise KeyboardInterrupt
    assert not unet.is_gradient_checkpointing
    unet.enable_gradient_checkpointing()
    with checkpointing(unet, True):
        pass
    assert unet.is_gradient_checkpointing, "as it was"


def test_a_training_leaves_the_unet_without_checkpoints(
    tiny_base: Base, pictures: list[Picture], config: ConceptConfig, run: Run
) -> None:
    seen = set()
    hook = tiny_base.unet.register_forward_pre_hook(
        lambda unet, _: seen.add((torch.is_grad_enabled(), unet.is_gradient_checkpointing))
    )
    optim = OptimConfig(gradient_checkpointing=True)
    train_concept(tiny_base, pictures, dataclasses.replace(config, steps=1, optim=optim), run, quiet=True)
    hook.remove()
    assert (True, True) in seen and (True, False) not in seen
    assert not tiny_base.unet.is_gradient_checkpointing


def test_rows_are_never_decayed_and_have_their_own_rate() -> None:
    weight, row = torch.zeros(2, 2, requires_grad=True), torch.zeros(1, 2, requires_grad=True)
    optimizer = make_optimizer([weight], [row], OptimConfig(lr=1e-3, token_lr=1e-2, weight_decay=0.1))
    assert type(optimizer) is torch.optim.AdamW
    of_weights, of_rows = optimizer.param_groups
    assert (of_weights["initial_lr"], of_weights["weight_decay"]) == (1e-3, 0.1)
    assert (of_rows["initial_lr"], of_rows["weight_decay"]) == (1e-2, 0.0)
    assert [len(group["params"]) for group in make_optimizer([], [row], OptimConfig()).param_groups] == [1]


def test_8_bits_are_for_cuda() -> None:
    check_optimizer(OptimConfig(), torch.device("cpu"))
    with pytest.raises(UserError, match=r"adamw8bit on cpu\n  allowed: adamw8bit on CUDA.*\n  do: set optim.optimizer"):
        check_optimizer(EIGHT_BIT, torch.device("cpu"))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_a_missing_package_is_told_with_its_command() -> None:
    with pytest.raises(UserError, match=r"needs the package bitsandbytes.*\n.*\n  do: pip install bitsandbytes"):
        check_optimizer(EIGHT_BIT, torch.device("cuda"))


@pytest.mark.gpu
def test_8_bits_learn_nearly_what_32_do(tmp_path: Path, pictures: list[Picture]) -> None:
    pytest.importorskip("bitsandbytes")
    base = load_base("tiny", device=torch.device("cuda:0"))
    learned: dict[str, Concept] = {}
    for optimizer in ("adamw", "adamw8bit"):
        config = ConceptConfig(
            steps=40, data=DataConfig(variants=2), optim=OptimConfig(batch_size=2, optimizer=optimizer)
        )
        with create_run(tmp_path, optimizer) as run:
            learned[optimizer] = train_concept(base, pictures, config, run, quiet=True)
    ours, theirs = (torch.cat([w.flatten() for w in learned[name].weights.values()]) for name in learned)
    assert not torch.equal(ours, theirs)
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.9
