"""Embeddings as web UIs, diffusers, OneTrainer, Replicate and torch of all ages write them."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cdvideo.base.loader import Base
from cdvideo.base.text import find_tokens, tokenize
from cdvideo.errors import UserError
from cdvideo.interchange.inspect import describe
from cdvideo.interchange.write import Export, write_textual_inversion
from cdvideo.sampling.animate import _choose_concept
from cdvideo.sampling.config import AnimateConfig
from cdvideo.sampling.foreign_syntax import foreign_syntax
from tests.interchange.parts import changes_of, load, random
from tests.sdxl import WIDTHS

STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
LORA = {f"{STEM}.lora_down.weight": random(2, 32), f"{STEM}.lora_up.weight": random(32, 2)}


class OnAMac:
    """A row as torch 1.12 pickled it from a Mac's GPU: an array of NumPy."""

    def __init__(self, row: Tensor) -> None:
        self.row = row

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_device_tensor_from_numpy, (self.row.numpy(), self.row.dtype, "cpu", True)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("form", ["before 1.12", "1.12", "1.12 on a Mac"])
def test_parameter_dicts_of_all_ages(tiny_base: Base, tmp_path: Path, form: str) -> None:
    rows, row = nn.ParameterDict(), random(1, 32)
    value: Any = OnAMac(row) if form.endswith("Mac") else nn.Parameter(row)
    vars(rows)["_parameters"] = collections.OrderedDict({"*": value})
    vars(rows).pop("_keys", None)
    if form != "before 1.12":
        vars(rows)["_keys"] = {"*": None}
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": rows}, tmp_path / "embeddings.pt")
    concept = load(tiny_base, tmp_path / "embeddings.pt")
    assert concept.tokens.keys() == {"embeddings"} and torch.equal(concept.tokens["embeddings"], row)


def test_arrays_are_read_by_either_name_of_numpys_core(tiny_base: Base, tmp_path: Path) -> None:
    torch.save({"sks": OnAMac(random(1, 32))}, tmp_path / "new.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "new.pt").read_bytes()
    old, new = b"numpy.core.multiarray", b"numpy._core.multiarray"
    assert (new in data) != (old in data)
    other = data.replace(b"c" + new + b"\n", b"c" + old + b"\n") if new in data else data.replace(old, new)
    (tmp_path / "old.pt").write_bytes(other)
    for name in ("old", "new"):
        assert torch.equal(load(tiny_base, tmp_path / f"{name}.pt").tokens["sks"], random(1, 32))
    assert np.__version__


def web_ui(rows: dict[str, Tensor], name: str | None = None) -> dict[str, Any]:
    content: dict[str, Any] = {"string_to_token": dict.fromkeys(rows, 265), "string_to_param": rows, "step": 500}
    return content if name is None else {**content, "name": name}


def test_the_files_name_and_the_one_inside(tiny_base: Base, tmp_path: Path) -> None:
    """Web UIs take the file's name for the word, diffusers the one inside: here both are words for the same."""
    torch.save(web_ui({"*": random(2, 32)}, "badhandv3"), tmp_path / "badhandv4.pt")
    concept = load(tiny_base, tmp_path / "badhandv4.pt")
    assert concept.tokens.keys() == {"badhandv3", "badhandv4"}
    assert all(torch.equal(rows, random(2, 32)) for rows in concept.tokens.values())
    assert "  words: badhandv3 (2 rows), badhandv4 (2 rows)" in describe(tmp_path / "badhandv4.pt")
    torch.save(web_ui({"*": random(2, 32)}, "Same"), tmp_path / "same.pt")
    assert load(tiny_base, tmp_path / "same.pt").tokens.keys() == {"Same"}


def test_several_terms_in_one_file(tiny_base: Base, tmp_path: Path) -> None:
    torch.save(web_ui({"*": random(1, 32), "<b>": random(2, 32)}, "pair"), tmp_path / "pair.pt")
    tokens = load(tiny_base, tmp_path / "pair.pt").tokens
    assert {word: tuple(rows.shape) for word, rows in tokens.items()} == {"pair": (1, 32), "<b>": (2, 32)}


@pytest.mark.parametrize("content", [web_ui({}), web_ui({}, "hollow"), {"string_to_param": None}])
def test_hollow_ones_are_refused(tiny_base: Base, tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / "hollow.pt")
    with pytest.raises(UserError, match="changes nothing: it holds no rows"):
        load(tiny_base, tmp_path / "hollow.pt")


@pytest.mark.parametrize("word", ["<style-v1.5>", "dog.v2", "a b"])
def test_words_with_dots(tiny_base: Base, tmp_path: Path, word: str) -> None:
    torch.save({word: random(1, 32)}, tmp_path / "a.bin")
    assert torch.equal(load(tiny_base, tmp_path / "a.bin").tokens[word], random(1, 32))


@pytest.mark.parametrize(
    ("shape", "said"),
    [((1, 77, 32), "a prompt that was encoded"), ((1, 3, 8, 8), "a picture's pixels"), ((76, 32), "without a name")],
)
def test_bare_tensors_that_are_no_rows(tiny_base: Base, tmp_path: Path, shape: tuple[int, ...], said: str) -> None:
    torch.save(random(*shape), tmp_path / "cat.pt")
    with pytest.raises(UserError, match=said):
        load(tiny_base, tmp_path / "cat.pt")


@pytest.mark.parametrize(
    ("key", "word"), [("my token.emb_params", "my token"), ("v1.5.string_to_param.*", "v1.5"), ("dog.clip_l", "dog")]
)
def test_embeddings_within_a_lora(tiny_base: Base, tmp_path: Path, key: str, word: str) -> None:
    save_file({**LORA, f"bundle_emb.{key}": random(2, 32)}, tmp_path / "a.safetensors")
    concept = load(tiny_base, tmp_path / "a.safetensors")
    assert torch.equal(concept.tokens[word], random(2, 32)) and len(changes_of(tiny_base, concept)) == 1


def test_embeddings_within_a_lora_of_sdxl(tiny_sdxl: Base, tmp_path: Path) -> None:
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    lora = {f"{stem}.lora_down.weight": random(2, 64), f"{stem}.lora_up.weight": random(64, 2)}
    rows = {
        f"bundle_emb.my token.{name}": random(2, width)
        for name, width in zip(("clip_l", "clip_g"), WIDTHS, strict=True)
    }
    save_file({**lora, **rows}, tmp_path / "a.safetensors")
    concept = load(tiny_sdxl, tmp_path / "a.safetensors")
    assert torch.equal(concept.tokens["my token"], torch.cat(list(rows.values()), dim=1))
    save_file({**lora, "bundle_emb.x.clip_l": random(2, WIDTHS[0])}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"rows for its text encoders \(clip_l\)"):
        load(tiny_sdxl, tmp_path / "a.safetensors")


def halves(rows: int = 1) -> list[Tensor]:
    return [random(rows, width) for width in WIDTHS]


@pytest.mark.parametrize("steps", ["", "-steps-500"])
def test_two_files_of_sdxl(tiny_sdxl: Base, tiny_base: Base, tmp_path: Path, steps: str) -> None:
    """diffusers' textual_inversion_sdxl.py: learned_embeds and learned_embeds_2, of the folder or of the first file."""
    for name, rows in zip(("learned_embeds", "learned_embeds_2"), halves(), strict=True):
        save_file({"<cat>": rows}, tmp_path / f"{name}{steps}.safetensors")
    for path in (tmp_path, tmp_path / f"learned_embeds{steps}.safetensors"):
        assert torch.equal(load(tiny_sdxl, path).tokens["<cat>"], torch.cat(halves(), dim=1))
        with pytest.raises(UserError, match="was made for SDXL"):
            load(tiny_base, path)
    with pytest.raises(UserError, match="it is one half, of one of SDXL's two text encoders"):
        load(tiny_sdxl, tmp_path / f"learned_embeds_2{steps}.safetensors")


def test_replicates_rows(tiny_sdxl: Base, tmp_path: Path) -> None:
    first, second = halves(2)
    save_file({"text_encoders_0": first, "text_encoders_1": second}, tmp_path / "embeddings.pti")
    joined = torch.cat([first, second], dim=1)
    tokens = load(tiny_sdxl, tmp_path / "embeddings.pti").tokens
    assert tokens.keys() == {"<s0>", "<s1>"} and torch.equal(torch.cat(list(tokens.values())), joined)
    (tmp_path / "special_params.json").write_text(json.dumps({"TOK": "<s0><s1>"}))
    assert torch.equal(load(tiny_sdxl, tmp_path).tokens["TOK"], joined)


def test_rows_of_two_lengths_and_halves(tiny_sdxl: Base, tmp_path: Path) -> None:
    save_file({"clip_l": random(3, WIDTHS[0]), "clip_g": random(2, WIDTHS[1])}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="3 rows for one text encoder and 2 for the other"):
        load(tiny_sdxl, tmp_path / "a.safetensors")
    save_file({"emb": random(768), "emb2": random(1280)}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"oss-roettger's notebook[\s\S]*save emb as clip_l"):
        load(tiny_sdxl, tmp_path / "b.safetensors")
    torch.save([{"emb": random(768), "emb2": random(1280)}] * 2, tmp_path / "c.pt")
    with pytest.raises(UserError, match="a list of embeddings for SDXL"):
        load(tiny_sdxl, tmp_path / "c.pt")


@pytest.mark.parametrize(
    ("prompt", "negative", "warned"),
    [
        ("a dog", "badhand, blurry", False),
        ("a Badhand", "", False),
        ("a dog", "other", False),
        ("a dog", "blurry", True),
    ],
)
def test_a_word_in_the_negative_prompt(
    tiny_base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture, prompt: str, negative: str, warned: bool
) -> None:
    torch.save(web_ui({"*": random(2, 32)}, "other"), tmp_path / "badhand.pt")
    config = AnimateConfig(prompt=prompt, negative_prompt=negative, concept=str(tmp_path / "badhand.pt"), quiet=True)
    _choose_concept(config, tiny_base)
    said = "the prompt lacks the concept's token (other or badhand)" in caplog.text
    assert said == warned


def test_a_letter_that_only_capitals_make_alike(tiny_base: Base) -> None:
    """`re` takes the long s, and the Kelvin sign, for s and k."""
    assert find_tokens("a ſks dog, a s\u212as cat", ["sks"]) == ["sks", "sks"]
    assert [slot.token for slot in tokenize(tiny_base.tokenizer, ["a ſks dog"], tokens={"sks": 1}).slots] == ["sks"]


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a (red:1.3) dog", "(red:1.3)"),
        ("<lora:my dog:0.8> a dog", "<lora:my dog:0.8>"),
        ("embedding:EasyNegative, blurry", "embedding:EasyNegative,"),
        ("a [cat:dog:0.5]", "[cat:dog:0.5]"),
        ("a dog (16:9), [note], <cat-toy>, time 12:30", None),
    ],
)
def test_what_prompts_of_web_uis_hold(prompt: str, found: str | None) -> None:
    said = foreign_syntax(["", prompt])
    assert [line.partition(" in the prompt")[0] for line in said] == ([found] if found else [])
    assert len(foreign_syntax(["(a:1.2) <lora:x:1>", "(b:2.0)"])) == 2


def test_names_that_are_no_names_on_windows_keep_their_word(tiny_sdxl: Base, tmp_path: Path) -> None:
    """SDXL's rows stand in a file without their word."""
    save_file(dict(zip(("clip_l", "clip_g"), halves(), strict=True)), tmp_path / "<cat>.safetensors")
    said: list[str] = []
    write_textual_inversion(
        Export(tiny_sdxl, load(tiny_sdxl, tmp_path / "<cat>.safetensors"), tmp_path, "a", None, said.append)
    )
    assert said[0].startswith("the file of <cat> is called cat")
    assert load(tiny_sdxl, tmp_path / "cat.safetensors").tokens.keys() == {"<cat>"}
