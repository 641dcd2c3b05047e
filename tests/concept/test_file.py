from __future__ import annotations

import base64
import dataclasses
import io
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from cdvideo.base.loader import Base
from cdvideo.concept import file as concept_file
from cdvideo.concept.adapters import make_adapter
from cdvideo.concept.concept import Concept, public_base_name
from cdvideo.concept.config import AdapterConfig, ConceptConfig
from cdvideo.concept.file import (
    PREVIEW_BYTES,
    find_concept,
    frozen_copy,
    load_concept,
    png_preview,
    read_metadata,
    save_concept,
)
from cdvideo.concept.trainer import new_concept
from cdvideo.errors import UserError


@pytest.fixture
def concept(tiny_base: Base, config: ConceptConfig) -> Concept:
    """Of K and V, whose few names can be told."""
    config = dataclasses.replace(config, adapter=AdapterConfig(kind="kv"))
    learned = new_concept(tiny_base, config, make_adapter(tiny_base.unet, config.adapter, seed=0))
    with torch.no_grad():
        for delta in learned.weights.values():
            delta += 0.01 * torch.randn_like(delta)
    return frozen_copy(learned)


def test_save_then_load_is_bit_equal(tmp_path: Path, concept: Concept, tiny_base: Base) -> None:
    save_concept(concept, tmp_path / "a.safetensors")
    loaded = load_concept(tmp_path / "a.safetensors", base=tiny_base)
    assert loaded.metadata == concept.metadata
    assert loaded.tokens.keys() == concept.tokens.keys() and loaded.weights.keys() == concept.weights.keys()
    for name, tensor in {**concept.tokens, **concept.weights}.items():
        read = {**loaded.tokens, **loaded.weights}[name]
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)
    save_concept(loaded, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_file_names_its_tensors_and_no_folder(tmp_path: Path, concept: Concept, tiny_base: Base) -> None:
    save_concept(concept, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        names, header = set(file.keys()), json.loads(file.metadata()["concept"])
    assert "tokens.sks" in names and "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.delta" in names
    assert header["base_name"] == tiny_base.path.name and header["base_hash"] == tiny_base.hash
    assert header["class_words"] == {"sks": "dog"} and header["prediction_type"] == "v_prediction"
    assert str(tiny_base.path.parent) not in json.dumps(header) and "/" not in header["base_name"]


def test_a_base_is_named_without_its_folder(tmp_path: Path) -> None:
    (tmp_path / "sd15").mkdir()
    assert public_base_name(f"{tmp_path}/sd15/") == "sd15"
    assert public_base_name("tiny") == "tiny"
    assert public_base_name("someone/model") == "someone/model"


def test_values_that_are_not_finite_are_never_written(tmp_path: Path, concept: Concept) -> None:
    save_concept(concept, tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    next(iter(concept.weights.values()))[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        save_concept(concept, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_concept_may_be_read_by_whom_any_new_file_may_be(tmp_path: Path, concept: Concept) -> None:
    save_concept(concept, tmp_path / "a.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_loading_reports_the_match(
    tmp_path: Path, concept: Concept, tiny_base: Base, caplog: pytest.LogCaptureFixture
) -> None:
    save_concept(concept, tmp_path / "a.safetensors")
    with caplog.at_level(logging.INFO, logger="cdvideo"):
        load_concept(tmp_path / "a.safetensors", base=tiny_base)
    assert f'concept {tmp_path / "a.safetensors"}: "sks dog", matched 9/9' in caplog.messages
    caplog.clear()
    tiny_base.hash = "0" * 16
    load_concept(tmp_path / "a.safetensors", base=tiny_base)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "other weights" in record.message and "\n" not in record.message


def test_a_concept_for_another_base_is_refused(tmp_path: Path, concept: Concept, tiny_base: Base) -> None:
    name = next(iter(concept.weights))
    for changed in ({name: torch.zeros(3, 3)}, {"unet.no.such.attn2.to_k.delta": concept.weights[name].clone()}):
        save_concept(
            dataclasses.replace(concept, weights={**concept.weights, **changed}), tmp_path / "other.safetensors"
        )
        with pytest.raises(UserError, match=r"matched 8/9|matched 9/10") as caught:
            load_concept(tmp_path / "other.safetensors", base=tiny_base)
        assert "allowed:" in str(caught.value) and "--base" in str(caught.value)
    save_concept(dataclasses.replace(concept, tokens={"sks": torch.zeros(1, 7)}), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no place for sks"):
        load_concept(tmp_path / "other.safetensors", base=tiny_base)


def test_a_concept_without_tensors_is_refused(tmp_path: Path, concept: Concept) -> None:
    for empty in (dataclasses.replace(concept, weights={}), dataclasses.replace(concept, tokens={})):
        save_concept(empty, tmp_path / "empty.safetensors")
        with pytest.raises(UserError, match="holds"):
            load_concept(tmp_path / "empty.safetensors")


def test_damaged_and_foreign_files_are_refused(tmp_path: Path, concept: Concept) -> None:
    whole, path = tmp_path / "whole.safetensors", tmp_path / "a.safetensors"
    save_concept(concept, whole)
    for size in (0, 5, 300, whole.stat().st_size - 1):
        path.write_bytes(whole.read_bytes()[:size])
        with pytest.raises(UserError, match="damaged"):
            load_concept(path)
    save_file({"lora": torch.ones(1)}, path)
    with pytest.raises(UserError, match="no concept"):
        load_concept(path)
    save_concept(dataclasses.replace(concept, metadata=dataclasses.replace(concept.metadata, format_version=99)), path)
    with pytest.raises(UserError, match="format version 99"):
        load_concept(path)
    with pytest.raises(UserError, match="there is no concept file"):
        load_concept(tmp_path / "missing.safetensors")


def test_the_preview_is_a_small_png() -> None:
    noise = Image.effect_noise((256, 256), 120).convert("RGB")  # what compresses worst
    png = base64.b64decode(png_preview(noise))
    assert len(png) <= PREVIEW_BYTES
    assert Image.open(io.BytesIO(png)).format == "PNG"


def test_the_newest_concept_whose_token_is_in_the_prompt_is_found(
    tmp_path: Path, concept: Concept, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def put(run: str, token: str, age: float) -> Path:
        path = tmp_path / run / "concept.safetensors"
        metadata = dataclasses.replace(concept.metadata, class_words={token: "dog"})
        save_concept(Concept(tokens={token: concept.tokens["sks"]}, weights=concept.weights, metadata=metadata), path)
        os.utime(path, (time.time() - age, time.time() - age))
        return path

    own = concept.metadata.base_hash
    monkeypatch.setattr(concept_file, "SAMPLE_CONCEPT", tmp_path / "none.safetensors")
    assert find_concept("a sks dog surfing", tmp_path, base_hash=own) is None
    old, new, other = put("old", "sks", 90), put("new", "sks", 50), put("other", "rex", 10)
    assert find_concept("a sks dog surfing", tmp_path, base_hash=own) == new
    assert find_concept("a REX dog surfing", tmp_path, base_hash=own) == other
    assert find_concept("a sksy dog", tmp_path, base_hash=own) is None
    new.write_bytes(b"broken")
    assert find_concept("a sks dog", tmp_path, base_hash=own) == old
    assert "passed over" in caplog.text

    monkeypatch.setattr(
        concept_file, "SAMPLE_CONCEPT", put("shipped", "zzz", 0).rename(tmp_path / "sample.safetensors")
    )
    assert find_concept("a zzz dog", tmp_path, base_hash=own) == tmp_path / "sample.safetensors"
    assert read_metadata(tmp_path / "sample.safetensors").class_words == {"zzz": "dog"}

    caplog.clear()
    assert find_concept("a zzz dog", tmp_path, base_hash="another") is None and "other weights" not in caplog.text
    assert find_concept("a sks dog", tmp_path, base_hash="another") is None
    assert "old/concept.safetensors, learned on a base with other weights" in caplog.text


def with_header(concept: Concept, path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in concept.weights.items()}, path, metadata={"concept": text})
    return path


def header_of(concept: Concept, **changes: object) -> str:
    return json.dumps({**dataclasses.asdict(concept.metadata), **changes})


HEADERS: dict[str, Any] = {
    "no JSON": lambda concept: "{sks",
    "a list": lambda concept: "[1, 2]",
    "a number": lambda concept: "3",
    "too deep": lambda concept: "[" * 100_000,
    "class words in a list": lambda concept: header_of(concept, class_words=["sks"]),
    "a number for a class word": lambda concept: header_of(concept, class_words={"sks": 3}),
    "text for steps": lambda concept: header_of(concept, steps="many"),
    "no settings": lambda concept: header_of(concept, adapter_settings=None),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_is_none_is_told_and_passed_over(
    tmp_path: Path, concept: Concept, kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One such file among the runs must not stop every film."""
    monkeypatch.setattr(concept_file, "SAMPLE_CONCEPT", tmp_path / "none.safetensors")
    good = tmp_path / "good" / "concept.safetensors"
    save_concept(concept, good)
    os.utime(good, (0, 0))
    bad = with_header(concept, tmp_path / "bad" / "concept.safetensors", HEADERS[kind](concept))
    with pytest.raises(UserError, match=r"bad/concept\.safetensors"):
        load_concept(bad)
    assert find_concept("a sks dog", tmp_path, base_hash=concept.metadata.base_hash) == good
    assert "passed over" in caplog.text and "bad/concept.safetensors" in caplog.text


def test_whole_numbers_are_numbers_too(tmp_path: Path, concept: Concept) -> None:
    path = with_header(concept, tmp_path / "a.safetensors", header_of(concept, lr=1, adapter_settings={"rank": 4}))
    assert read_metadata(path).lr == 1
