"""YAML files, key=value settings, prompts and curves: whatever stands in them, it is read or told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from cdvideo.base.loader import Base
from cdvideo.base.prompts import encode_prompts
from cdvideo.base.text import find_tokens, tokenize
from cdvideo.concept.config import ConceptConfig
from cdvideo.config import load_config, setting_names, to_yaml
from cdvideo.interchange.config import ConvertConfig
from cdvideo.sampling.config import AnimateConfig
from cdvideo.sampling.keyframes import parse_curve, parse_prompts
from tests.fuzz.hostile import BYTE_EDITS, NUMBERS, TEXTS, VALUES, as_json, damaged, put
from tests.fuzz.watch import Watch

CONFIGS: list[Any] = [ConceptConfig, AnimateConfig, ConvertConfig]
NAMES = sorted({name for cls in CONFIGS for name in setting_names(cls)})
TAGS = "bool int float timestamp binary map seq set omap pairs null str python/none".split()
ATOMS = "~ yes 1:30 1_000 0o17 0b1 .nan -.inf 2024-02-31 2024-01-01T99:00:00Z [ ] { } &a *a # ' = @ !x".split()
ATOMS += ['"', "? ", "- ", "<<: ", "|\n", ">-\n  ", "%YAML 9.9\n", "---\n", "...\n", "\t"]
YAML_TEXTS = st.lists(
    st.one_of(
        st.sampled_from(NAMES).map(lambda name: f"\n{name}: "),
        st.sampled_from(NAMES).map(lambda name: f"\n{name.replace('.', ': {', 1)}: "),
        st.sampled_from(TAGS).map(lambda tag: f"!!{tag} "),
        st.sampled_from(ATOMS),
        VALUES.map(as_json),
        TEXTS,
    ),
    max_size=12,
).map("".join)

PLAIN = ["0: 0.5", "15: 1.2", "0%: 0.2", "40%: 1", "0: a sks dog surfing", "24: a sks dog", "", "٣: ٤", "²: 1"]
COLONS = st.sampled_from([": ", ":", " : ", "%: ", "%:"])
ENTRIES = st.lists(
    st.one_of(
        st.builds("{}{}{}".format, NUMBERS, COLONS, st.one_of(NUMBERS, TEXTS)),
        TEXTS,
        st.sampled_from(PLAIN),
    ),
    max_size=6,
)
BARS = st.sampled_from([" | ", "|", "\n", "\r\n", ","])
CURVES = st.one_of(st.builds(lambda entries, bar: bar.join(entries), ENTRIES, BARS), NUMBERS)
WORDS = "a sks dog SKS ſks (dog:1.2) <lora:x:0.8> embedding:x [a|b] BREAK <|endoftext|> 🐕".split()
PROMPTS = st.one_of(
    CURVES.map(str),
    st.lists(st.one_of(st.sampled_from(WORDS), TEXTS), max_size=8).map(" ".join),
    st.sampled_from(WORDS).map(lambda word: f"{word} " * 20_000),
)


def whole_yaml(cls: Any) -> bytes:
    given = {AnimateConfig: ["prompt=a sks dog"], ConvertConfig: ["file=x", "to=kohya"]}
    return to_yaml(load_config(cls, overrides=given.get(cls, ["token=sks", "class_word=dog", "images=x"]))).encode()


@pytest.mark.parametrize("cls", CONFIGS)
def test_yaml(watch: Watch, cls: Any) -> None:
    file, whole = watch.room / "here" / "settings.yaml", whole_yaml(cls)
    put(file, whole)
    watch.accept(lambda: load_config(cls, file=file))
    contents: SearchStrategy[Any] = st.one_of(
        BYTE_EDITS.map(lambda edits: damaged(whole, edits)),
        st.dictionaries(st.one_of(st.sampled_from([*setting_names(cls)]), TEXTS), VALUES).map(as_json),
        YAML_TEXTS,
        st.binary(max_size=200),
    )

    def read(content: Any) -> Callable[[], object]:
        put(file, content)
        return lambda: load_config(cls, file=file)

    watch.check(contents, read)


@pytest.mark.parametrize("cls", CONFIGS)
def test_overrides(watch: Watch, cls: Any) -> None:
    names = [*setting_names(cls)]
    keys = st.one_of(st.sampled_from(names), st.sampled_from(names), TEXTS)
    values = st.one_of(YAML_TEXTS, VALUES.map(as_json), NUMBERS.map(str), TEXTS)
    overrides = st.lists(st.one_of(st.builds("{}={}".format, keys, values), TEXTS), max_size=5)
    watch.check(overrides, lambda given: lambda: load_config(cls, overrides=given))


def test_curves(watch: Watch) -> None:
    def read(text: str | float) -> object:
        for percent in (False, True):
            try:
                curve = parse_curve(text, percent=percent)
            except ValueError:
                continue
            _ = [curve.at(position) for position in (0, 0.3, 15, 1e9)], curve.closed(16), curve.constant
        return load_config(AnimateConfig, overrides=["prompt=a", f"control.motion_strength={text}"])

    watch.check(CURVES, lambda text: lambda: read(text))


def test_prompts(watch: Watch, tiny_base: Base) -> None:
    rows = {"sks": torch.ones(2, 32), "<new1>": torch.ones(1, 32)}

    def read(text: str) -> object:
        config = load_config(AnimateConfig, overrides=["frames=32", f"prompt={text}", f"negative_prompt={text}"])
        prompts = [*parse_prompts(config.prompt).values(), text]
        find_tokens(text, [*rows])
        tokenize(tiny_base.tokenizer, prompts, tokens={"sks": 30})
        return encode_prompts(tiny_base, prompts[:4], rows=rows)

    watch.accept(lambda: read("0: a sks dog | 9: a cat"))
    watch.check(PROMPTS, lambda text: lambda: read(text))


def test_long_settings(watch: Watch) -> None:
    """As long as a file may be, of what is slowest to read."""
    file = watch.room / "here" / "settings.yaml"
    pieces = ["- ", "[", "a: ", "{a: ", "1,", "'a' ", "? ", "\n a:\n", "x\n", "# ", "\t", "!!a ", "- - a\n", "&a "]
    pieces += ['"\\u0041" ', "- a\n", "\n? "]

    def read(made: tuple[list[str], int, str]) -> Callable[[], object]:
        parts, count, end = made
        put(file, "".join(parts) * count + end)
        return lambda: load_config(AnimateConfig, file=file)

    parts = st.lists(st.sampled_from(pieces), min_size=1, max_size=4)
    made = st.tuples(parts, st.integers(1, 500_000), st.sampled_from(["", "a", "]"]))
    watch.check(made, read)
