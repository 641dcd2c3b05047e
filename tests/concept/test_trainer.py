from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.base.schedule import add_noise, make_scheduler, training_target
from cdvideo.base.text import encode_text, tokenize
from cdvideo.concept.adapters import make_adapter, tuned
from cdvideo.concept.concept import Concept
from cdvideo.concept.config import ConceptConfig, SubjectConfig
from cdvideo.concept.data import cache_latents
from cdvideo.concept.drift_file import DRIFT_FILE, load_drift
from cdvideo.concept.file import frozen_copy, load_concept
from cdvideo.concept.losses import denoising_loss
from cdvideo.concept.state import STATE_FILE
from cdvideo.concept.trainer import new_concept, train_concept
from cdvideo.errors import UserError
from cdvideo.media.images import Picture
from cdvideo.runs import Run, create_run


def changed(config: ConceptConfig, **groups: dict[str, Any]) -> ConceptConfig:
    """The config with some settings of its groups changed."""
    new = {name: dataclasses.replace(getattr(config, name), **settings) for name, settings in groups.items()}
    return dataclasses.replace(config, **new)


def untrained(base: Base, config: ConceptConfig) -> Concept:
    return new_concept(base, config, make_adapter(base.unet, config.adapter, seed=config.seed))


def metrics_of(run: Run) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def equal(one: Concept, other: Concept) -> bool:
    ours, theirs = {**one.tokens, **one.weights}, {**other.tokens, **other.weights}
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_only_the_concept_is_written(
    tiny_base: Base, pictures: list[Picture], config: ConceptConfig, run: Run, tmp_path: Path
) -> None:
    modules = {"unet": tiny_base.unet, "vae": tiny_base.vae, "text": tiny_base.text_encoder}
    before = {
        (part, name): value.clone() for part, module in modules.items() for name, value in module.state_dict().items()
    }
    started = untrained(tiny_base, config)
    concept = train_concept(tiny_base, pictures, config, run, quiet=True)

    # The whole token table is among these: no word drifts, whatever the optimizer decays.
    for part, module in modules.items():
        assert all(torch.equal(value, before[part, name]) for name, value in module.state_dict().items())
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in module.parameters())
        assert not any(child._forward_hooks for child in module.modules())
    assert not torch.equal(concept.tokens["sks"], started.tokens["sks"])
    assert all(delta.any() for delta in concept.weights.values())
    assert equal(load_concept(run.folder / "concept.safetensors", base=tiny_base), concept)
    assert not (run.folder / STATE_FILE).exists()


def test_metrics_hold_every_term_and_the_drift(
    tiny_base: Base, pictures: list[Picture], config: ConceptConfig, run: Run
) -> None:
    config = changed(dataclasses.replace(config, steps=12), semantic={"weight": 100.0})
    train_concept(tiny_base, pictures, config, run, quiet=True)
    lines = metrics_of(run)
    assert [line["step"] for line in lines] == list(range(13))
    assert all(0 < line["loss_denoise"] < 20 for line in lines[1:])
    assert all(0 < line["loss_semantic"] < 2 for line in lines[1:])  # without its weight of 100
    assert [line["step"] for line in lines if "drift_cosine" in line] == [0, 10, 12]
    assert lines[0]["weight_change"] == 0 < lines[-1]["weight_change"]
    assert lines[0]["class_cosine"] == lines[-1]["class_cosine"]


def fixed_loss(
    base: Base,
    pictures: list[Picture],
    config: ConceptConfig,
    concept: Concept,
    prompt: str = "a picture of a sks dog",
) -> float:
    """The denoising loss on the plain pictures, always with the same noise."""
    generator = torch.Generator().manual_seed(9)
    plain = dataclasses.replace(config.data, rescale=0, flip=False)
    cache = cache_latents(base, pictures, plain, phrase="sks dog", class_phrase="dog", seed=0, quiet=True)
    latents = cache.latents_NCHW.repeat(8, 1, 1, 1)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.linspace(100, 999, len(latents)).long()
    scheduler = make_scheduler(base.scheduler_config)
    batch = tokenize(base.tokenizer, [prompt] * len(latents), tokens={"sks": 1})
    with torch.no_grad(), tuned(base.unet, concept):
        text = encode_text(base.text_encoder, batch, rows=concept.tokens).hidden_BLD
        prediction = base.unet(add_noise(scheduler, latents, noise, timesteps), timesteps, text).sample
    target = training_target(scheduler, latents, noise, timesteps)
    return denoising_loss(prediction, target, torch.ones(len(latents), 1, 8, 8)).item()


def test_training_lowers_the_loss(tiny_base: Base, pictures: list[Picture], config: ConceptConfig, run: Run) -> None:
    config = changed(dataclasses.replace(config, steps=60), optim={"lr": 1e-2, "batch_size": 4}, data={"rescale": 0.0})
    before = fixed_loss(tiny_base, pictures, config, untrained(tiny_base, config))
    concept = train_concept(tiny_base, pictures, config, run, quiet=True)
    assert fixed_loss(tiny_base, pictures, config, concept) < 0.9 * before


def test_semantic_preservation_keeps_the_concept_near_its_class(
    tiny_base: Base, pictures: list[Picture], config: ConceptConfig, tmp_path: Path
) -> None:
    ends = {}
    for weight in (0.0, 20.0):
        weighted = changed(dataclasses.replace(config, steps=20), semantic={"weight": weight}, optim={"token_lr": 0.02})
        with create_run(tmp_path, f"weight-{weight:g}") as run:
            train_concept(tiny_base, pictures, weighted, run, quiet=True)
            ends[weight] = metrics_of(run)[-1]
    assert "loss_semantic" not in ends[0.0], "what does not count is not computed"
    assert ends[20.0]["drift_cosine"] > ends[0.0]["drift_cosine"] + 0.1 * (1 - ends[0.0]["drift_cosine"])


def test_the_same_seed_gives_the_same_concept(
    tiny_base: Base, pictures: list[Picture], config: ConceptConfig, tmp_path: Path
) -> None:
    def train(seed: int) -> Concept:
        with create_run(tmp_path, "run") as run:
            return train_concept(tiny_base, pictures, dataclasses.replace(config, seed=seed), run, quiet=True)

    first = train(0)
    assert equal(first, train(0)) and not equal(first, train(1))


@pytest.mark.parametrize("kind", ["kv", "lora"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    tiny_base: Base, pictures: list[Picture], config: ConceptConfig, run: Run, tmp_path: Path, kind: str
) -> None:
    config = changed(config, adapter={"kind": kind})
    with create_run(tmp_path, "whole") as whole_run:
        whole = train_concept(tiny_base, pictures, config, whole_run, quiet=True)
        expected = metrics_of(whole_run)

    def interrupt(_: Concept, prompts: Sequence[str]) -> Tensor:
        """Ctrl-C, pressed while the sheet of step 2 is drawn."""
        if metrics_of(run)[-1]["step"] == 2:
            signal.raise_signal(signal.SIGINT)
        return torch.zeros(len(prompts), 3, 16, 16)

    sampled = changed(config, sample={"every": 2})
    with pytest.raises(KeyboardInterrupt):
        train_concept(tiny_base, pictures, sampled, run, sample=interrupt, quiet=True)
    assert metrics_of(run)[-1]["step"] == 3 and not (run.folder / "concept.safetensors").exists()
    run.log({"step": 4, "loss_denoise": 1.0})  # as if killed after this line and before the next state
    resumed = train_concept(tiny_base, pictures, config, run, resume=True, quiet=True)
    assert equal(resumed, whole) and metrics_of(run) == expected
    records = [load_drift(folder / DRIFT_FILE) for folder in (run.folder, whole_run.folder)]
    assert records[0].text_steps == records[1].text_steps == [0, 6]
    assert torch.equal(*(torch.stack(record.concepts["sks"].path) for record in records))

    with pytest.raises(UserError, match="nothing to resume"):
        train_concept(tiny_base, pictures, config, run, resume=True, quiet=True)


def test_a_run_interrupted_before_its_first_state_begins_anew(
    tiny_base: Base, pictures: list[Picture], config: ConceptConfig, run: Run
) -> None:
    run.log({"step": 0})
    train_concept(tiny_base, pictures, config, run, resume=True, quiet=True)
    assert [line["step"] for line in metrics_of(run)] == list(range(7))


def test_resume_refuses_other_settings_and_pictures(
    tiny_base: Base, pictures: list[Picture], config: ConceptConfig, run: Run
) -> None:
    def interrupt(_: Concept, prompts: Sequence[str]) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        return torch.zeros(len(prompts), 3, 16, 16)

    with pytest.raises(KeyboardInterrupt):
        train_concept(tiny_base, pictures, config, run, sample=interrupt, quiet=True)
    with pytest.raises(UserError, match="semantic"):
        train_concept(tiny_base, pictures, changed(config, semantic={"weight": 0.5}), run, resume=True, quiet=True)
    with pytest.raises(UserError, match="pictures"):
        train_concept(tiny_base, pictures[:2], config, run, resume=True, quiet=True)
    longer = dataclasses.replace(config, steps=8)
    assert train_concept(tiny_base, pictures, longer, run, resume=True, quiet=True).metadata.steps == 8


def test_contact_sheets_show_the_stored_concept_from_step_zero_to_the_end(
    tiny_base: Base, pictures: list[Picture], config: ConceptConfig, run: Run
) -> None:
    shown: list[Concept] = []

    def sample(concept: Concept, prompts: Sequence[str]) -> Tensor:
        assert prompts == ["a sks dog", "a sks dog wearing sunglasses", "a sks dog surfing", "a sks dog in the snow"]
        shown.append(concept)
        return torch.full((4, 3, 16, 16), 1.0)

    config = changed(config, sample={"every": 4})
    concept = train_concept(tiny_base, pictures, config, run, sample=sample, quiet=True)
    sheets = sorted(path.name for path in run.folder.glob("*.png"))
    assert sheets == ["samples_00000.png", "samples_00004.png", "samples_00006.png"]
    assert Image.open(run.folder / sheets[0]).width == 4 * 256
    assert not any(delta.any() for delta in shown[0].weights.values())
    assert equal(shown[-1], concept) and not equal(shown[1], concept)
    assert concept.metadata.preview and concept.metadata.sample_prompt == "a sks dog"


def test_divergence_stops_with_advice_and_writes_no_concept(
    tiny_base: Base, pictures: list[Picture], config: ConceptConfig, run: Run
) -> None:
    with pytest.raises(UserError, match="diverged at step") as caught:
        train_concept(tiny_base, pictures, changed(config, optim={"lr": 1e30}), run, quiet=True)
    assert "optim.lr" in caught.value.do
    assert not (run.folder / "concept.safetensors").exists()
    assert "NaN" not in (run.folder / "metrics.jsonl").read_text()


def test_several_rows_and_a_class_of_several_words_are_learned(
    tiny_base: Base, pictures: list[Picture], config: ConceptConfig, run: Run
) -> None:
    config = changed(dataclasses.replace(config, class_word="stuffed animal", steps=2), adapter={"num_rows": 3})
    concept = train_concept(tiny_base, pictures, config, run, quiet=True)
    rows_KD = concept.tokens["sks"]
    assert rows_KD.shape == (3, 32) and not torch.equal(rows_KD[0], rows_KD[1])
    assert concept.metadata.class_words == {"sks": "stuffed animal"}


@pytest.mark.parametrize(
    "adapter", [{"kind": "kv"}, {"kind": "unet"}, {"kind": "lora", "dora": True}], ids=lambda adapter: adapter["kind"]
)
def test_half_precision_bases_are_tuned_in_full_precision(
    tiny_base: Base, pictures: list[Picture], config: ConceptConfig, run: Run, adapter: dict[str, Any]
) -> None:
    tiny_base.to(torch.device("cpu"), torch.bfloat16)
    config = changed(dataclasses.replace(config, steps=2), optim={"gradient_checkpointing": True}, adapter=adapter)
    concept = train_concept(tiny_base, pictures, config, run, quiet=True)
    assert sum(bool(tensor.any()) for tensor in concept.weights.values()) >= 0.9 * len(concept.weights)
    assert metrics_of(run)[-1]["loss_denoise"] > 0


KINDS: list[dict[str, Any]] = [
    {"kind": "token"},
    {"kind": "kv", "keys": "locked"},
    {"kind": "unet"},
    {"kind": "lora", "rank": 2, "targets": ("to_q", "to_v", "conv1")},
    {"kind": "lora", "rank": 2, "dora": True},
]


@pytest.mark.parametrize("adapter", KINDS, ids=lambda adapter: "-".join(map(str, adapter.values())))
def test_every_kind_of_adapter_is_learned_and_leaves_the_base_as_it_was(
    tiny_base: Base, pictures: list[Picture], config: ConceptConfig, run: Run, adapter: dict[str, Any]
) -> None:
    config = changed(dataclasses.replace(config, steps=3), adapter=adapter)
    before = {name: value.clone() for name, value in tiny_base.unet.state_dict().items()}
    modules = dict(tiny_base.unet.named_modules())
    started = frozen_copy(untrained(tiny_base, config))
    concept = train_concept(tiny_base, pictures, config, run, quiet=True)

    after = tiny_base.unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert all(modules[name] is module for name, module in tiny_base.unet.named_modules())
    assert not any(parameter.requires_grad for parameter in tiny_base.unet.parameters())
    assert equal(load_concept(run.folder / "concept.safetensors", base=tiny_base), concept)
    assert concept.weights.keys() == started.weights.keys()
    learned = [name for name, tensor in concept.weights.items() if not torch.equal(tensor, started.weights[name])]
    assert len(learned) >= 0.9 * len(concept.weights)  # the last norm's bias and the like may round to nothing
    assert not torch.equal(concept.tokens["sks"], started.tokens["sks"])
    assert (metrics_of(run)[-1]["weight_change"] > 0) == (adapter["kind"] != "token")


def test_rows_that_are_not_to_learn_stay(
    tiny_base: Base, pictures: list[Picture], config: ConceptConfig, run: Run
) -> None:
    config = changed(dataclasses.replace(config, steps=2), adapter={"kind": "unet", "train_rows": False})
    concept = train_concept(tiny_base, pictures, config, run, quiet=True)
    assert torch.equal(concept.tokens["sks"], untrained(tiny_base, config).tokens["sks"].detach())


def test_snapshots_are_what_a_run_of_that_length_has(
    tiny_base: Base, pictures: list[Picture], config: ConceptConfig, run: Run, tmp_path: Path
) -> None:
    config = changed(config, optim={"decay": 0.0})
    train_concept(tiny_base, pictures, config, run, snapshots=[2, 5], quiet=True)
    assert sorted(path.name for path in run.folder.glob("concept_*")) == [
        "concept_00002.safetensors",
        "concept_00005.safetensors",
    ]
    with create_run(tmp_path, "short") as short:
        expected = train_concept(tiny_base, pictures, dataclasses.replace(config, steps=5), short, quiet=True)
    assert equal(load_concept(run.folder / "concept_00005.safetensors", base=tiny_base), expected)


def train_with(base: Base, pictures: list[Picture], config: ConceptConfig, folder: Path, **options: Any) -> list[Any]:
    """The concept of a run, and its metrics."""
    with create_run(folder, "run") as run:
        concept = train_concept(base, pictures, config, run, quiet=True, **options)
        return [concept, metrics_of(run)]


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


def test_what_surrounds_the_subject_has_a_term_of_its_own(
    tiny_base: Base, pictures: list[Picture], config: ConceptConfig, tmp_path: Path
) -> None:
    groups: dict[str, Any] = {"preserve": {"background_weight": 1.0}, "data": {"focus": "subject"}}
    _, metrics = train_with(tiny_base, pictures, changed(config, **groups), tmp_path)
    losses = [line["loss_background"] for line in metrics if "loss_background" in line]
    assert len(losses) == config.steps


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


def test_two_things_are_learned_at_once(
    tiny_base: Base, pictures: list[Picture], config: ConceptConfig, run: Run
) -> None:
    """Two of one class: their own rows, the same K and V."""
    other = SubjectConfig(images=Path("photos"), token="rex", class_word="dog")
    config = dataclasses.replace(config, others=(other,))
    started = frozen_copy(untrained(tiny_base, config))
    concept = train_concept(tiny_base, {"sks": pictures[:2], "rex": pictures[2:]}, config, run, quiet=True)
    assert concept.metadata.class_words == {"sks": "dog", "rex": "dog"}
    assert not any(torch.equal(concept.tokens[token], started.tokens[token]) for token in ("sks", "rex"))
    assert not torch.equal(concept.tokens["sks"], concept.tokens["rex"])
    assert equal(load_concept(run.folder / "concept.safetensors", base=tiny_base), concept)
