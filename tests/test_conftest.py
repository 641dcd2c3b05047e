"""The tiny models are what the other tests take them for."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTokenizer

from cdvideo.base.loader import Base


def test_known_words_are_one_token_and_any_text_tokenises(tiny_tokenizer: CLIPTokenizer) -> None:
    known = tiny_tokenizer("a dog wearing headphones surfing", add_special_tokens=False).input_ids
    assert len(known) == 5
    assert len(set(known)) == 5
    unknown = tiny_tokenizer("sks, naïve 狗!", add_special_tokens=False).input_ids
    assert len(unknown) > 5
    assert tiny_tokenizer.unk_token_id not in unknown


def test_models_are_the_same_each_time(tiny_unet: UNet2DConditionModel, tiny_base: Base) -> None:
    loaded = tiny_base.unet.state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in tiny_unet.state_dict().items())


def test_parts_fit_together(tiny_base: Base) -> None:
    ids_BL = tiny_base.tokenizer("a dog", padding="max_length", return_tensors="pt").input_ids
    text_BLD = tiny_base.text_encoder(ids_BL).last_hidden_state
    pixels_BCHW = torch.rand(1, 3, tiny_base.resolution, tiny_base.resolution)
    latents_BCHW = tiny_base.vae.encode(pixels_BCHW).latents
    predicted_BCHW = tiny_base.unet(latents_BCHW, 10, encoder_hidden_states=text_BLD).sample
    assert latents_BCHW.shape == predicted_BCHW.shape == (1, 4, 8, 8)
    assert tiny_base.vae.decode(predicted_BCHW).sample.shape == pixels_BCHW.shape


def test_text_changes_the_prediction(tiny_base: Base) -> None:
    latents_BCHW = torch.randn(1, 4, 8, 8)
    one, other = (
        tiny_base.unet(latents_BCHW, 10, encoder_hidden_states=torch.randn(1, 4, 32)).sample for _ in range(2)
    )
    assert not torch.allclose(one, other)


def test_sockets_are_blocked() -> None:
    import socket

    from pytest_socket import SocketBlockedError

    with pytest.warns(UserWarning, match="socket"), pytest.raises(SocketBlockedError):
        socket.socket(socket.AF_INET, socket.SOCK_STREAM)
