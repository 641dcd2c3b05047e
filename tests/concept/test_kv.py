from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from cdvideo.base.loader import Base
from cdvideo.concept.kv import attached, initial_rows, kv_projections, zero_deltas


def predict(unet: UNet2DConditionModel, text_BLD: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    return unet(latents, torch.tensor([10, 700]), text_BLD).sample


@pytest.fixture
def text_BLD() -> torch.Tensor:
    return torch.randn(2, 6, 32)


def test_every_cross_attention_has_a_k_and_a_v(tiny_unet: UNet2DConditionModel) -> None:
    cross = [name for name, _ in tiny_unet.named_modules() if name.endswith(".attn2")]
    assert len(cross) == 4  # one in the outer down block, one in the middle, two in the outer up block
    assert set(kv_projections(tiny_unet)) == {
        f"unet.{name}.{part}.delta" for name in cross for part in ("to_k", "to_v")
    }


def test_a_new_adapter_leaves_the_output_bit_equal(tiny_unet: UNet2DConditionModel, text_BLD: torch.Tensor) -> None:
    before = predict(tiny_unet, text_BLD)
    with attached(tiny_unet, zero_deltas(tiny_unet)):
        assert torch.equal(predict(tiny_unet, text_BLD), before)


def test_attach_acts_as_the_summed_weight_and_detach_is_exact(
    tiny_unet: UNet2DConditionModel, text_BLD: torch.Tensor
) -> None:
    before = predict(tiny_unet, text_BLD)
    weights = {name: value.clone() for name, value in tiny_unet.state_dict().items()}
    deltas = {name: 0.3 * torch.randn_like(delta) for name, delta in zero_deltas(tiny_unet).items()}
    with attached(tiny_unet, deltas):
        tuned = predict(tiny_unet, text_BLD)
    assert (tuned - before).abs().max() > 1e-3
    assert torch.equal(predict(tiny_unet, text_BLD), before)
    assert all(torch.equal(value, weights[name]) for name, value in tiny_unet.state_dict().items())
    with torch.no_grad():
        for name, linear in kv_projections(tiny_unet).items():
            linear.weight += deltas[name]
    torch.testing.assert_close(predict(tiny_unet, text_BLD), tuned, rtol=1e-4, atol=1e-5)


def test_the_adapter_is_detached_after_an_error(tiny_unet: UNet2DConditionModel, text_BLD: torch.Tensor) -> None:
    before = predict(tiny_unet, text_BLD)
    deltas = {name: delta.detach() + 1 for name, delta in zero_deltas(tiny_unet).items()}
    with pytest.raises(KeyboardInterrupt), attached(tiny_unet, deltas):
        raise KeyboardInterrupt
    assert torch.equal(predict(tiny_unet, text_BLD), before)


def test_an_unknown_name_is_refused(tiny_unet: UNet2DConditionModel) -> None:
    with (
        pytest.raises(AssertionError, match=r"no_such\.attn2"),
        attached(tiny_unet, {"unet.no_such.attn2": torch.ones(1)}),
    ):
        pass


def test_gradients_reach_every_delta_and_nothing_else(tiny_base: Base, text_BLD: torch.Tensor) -> None:
    deltas = zero_deltas(tiny_base.unet)
    with attached(tiny_base.unet, deltas):
        predict(tiny_base.unet, text_BLD).square().mean().backward()
    assert all(delta.grad is not None for delta in deltas.values())
    assert all(delta.grad.norm() > 0 for name, delta in deltas.items() if "to_v" in name and delta.grad is not None)
    assert all(parameter.grad is None for parameter in tiny_base.unet.parameters())


def test_no_gradient_passes_through_the_first_token(tiny_base: Base, text_BLD: torch.Tensor) -> None:
    text_BLD[:, 1:] = 0  # all that is left to learn from is the first token
    deltas = zero_deltas(tiny_base.unet)
    with attached(tiny_base.unet, deltas):
        predict(tiny_base.unet, text_BLD).square().mean().backward()
    assert all(delta.grad is not None and not delta.grad.any() for delta in deltas.values())


def test_gradient_checkpointing_gives_the_same_gradients(tiny_base: Base, text_BLD: torch.Tensor) -> None:
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            tiny_base.unet.enable_gradient_checkpointing()
        deltas = {name: (d + 0.1).detach().requires_grad_() for name, d in zero_deltas(tiny_base.unet).items()}
        with attached(tiny_base.unet, deltas):
            predict(tiny_base.unet, text_BLD).square().mean().backward()
        grads.append([delta.grad for delta in deltas.values()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_rows_start_at_the_mean_of_the_words(tiny_base: Base) -> None:
    table = tiny_base.text_encoder.get_input_embeddings().weight
    ids = tiny_base.tokenizer("stuffed animal", add_special_tokens=False).input_ids
    rows_KD = initial_rows(tiny_base, "stuffed animal", 2)
    assert len(ids) == 2 and rows_KD.shape == (2, 32) and rows_KD.requires_grad and rows_KD.is_leaf
    for row in rows_KD:
        torch.testing.assert_close(row.detach(), table[ids].mean(dim=0))
