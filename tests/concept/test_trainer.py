"""The trainer: what a run learns, writes and leaves alone, how it is resumed, and what it refuses."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.concept.adapters import parameter_changes
from cdvideo.concept.concept import Concept
from cdvideo.concept.config import ConceptConfig, SubjectConfig
from cdvideo.concept.drift_file import DRIFT_FILE, load_drift
from cdvideo.concept.file import frozen_copy, load_concept
from cdvideo.concept.state import STATE_FILE
from cdvideo.concept.trainer import train_concept
from cdvideo.errors import UserError
from cdvideo.media.images import Picture
from cdvideo.runs import Run, create_run
from tests.concept.parts import changed, equal, fixed_loss, metrics_of, untrained


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
    sheets = sorted(path.name for path in run.folder.glob("samples_*"))
    assert sheets == ["samples_00000.png", "samples_00004.png", "samples_00006.png"]
    assert Image.open(run.folder / sheets[0]).width == 4 * 256
    assert not any(change.any() for change in parameter_changes(tiny_base.unet, shown[0]).values())
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
    frozen = {"kind": "unet", "train_rows": False, "initialiser": "cat"}
    config = changed(dataclasses.replace(config, steps=2), adapter=frozen, semantic={"weight": 0.0})
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
