"""Concepts of SDXL: learned in both text encoders, with sizes told, and nothing but their own tensors written."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from cdvideo.base.loader import Base
from cdvideo.base.prompts import encode_each, split_rows, tokenize_prompts
from cdvideo.concept.adapters import make_adapter
from cdvideo.concept.attention_maps import attention_maps
from cdvideo.concept.config import AdapterConfig, ConceptConfig, DataConfig, PreserveConfig, SemanticConfig
from cdvideo.concept.data import augment, cache_latents, draw_mixed, joined
from cdvideo.concept.drift_file import DRIFT_FILE, load_drift
from cdvideo.concept.file import load_concept, save_concept
from cdvideo.concept.kv import embedding_norms, initial_rows
from cdvideo.concept.merge import merge_concepts
from cdvideo.concept.semantic import SemanticPreservation, phrase_features
from cdvideo.concept.trainer import new_concept, train_concept
from cdvideo.errors import UserError
from cdvideo.media.images import Picture
from cdvideo.runs import Run
from tests.interchange.parts import learned
from tests.sdxl import WIDTHS


@pytest.fixture
def base(tiny_sdxl: Base) -> Base:
    """At 64 pixels, for speed."""
    tiny_sdxl.resolution = 64
    return tiny_sdxl


@pytest.mark.parametrize("adapter", ["kv", "lora", "token"])
def test_training_writes_the_concept_alone(
    base: Base, pictures: list[Picture], config: ConceptConfig, run: Run, adapter: str
) -> None:
    tunes = float(adapter != "token")
    config = dataclasses.replace(
        config,
        steps=3,
        adapter=AdapterConfig(kind=adapter, num_rows=2),  # type: ignore[arg-type]
        data=DataConfig(variants=1, focus="subject"),
        preserve=PreserveConfig(output_weight=tunes, background_weight=tunes, keep_norm=True),
    )
    before = [{name: value.clone() for name, value in module.state_dict().items()} for module in base.modules]
    started = new_concept(base, config, make_adapter(base.unet, config.adapter, seed=config.seed))
    concept = train_concept(base, pictures, config, run, quiet=True)

    for module, values in zip(base.modules, before, strict=True):
        assert all(torch.equal(value, values[name]) for name, value in module.state_dict().items())
        assert not any(p.requires_grad or p.grad is not None for p in module.parameters())
    tables = [encoder.get_input_embeddings() for encoder in base.text_encoders.values()]
    assert not any(child._forward_hooks for child in (*base.unet.modules(), *tables))
    assert concept.tokens["sks"].shape == (2, sum(WIDTHS))
    for ours, theirs in zip(split_rows(base, concept.tokens), split_rows(base, started.tokens), strict=True):
        assert (ours["sks"] != theirs["sks"]).float().mean() > 0.9, "the rows of this encoder were not trained"
    assert all(tensor.any() for tensor in concept.weights.values()) and bool(concept.weights) == (adapter != "token")
    for part, norm in zip(split_rows(base, concept.tokens), embedding_norms(base, "dog"), strict=True):
        torch.testing.assert_close(part["sks"].norm(dim=1), torch.full((2,), norm))
    again = load_concept(run.folder / "concept.safetensors", base=base)
    assert torch.equal(again.tokens["sks"], concept.tokens["sks"]) and again.weights.keys() == concept.weights.keys()

    drift = load_drift(run.folder / DRIFT_FILE)
    path = drift.concepts["sks"]
    assert path.class_TD.shape[1] == sum(WIDTHS) and len(path.path) == len(drift.text_steps) == 2
    assert all(mass.sum() > 0 for mass in path.mass)


def test_a_second_run_is_the_same(
    base: Base, pictures: list[Picture], config: ConceptConfig, tmp_path: Path, run: Run
) -> None:
    config = dataclasses.replace(config, steps=2, data=DataConfig(variants=1))
    first = train_concept(base, pictures, config, run, quiet=True)
    (run.folder / "concept.safetensors").unlink()
    second = train_concept(base, pictures, config, run, quiet=True)
    assert torch.equal(first.tokens["sks"], second.tokens["sks"])


def test_rows_start_at_the_class_word_of_both_encoders(base: Base) -> None:
    dog = base.tokenizer("dog", add_special_tokens=False).input_ids[0]
    tables = [encoder.get_input_embeddings().weight[dog] for encoder in base.text_encoders.values()]
    rows_KD = initial_rows(base, "dog", 2)
    assert torch.equal(rows_KD.detach(), torch.cat(tables).repeat(2, 1))


@pytest.mark.parametrize("variant", ["true_eos", "released"])
def test_semantic_preservation_is_the_mean_over_the_encoders(base: Base, config: ConceptConfig, variant: str) -> None:
    semantic = SemanticConfig(phrases=3, variant=variant)  # type: ignore[arg-type]
    loss = SemanticPreservation(base, dataclasses.replace(config, semantic=semantic))
    rows = {"sks": initial_rows(base, "cat", 1)}
    value = loss(rows, torch.Generator().manual_seed(4))
    value.backward()
    assert rows["sks"].grad is not None
    assert all(part.abs().max() > 0 for part in rows["sks"].grad.split(WIDTHS, dim=1))
    if variant == "true_eos":
        drawn = torch.randperm(len(loss.templates), generator=torch.Generator().manual_seed(4))[:3].tolist()
        texts = [[loss.templates[t].replace("{}", phrase) for t in drawn] for phrase in ("sks dog", "dog")]
        sides = [encode_each(base, tokenize_prompts(base, text, rows), rows=rows) for text in texts]
        cosines = [torch.cosine_similarity(a.eos_BD, b.eos_BD).mean() for a, b in zip(*sides, strict=True)]
        torch.testing.assert_close(value, 1 - torch.stack(cosines).mean())
    else:
        assert 0 < value < 2


def test_phrases_features_have_both_encoders(base: Base) -> None:
    features_TD = phrase_features(base, ["a dog", "a cat in the snow"])
    for part_TD in features_TD.split(WIDTHS, dim=1):
        torch.testing.assert_close(part_TD.norm(dim=1), torch.ones(2))


def test_sizes_say_what_was_cut() -> None:
    """300 x 200 pixels, 64 shown: scaled to 96 x 64, 16 of them cut on the left."""
    image = Image.new("RGB", (300, 200))
    plain = augment(image, 64, DataConfig(flip=False, rescale=0), random.Random(0), cell=8)
    assert plain.sizes_6.tolist() == [200, 300, 0, 16, 64, 64]
    config, rng = DataConfig(flip=False, rescale=1, smallest_scale=1, largest_scale=1.5), random.Random(1)
    large = next(v for v in (augment(image, 64, config, rng, cell=8) for _ in range(30)) if v.size == "large")
    assert (
        large.sizes_6[2] >= 0 and large.sizes_6[3] > 16 and large.sizes_6[[0, 1, 4, 5]].tolist() == [200, 300, 64, 64]
    )


def test_sizes_stay_with_their_pictures(base: Base) -> None:
    pictures = [Picture(name=f"{side}", image=Image.new("RGB", (side, 64), (side, 0, 0))) for side in (64, 96, 128)]
    data = DataConfig(variants=1, flip=False, rescale=0)
    cache = cache_latents(base, pictures, data, phrase="sks dog", class_phrase="dog", seed=0, quiet=True)
    generator = torch.Generator().manual_seed(0)
    batch = joined([draw_mixed([cache], 4, generator), draw_mixed([cache], 4, generator)])
    assert batch.sizes_B6.shape == (8, 6)
    for latents, sizes in zip(batch.latents_BCHW, batch.sizes_B6, strict=True):
        (n,) = [n for n in range(3) if torch.equal(latents, cache.latents_NCHW[n])]
        assert sizes.tolist() == [64, (64, 96, 128)[n], 0, (0, 16, 32)[n], 64, 64]


@torch.no_grad()
def test_attention_is_shared_out(base: Base) -> None:
    maps = attention_maps(
        base, learned(base, {"kind": "kv"}), "a sks dog", torch.randn(2, 4, 8, 8), [300, 700], torch.Generator()
    )
    assert set(maps["dog"]) == {4, 2}
    whole = sum(by_height[4] for by_height in maps.values())
    torch.testing.assert_close(whole, torch.ones(2, 4, 4))


def test_merging_keeps_the_rows_of_both(base: Base) -> None:
    one, other = learned(base, {"kind": "kv"}), learned(base, {"kind": "kv"}, token="rex", rows=1)
    merged = merge_concepts(base, [one, other])
    assert torch.equal(merged.tokens["sks"], one.tokens["sks"]) and torch.equal(
        merged.tokens["rex"], other.tokens["rex"]
    )
    assert merged.weights.keys() == one.weights.keys()


def test_concepts_of_other_bases_are_refused(base: Base, tiny_base: Base, tmp_path: Path) -> None:
    path = tmp_path / "concept.safetensors"
    save_concept(learned(base, {"kind": "token"}), path)
    with pytest.raises(UserError, match="matched 0/1 tensors"):
        load_concept(path, base=tiny_base)
    config = ConceptConfig(adapter=AdapterConfig(kind="token"))
    small = new_concept(tiny_base, config, make_adapter(tiny_base.unet, config.adapter, seed=0))
    save_concept(small, path)
    with pytest.raises(UserError, match="matched 0/1 tensors"):
        load_concept(path, base=base)
