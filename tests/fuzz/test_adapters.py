"""Adapters and words of other people's, as files and as folders full of things."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from cdvideo.base.loader import Base
from cdvideo.concept.concept import Concept
from cdvideo.errors import UserError
from cdvideo.interchange import write
from cdvideo.interchange.inspect import describe
from cdvideo.interchange.load import load_adapters
from cdvideo.interchange.main import main as convert
from tests.fuzz.hostile import (
    JSON_EDITS,
    TEXTS,
    VALUES,
    Odd,
    PickleDamage,
    as_json,
    damaged_pickle,
    damaged_safetensors,
    pickle_damage,
    put,
    safetensors_damage,
)
from tests.fuzz.test_weights import Files, edited, kept, use
from tests.fuzz.watch import Watch
from tests.interchange.parts import ADAPTERS, learned, random, with_text


def written(base: Base, folder: Path) -> dict[str, Path]:
    """One of each form that the project itself writes."""
    lora, kv = with_text(learned(base, ADAPTERS["lora"])), learned(base, ADAPTERS["kv"])
    forms: list[tuple[str, Concept, Callable[[Any], object]]] = [
        ("kohya", lora, write.write_kohya),
        ("dora", learned(base, ADAPTERS["dora"]), write.write_kohya),
        ("peft", learned(base, ADAPTERS["lora"]), write.write_peft),
        ("diffusers", lora, write.write_diffusers),
        ("custom", kv, write.write_custom_diffusion),
        ("words", kv, write.write_textual_inversion),
    ]
    for name, concept, writer in forms:
        (folder / name).mkdir()
        writer(write.Export(base, concept, folder / name, name, None, lambda _: None))
    return {name: folder / name for name, _, _ in forms}


def others(base: Base) -> list[dict[str, Any]]:
    """Forms that the project reads and does not write."""
    row = random(2, 32, scale=1.0)
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1"
    width = base.unet.get_submodule(f"{attention}.to_q").in_features
    stem = f"lora_unet_{attention.replace('.', '_')}_to_q"
    factors = {"hada_w1_a": (width, 2), "hada_w1_b": (2, width), "hada_w2_a": (width, 2), "hada_w2_b": (2, width)}
    return [
        {f"{stem}.{part}": random(*shape) for part, shape in factors.items()} | {f"{stem}.alpha": torch.tensor(1.0)},
        {f"{stem}.lokr_w1": random(2, 2), f"{stem}.lokr_w2": random(width // 2, width // 2)},
        {"unet:0:up": random(width, 2), "unet:0:down": random(2, width)},
        {"string_to_token": {"*": 265}, "string_to_param": {"*": nn.Parameter(row)}, "name": "sks", "step": 5},
        {"emb_params": row},
        {"clip_l": row, "clip_g": row},
        {"unet": {f"{attention}.to_k.weight": random(width, 32)}, "modifier_token": {"<new1>": row[0]}},
        {f"unet.{attention}.processor.to_k_custom_diffusion.weight": random(width, 32)},
        {"sks": row},
    ]


@pytest.fixture
def forms(tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return written(tiny_base, tmp_path_factory.mktemp("whole"))


def read_all(base: Base, path: Path) -> object:
    """As scripts do: what it is, then what it is for this base."""
    with contextlib.suppress(UserError):
        describe(path)
    concept = load_adapters(base, [(path, 0.7)])
    return use(base, concept)


def test_adapters(watch: Watch, tiny_base: Base, forms: Mapping[str, Path]) -> None:
    files: Files = [kept(file) for folder in forms.values() for file in sorted(folder.glob("*.safetensors"))]
    plain = [each for each in others(tiny_base) if all(isinstance(value, Tensor) for value in each.values())]
    files = [*files, *((tensors, {}) for tensors in plain)]
    path = watch.room / "here" / "adapter.safetensors"

    def read(damage: Any) -> Callable[[], object]:
        put(path, damaged_safetensors(files, damage))
        return lambda: read_all(tiny_base, path)

    watch.check(safetensors_damage(), read)


def test_pickled_adapters(watch: Watch, tiny_base: Base, forms: Mapping[str, Path]) -> None:
    files: list[Mapping[str, Any]] = [kept(forms["kohya"] / "kohya.safetensors")[0], *others(tiny_base)]

    def read(each: tuple[PickleDamage, str]) -> Callable[[], object]:
        damage, name = each
        path = put(watch.room / "here" / name, damaged_pickle(files, damage))

        def read_and_away() -> object:
            return read_all(tiny_base, path)

        return read_and_away

    watch.check(st.tuples(pickle_damage(), st.sampled_from(["adapter.pt", "learned_embeds.bin", "<new1>.bin"])), read)


NAMES = (
    "pytorch_lora_weights.safetensors adapter_model.safetensors adapter_model.bin adapter_config.json config.json "
    "learned_embeds.bin learned_embeds_2.safetensors learned_embeds-steps-500.safetensors <new1>.bin "
    "pytorch_custom_diffusion_weights.bin optimizer.bin scheduler.bin random_states_0.pkl special_params.json "
    "concept.safetensors state.safetensors dog-000010.safetensors dog.safetensors dog_step00000100.safetensors .hidden "
    "README.md x.safetensors.part ａ.pt checkpoint-500/pytorch_lora_weights.safetensors unet/adapter_config.json "
    "unet/adapter_model.safetensors text_encoder/adapter_model.safetensors embeddings/sks.safetensors "
    "epoch-1/dog.safetensors a/b/c/d/e/dog.safetensors"
).split()
CONTENTS: SearchStrategy[Any] = st.one_of(
    st.sampled_from(
        ["kohya", "dora", "peft", "diffusers", "custom", "words", "row", "config", "folder", "nowhere", "itself"]
    ),
    st.sampled_from(["kohya", "peft", "words"]),
    st.binary(max_size=60),
    VALUES.map(as_json),
    st.builds(lambda edits: ("config", edits), JSON_EDITS),
    st.builds(Odd, st.integers(0, 26)),
)


def test_adapter_folders(watch: Watch, tiny_base: Base, forms: Mapping[str, Path]) -> None:
    largest = {name: max(at.iterdir(), key=lambda file: file.stat().st_size) for name, at in forms.items()}
    whole = {name: file.read_bytes() for name, file in largest.items()}
    settings = json.loads((forms["peft"] / "adapter_config.json").read_text(encoding="utf-8"))
    folder = watch.room / "here" / "adapters"

    def lay(path: Path, content: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if content == "folder":
            path.mkdir()
        elif content in ("nowhere", "itself"):
            path.symlink_to("nowhere-at-all" if content == "nowhere" else folder)
        elif isinstance(content, tuple):
            put(path, edited(settings, content[1]))
        elif isinstance(content, Odd):
            damage = PickleDamage(0, [], [], content, "zip", [], [])
            put(path, damaged_pickle([{"sks": random(2, 32)}], damage))
        elif content == "config":
            put(path, as_json(settings))
        elif content == "row":
            torch.save({"sks": random(2, 32)}, path)
        else:
            put(path, whole.get(content, content) if isinstance(content, str) else content)

    def read(tree: Mapping[str, Any]) -> Callable[[], object]:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, content in tree.items():
            if all(parent.is_dir() or not parent.exists() for parent in (folder / name).parents):
                lay(folder / name, content)
        return lambda: load_adapters(tiny_base, [(folder, 1.0)])

    watch.accept(read({"adapter_model.safetensors": "peft", "adapter_config.json": "config"}))
    watch.check(st.dictionaries(st.sampled_from(NAMES), CONTENTS, max_size=6), read)


def test_inspected_folders(watch: Watch, forms: Mapping[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Folders through the command line, and texts that are no paths."""
    folders = [*map(str, forms.values()), "nothing"]
    texts = st.builds(
        "{}{}".format, st.sampled_from(folders), st.one_of(TEXTS, st.sampled_from([":0.5", ":nan", ",", ":"]))
    )

    def read(text: str) -> Callable[[], object]:
        return lambda: (convert(["--inspect", "--quiet", text]), capsys.readouterr())

    watch.check(texts, read)
