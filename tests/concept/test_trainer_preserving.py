"""The trainer's other losses: what each keeps of the base while a concept is learned."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.base.text import encode_text, tokenize
from cdvideo.concept import data, trainer
from cdvideo.concept.adapters import tuned
from cdvideo.concept.config import ConceptConfig
from cdvideo.concept.losses import denoising_loss
from cdvideo.errors import UserError
from cdvideo.media.images import Picture
from cdvideo.sampling.prior import prior_pictures
from tests.concept.parts import changed, fixed_loss, train_with


def test_runs_of_one_seed_see_the_same_batches_whatever_their_losses(
    tiny_base: Base, pictures: list[Picture], config: ConceptConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, steps=2)
    first = [
        train_with(tiny_base, pictures, changed(config, **groups), tmp_path)[1][1]["loss_denoise"]
        for groups in (
            {},
            {"semantic": {"weight": 0.0}},
            {"semantic": {"phrases": 9}},
            {"preserve": {"output_weight": 1.0}},
        )
    ]
    assert len(set(first)) == 1


def left_half(_base: Base, latents_NCHW: Tensor, _prompt: str, **_: int) -> Tensor:
    """In place of `subject_masks`: the tiny base sees the subject everywhere."""
    masks_N1HW = torch.zeros_like(latents_NCHW[:, :1])
    masks_N1HW[..., : masks_N1HW.shape[-1] // 2] = 1
    return masks_N1HW


def test_what_surrounds_the_subject_is_kept(
    tiny_base: Base, pictures: list[Picture], config: ConceptConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "subject_masks", left_half)
    config = changed(dataclasses.replace(config, steps=12), optim={"lr": 1e-2}, data={"focus": "subject"})

    def losses(weight: float) -> list[float]:
        weighted = changed(config, preserve={"background_weight": weight})
        _, metrics = train_with(tiny_base, pictures, weighted, tmp_path / f"{weight}")
        return [line["loss_background"] for line in metrics if "loss_background" in line]

    free, kept = losses(1e-9), losses(20.0)
    assert len(kept) == config.steps and kept[0] == free[0]
    assert sum(kept[-4:]) < 0.75 * sum(free[-4:])


@pytest.mark.parametrize("kind", ["kv", "unet", "lora"])
def test_the_output_for_the_class_is_kept(
    tiny_base: Base, pictures: list[Picture], config: ConceptConfig, tmp_path: Path, kind: str
) -> None:
    """How far the class prompt's prediction has moved from the base's, without and with the loss."""
    config = changed(dataclasses.replace(config, steps=10), optim={"lr": 1e-2}, adapter={"kind": kind})
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    text = encode_text(tiny_base.text_encoder, tokenize(tiny_base.tokenizer, ["a picture of a dog"] * 4)).hidden_BLD

    def moved(weight: float) -> float:
        concept, metrics = train_with(
            tiny_base, pictures, changed(config, preserve={"output_weight": weight}), tmp_path / f"{weight}"
        )
        assert ("loss_output" in metrics[-1]) == (weight > 0)
        with torch.no_grad():
            before = tiny_base.unet(latents, 500, text).sample
            with tuned(tiny_base.unet, concept):
                return (tiny_base.unet(latents, 500, text).sample - before).square().mean().item()

    assert moved(20.0) < 0.75 * moved(0.0)


@pytest.mark.parametrize("kind", ["kv", "unet", "lora"])
def test_an_anchor_holds_the_weights(
    tiny_base: Base, pictures: list[Picture], config: ConceptConfig, tmp_path: Path, kind: str
) -> None:
    config = changed(dataclasses.replace(config, steps=10), optim={"lr": 1e-2}, adapter={"kind": kind})
    ends = {
        weight: train_with(
            tiny_base, pictures, changed(config, preserve={"anchor_weight": weight}), tmp_path / f"{weight}"
        )[1][-1]
        for weight in (0.0, 1e3)
    }
    assert ends[1e3]["weight_change"] < 0.7 * ends[0.0]["weight_change"]
    assert ends[1e3]["loss_anchor"] > 0 and "loss_anchor" not in ends[0.0]


def test_rows_keep_the_norm_of_the_class_word(
    tiny_base: Base, pictures: list[Picture], config: ConceptConfig, tmp_path: Path
) -> None:
    config = changed(config, preserve={"keep_norm": True}, optim={"token_lr": 0.05}, adapter={"num_rows": 2})
    concept, _ = train_with(tiny_base, pictures, config, tmp_path)
    (word,) = tiny_base.tokenizer("dog", add_special_tokens=False).input_ids
    row_D = tiny_base.text_encoder.get_input_embeddings().weight[word]
    torch.testing.assert_close(concept.tokens["sks"].norm(dim=1), row_D.norm().expand(2))
    assert not torch.allclose(concept.tokens["sks"][0], row_D, atol=1e-2)


def test_the_base_s_own_pictures_of_the_class_are_half_of_every_batch(
    tiny_base: Base, pictures: list[Picture], config: ConceptConfig, tmp_path: Path
) -> None:
    shapes = []

    def note(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():  # measuring drift needs no gradients
            shapes.append(len(inputs[0]))

    hook = tiny_base.unet.register_forward_pre_hook(note)
    config = changed(dataclasses.replace(config, steps=2), preserve={"prior_weight": 1.0})
    _, metrics = train_with(tiny_base, pictures, config, tmp_path, prior={"dog": pictures[:2]})
    hook.remove()
    assert shapes == [4, 4] and metrics[-1]["loss_prior"] > 0
    with pytest.raises(UserError, match="without pictures of dog"):
        train_with(tiny_base, pictures, config, tmp_path, prior={"cat": pictures})


@pytest.mark.parametrize("focus", ["subject", "picture"])
def test_prior_pictures_count_whole_whatever_the_concept_s_own_do(
    tiny_base: Base,
    pictures: list[Picture],
    config: ConceptConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    focus: str,
) -> None:
    counted: list[Tensor] = []

    def note(prediction_BCHW: Tensor, target_BCHW: Tensor, mask_B1HW: Tensor) -> Tensor:
        counted.append(mask_B1HW)
        return denoising_loss(prediction_BCHW, target_BCHW, mask_B1HW)

    monkeypatch.setattr(data, "subject_masks", left_half)
    monkeypatch.setattr(trainer, "denoising_loss", note)
    whole = {"focus": focus, "rescale": 0.0}
    preserve = {"prior_weight": 1.0, "background_weight": 0.0}
    config = changed(dataclasses.replace(config, steps=1), data=whole, preserve=preserve)
    train_with(tiny_base, pictures, config, tmp_path, prior={"dog": pictures[:2]})
    own_B1HW, prior_B1HW = counted
    assert prior_B1HW.shape == own_B1HW.shape and prior_B1HW.eq(1).all()
    assert own_B1HW[..., :4].eq(1).all() and own_B1HW[..., 4:].eq(focus == "picture").all()


def test_prior_pictures_keep_what_the_class_looks_like(
    tiny_base: Base, pictures: list[Picture], config: ConceptConfig, tmp_path: Path
) -> None:
    """With the prior, the class prompt fits other pictures better at the end than without."""
    config = changed(
        dataclasses.replace(config, steps=30), optim={"lr": 1e-2, "batch_size": 2}, adapter={"kind": "unet"}
    )
    others = [Picture(name="", image=Image.new("RGB", (64, 64), color)) for color in ("white", "black")]

    def class_loss(weight: float) -> float:
        weighted = changed(config, preserve={"prior_weight": weight})
        concept, _ = train_with(tiny_base, pictures, weighted, tmp_path / f"{weight}", prior={"dog": others})
        return fixed_loss(tiny_base, others, config, concept, prompt="a picture of a dog")

    assert class_loss(3.0) < 0.95 * class_loss(0.0)


@pytest.mark.parametrize("before", [False, True])
def test_checkpointing_is_left_as_it_was(
    tiny_base: Base, pictures: list[Picture], config: ConceptConfig, tmp_path: Path, before: bool
) -> None:
    """Also where the training fails."""
    if before:
        tiny_base.unet.enable_gradient_checkpointing()
    seen: list[bool] = []
    hook = tiny_base.unet.register_forward_pre_hook(lambda *_: seen.append(tiny_base.unet.is_gradient_checkpointing))
    config = changed(dataclasses.replace(config, steps=1), optim={"gradient_checkpointing": True})
    train_with(tiny_base, pictures, config, tmp_path)
    hook.remove()
    assert any(seen) and tiny_base.unet.is_gradient_checkpointing is before
    hopeless = changed(dataclasses.replace(config, steps=3), optim={"gradient_checkpointing": True, "token_lr": 1e30})
    with pytest.raises(UserError, match="diverged"):
        train_with(tiny_base, pictures, hopeless, tmp_path / "again")
    assert tiny_base.unet.is_gradient_checkpointing is before


def test_prior_pictures_do_not_depend_on_the_contact_sheets(
    tiny_base: Base, config: ConceptConfig, tmp_path: Path
) -> None:
    """Whose settings may change when a run is resumed, between one picture and the next."""
    config = changed(config, preserve={"prior_weight": 1.0, "prior_images": 2})
    whole = prior_pictures(tiny_base, config, tmp_path / "whole", quiet=True)
    prior_pictures(tiny_base, changed(config, preserve={"prior_images": 1}), tmp_path / "half", quiet=True)
    other = changed(config, sample={"steps": 3, "guidance": 9.0})
    half = prior_pictures(tiny_base, other, tmp_path / "half", quiet=True)
    for one, two in zip(whole["dog"], half["dog"], strict=True):
        assert one.image.tobytes() == two.image.tobytes()
