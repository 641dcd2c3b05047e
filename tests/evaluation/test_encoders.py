"""Conventions of the encoders, on tiny random models of the real classes, against what transformers says itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertTokenizerFast,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    BlipConfig,
    BlipForImageTextRetrieval,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    ViTConfig,
    ViTModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from cdvideo.errors import UserError
from cdvideo.evaluation.encoders import BlipScorer, ClipEncoder, DinoEncoder, IdentityEncoder, JudgeEncoder
from cdvideo.evaluation.identity.model import IdentityNet, save_identity
from cdvideo.evaluation.judge.model import Judge

CPU = torch.device("cpu")
SIDE = 32
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "cat", "surfing"]
TEXTS = ["a dog surfing", "a cat", "a dog", "cat", "a cat surfing"]


@pytest.fixture
def images_BHWC() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 48, 48, 3), dtype=np.uint8)


def write_preprocessing(folder: Path, kind: str) -> None:
    facts = {
        "image_processor_type": kind,
        "do_resize": True, "do_center_crop": False, "do_rescale": True, "do_normalize": True,
        "size": {"height": SIDE, "width": SIDE}, "resample": 3, "rescale_factor": 1 / 255,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(facts))


def write_bert_words(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)


@pytest.fixture
def clip_folder(tmp_path: Path, tiny_tokenizer: CLIPTokenizer) -> Path:
    text = TINY | {"vocab_size": len(tiny_tokenizer), "max_position_embeddings": 24}
    text |= {"eos_token_id": tiny_tokenizer.eos_token_id, "bos_token_id": tiny_tokenizer.bos_token_id}
    vision = TINY | {"image_size": SIDE, "patch_size": 8}
    folder = tmp_path / "tiny-clip"
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    write_preprocessing(folder, "CLIPImageProcessor")
    return folder


def test_clip_cosines_are_those_of_the_model(clip_folder: Path, images_BHWC: np.ndarray) -> None:
    clip = ClipEncoder(clip_folder, device=CPU)
    images_BD = clip.images(images_BHWC)
    assert images_BD.shape == (5, 12)
    assert np.allclose(np.linalg.norm(images_BD, axis=1), 1, atol=1e-5)

    pixels = clip.prepare(images=list(images_BHWC), return_tensors="pt")
    tokens = clip.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = clip.model(**pixels, **tokens)
    cosine_BB = theirs.logits_per_image / clip.model.logit_scale.exp().detach()
    assert np.allclose(clip.agree(images_BHWC, TEXTS), cosine_BB.diagonal().numpy(), atol=1e-5)


def test_clip_texts_do_not_depend_on_their_padding(clip_folder: Path) -> None:
    clip = ClipEncoder(clip_folder, device=CPU)
    together = clip.texts(["a dog", "a photo of the dog wearing headphones surfing"])
    assert np.allclose(together[:1], clip.texts(["a dog"]), atol=1e-5)


@pytest.mark.parametrize("bare", [True, False])
def test_clip_takes_features_of_every_version_of_transformers(
    clip_folder: Path, images_BHWC: np.ndarray, monkeypatch: pytest.MonkeyPatch, bare: bool
) -> None:
    clip = ClipEncoder(clip_folder, device=CPU)
    wanted = clip.agree(images_BHWC, TEXTS)

    def given(get: Callable[..., Any]) -> Callable[..., Any]:
        def features(**inputs: Any) -> Any:
            found = get(**inputs)
            features_BD = getattr(found, "pooler_output", found)
            return features_BD if bare else BaseModelOutputWithPooling(pooler_output=features_BD)

        return features

    for name in ("get_image_features", "get_text_features"):
        monkeypatch.setattr(clip.model, name, given(getattr(clip.model, name)))
    assert np.array_equal(clip.agree(images_BHWC, TEXTS), wanted)


def test_dino_is_the_class_token(tmp_path: Path, images_BHWC: np.ndarray) -> None:
    folder = tmp_path / "tiny-dino"
    ViTModel(ViTConfig(**TINY, image_size=SIDE, patch_size=8), add_pooling_layer=False).save_pretrained(folder)
    write_preprocessing(folder, "ViTImageProcessor")
    dino = DinoEncoder(folder, device=CPU)
    features_BD = dino.images(images_BHWC)
    pixels = dino.prepare(images=list(images_BHWC), return_tensors="pt")
    with torch.no_grad():
        token_BD = dino.model(**pixels).last_hidden_state[:, 0]
    assert np.allclose(features_BD, torch.nn.functional.normalize(token_BD, dim=1).numpy(), atol=1e-5)
    assert dino.name.startswith("DINO tiny-dino ")


def tiny_blip() -> BlipForImageTextRetrieval:
    text = TINY | {"vocab_size": len(WORDS), "max_position_embeddings": 16, "encoder_hidden_size": 16}
    vision = TINY | {"image_size": SIDE, "patch_size": 8}
    return BlipForImageTextRetrieval(BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=8))


def tiny_blip2() -> Blip2ForImageTextRetrieval:
    qformer = TINY | {"vocab_size": len(WORDS), "encoder_hidden_size": 16, "use_qformer_text_input": True}
    qformer |= {"max_position_embeddings": 16}
    vision = TINY | {"image_size": SIDE, "patch_size": 8}
    text = TINY | {"model_type": "opt", "vocab_size": 8, "ffn_dim": 32, "word_embed_proj_dim": 16}
    config = Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=3, image_text_hidden_size=8,
        image_token_index=7,
    )  # fmt: skip
    model = Blip2ForImageTextRetrieval(config)
    torch.nn.init.normal_(model.query_tokens)
    return model


@pytest.mark.parametrize("second", [False, True])
def test_blip_scores_each_picture_beside_its_own_text(tmp_path: Path, images_BHWC: np.ndarray, second: bool) -> None:
    folder = tmp_path / "tiny-blip"
    (tiny_blip2() if second else tiny_blip()).save_pretrained(folder)
    write_bert_words(folder)
    write_preprocessing(folder, "BlipImageProcessor")
    blip = BlipScorer(folder, device=CPU)
    scores_B = blip.agree(images_BHWC, TEXTS)
    alone_B = [blip.agree(images_BHWC[b : b + 1], TEXTS[b : b + 1])[0] for b in range(5)]
    assert np.allclose(scores_B, alone_B, atol=1e-5)
    assert abs(scores_B[0] - blip.agree(images_BHWC[:1], ["cat"])[0]) > 1e-4
    assert np.ptp(scores_B) > 1e-4
    assert (np.abs(scores_B) <= 1 + 1e-5).all()
    assert blip.name.startswith("BLIP-2 " if second else "BLIP tiny-blip ")


def test_a_model_of_another_kind_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a model of type 'clip'"):
        DinoEncoder(clip_folder, device=CPU)
    with pytest.raises(UserError, match="no model"):
        ClipEncoder(tmp_path / "nothing", device=CPU)


def test_the_worlds_own_encoders_give_unit_features(tmp_path: Path, images_BHWC: np.ndarray) -> None:
    net = IdentityNet(widths=(4, 4, 8, 8), blocks=(0, 0, 0, 0), width=6, side=32)
    save_identity(net, tmp_path)
    identity = IdentityEncoder(tmp_path, device=CPU)
    judge = JudgeEncoder(Judge(widths=(4, 4, 8, 8), blocks=(0, 0, 0, 0), side=32).eval())
    for encoder, width in ((identity, 6), (judge, 8)):
        features_BD = encoder.images(images_BHWC)
        assert features_BD.shape == (5, width)
        assert np.allclose(np.linalg.norm(features_BD, axis=1), 1, atol=1e-5)
    net.feature_head.bias.data += 1
    save_identity(net, tmp_path)
    assert IdentityEncoder(tmp_path, device=CPU).name != identity.name
