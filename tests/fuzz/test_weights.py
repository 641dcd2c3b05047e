"""The project's own files, motion modules and bases: damaged, and with other tensors in them than they should have."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from cdvideo.base.checkpoint import read_tensors
from cdvideo.base.loader import Base, load_base
from cdvideo.base.prompts import encode_prompts
from cdvideo.base.single_file import read_single_file
from cdvideo.concept.concept import Concept
from cdvideo.concept.drift_file import ConceptDrift, DriftRecord, load_drift, save_drift
from cdvideo.concept.file import find_concept, load_concept, read_metadata, save_concept
from cdvideo.concept.state import TrainState
from cdvideo.motion.files import CONFIG_FILE, WEIGHTS_FILE, load_motion, save_motion
from cdvideo.motion.lora import fold_motion_lora
from tests.base.ldm_names import official as official_base
from tests.fuzz.hostile import (
    JSON_EDITS,
    VALUES,
    as_json,
    damaged_pickle,
    damaged_safetensors,
    pickle_damage,
    put,
    safetensors_damage,
)
from tests.fuzz.watch import Watch
from tests.interchange.parts import ADAPTERS, changes_of, learned
from tests.motion.animatediff_names import make_adapter, official, official_lora

CPU = torch.device("cpu")
Files = Sequence[tuple[Mapping[str, Tensor], Mapping[str, str]]]


def header_of(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def kept(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header's texts of a file, none of which is mapped."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}, header_of(path)


def check_weights(
    watch: Watch, files: Files, path: Path, read: Callable[[Path], object], *, pickled: str | None = ".ckpt"
) -> None:
    """Safetensors files of these tensors, and the same pickled under another suffix."""

    def of_safetensors(damage: Any) -> Callable[[], object]:
        put(path, damaged_safetensors(files, damage))
        return lambda: read(path)

    def of_pickle(damage: Any) -> Callable[[], object]:
        other = path.with_suffix(pickled or "")
        put(other, damaged_pickle([tensors for tensors, _ in files], damage))
        return lambda: read(other)

    inputs: SearchStrategy[Any] = safetensors_damage()
    if pickled is not None:
        inputs = st.one_of(inputs, pickle_damage())
    watch.check(inputs, lambda each: of_pickle(each) if hasattr(each, "form") else of_safetensors(each))


def use(base: Base, concept: Concept) -> object:
    """What sampling takes of a concept: what it changes, and its words in a prompt."""
    changes = changes_of(base, concept)
    return changes, encode_prompts(base, [" ".join(["a", *concept.tokens])], rows=concept.tokens)


def test_weights(watch: Watch) -> None:
    """Any file of tensors, whatever it is for."""
    tensors = {"a.weight": torch.randn(4, 6), "b.0.bias": torch.randn(6), "step": torch.tensor(3)}
    tensors["c"] = torch.randn(2, 2).half()
    path = watch.room / "here" / "weights.safetensors"
    check_weights(
        watch,
        [(tensors, {"format": "pt"}), ({"state_dict.a": torch.ones(2)}, {})],
        path,
        lambda file: [each.float().sum() for each in read_tensors(file).values() if not each.is_complex()],
    )


def test_concept_files(watch: Watch, tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, files = tmp_path_factory.mktemp("whole"), []
    for kind, adapter in ADAPTERS.items():
        save_concept(learned(tiny_base, adapter), folder / f"{kind}.safetensors")
        files.append(kept(folder / f"{kind}.safetensors"))
    path = watch.room / "here" / "a-run" / "concept.safetensors"
    path.parent.mkdir()

    def read(file: Path) -> object:
        find_concept("a sks dog", path.parent.parent, base_hash=tiny_base.hash)
        use(tiny_base, load_concept(file, base=tiny_base))
        return read_metadata(file), load_concept(file)

    put(path, (folder / "kv.safetensors").read_bytes())
    watch.accept(lambda: read(path))
    check_weights(watch, files, path, read, pickled=None)


def test_training_states(watch: Watch, tmp_path_factory: pytest.TempPathFactory) -> None:
    def state() -> TrainState:
        weight = torch.ones(3, 3, requires_grad=True)
        return TrainState({"weight": weight}, torch.optim.AdamW([weight]), torch.amp.GradScaler("cpu"), {"lr": "1"})

    whole = state()
    whole.parameters["weight"].sum().backward()
    whole.optimizer.step()
    file = tmp_path_factory.mktemp("whole") / "state.safetensors"
    whole.save(file, 7)
    path = put(watch.room / "here" / "state.safetensors", file.read_bytes())
    watch.accept(lambda: state().load(path))
    check_weights(watch, [kept(file)], path, lambda each: state().load(each), pickled=None)


def test_drift_files(watch: Watch, tmp_path_factory: pytest.TempPathFactory) -> None:
    shares, maps, rows = [torch.ones(3, 2)] * 2, [torch.ones(3, 4, 3)] * 2, torch.ones(5, 8)
    drift = ConceptDrift("dog", ("a", "sks", "dog"), (8, 4), rows, shares[0], rows + 1, [*rows[:2]], shares, maps)
    file = tmp_path_factory.mktemp("whole") / "drift.safetensors"
    save_drift(DriftRecord([0, 5], [0, 5], {"sks": drift}), file)
    path = put(watch.room / "here" / "drift.safetensors", file.read_bytes())
    watch.accept(lambda: load_drift(path).until(3))
    check_weights(watch, [kept(file)], path, lambda each: load_drift(each).until(3), pickled=None)


def test_motion_files(watch: Watch) -> None:
    widths = (32, 32, 32, 32)
    files: Files = [(official(make_adapter(version, widths=widths)), {}) for version in ("v1", "v2")]
    files = [*files, (make_adapter("v3", widths=widths).state_dict(), {"format": "pt"})]
    path = watch.room / "here" / "mm.safetensors"
    check_weights(watch, files, path, lambda file: load_motion(file, device=CPU))


def test_motion_folders(watch: Watch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Their config.json, and weights that belong to another."""
    source, folder = tmp_path_factory.mktemp("whole"), watch.room / "here" / "motion"
    make_adapter("v2", widths=(32, 32, 32, 32)).save_pretrained(source)
    ours = tmp_path_factory.mktemp("ours")
    save_motion(load_motion(source, device=CPU), ours)
    configs = [json.loads((each / CONFIG_FILE).read_text(encoding="utf-8")) for each in (source, ours)]
    weights = (source / WEIGHTS_FILE).read_bytes()
    folder.mkdir()

    def read(config: str) -> Callable[[], object]:
        put(folder / CONFIG_FILE, config)
        put(folder / WEIGHTS_FILE, weights)
        return lambda: load_motion(folder, device=CPU)

    for config in configs:
        watch.accept(read(as_json(config)))
    one = st.sampled_from(configs)
    inputs = st.one_of(
        st.builds(edited, one, JSON_EDITS),
        st.builds(lambda config, name, value: as_json({**config, name: value}), one, NAMES, VALUES),
        VALUES.map(as_json),
    )
    watch.check(inputs, read)


NAMES = st.sampled_from(
    "_class_name block_out_channels motion_layers_per_block motion_transformer_layers_per_block "
    "motion_mid_block_layers_per_block motion_transformer_layers_per_mid_block motion_num_attention_heads "
    "motion_norm_num_groups motion_max_seq_length use_motion_mid_block _norm_mode _beta_schedule _beta_end "
    "_timestep_spacing _sampler _steps _guidance _joint_image_norms _trained_for".split()
)


def edited(tree: Any, edits: Sequence[Any]) -> str:
    for edit in edits:
        tree = edit.apply(tree)
    return as_json(tree)


def test_motion_loras(watch: Watch, tmp_path_factory: pytest.TempPathFactory) -> None:
    adapter = make_adapter("v2", widths=(32, 32, 32, 32))
    adapter.save_pretrained(folder := tmp_path_factory.mktemp("motion"))
    motion = load_motion(folder, device=CPU)
    path = watch.room / "here" / "lora.safetensors"
    files: Files = [(official_lora(adapter), {})]
    check_weights(watch, files, path, lambda file: fold_motion_lora(motion, file, strength=0.0))


def small_base() -> dict[str, Tensor]:
    """Stable Diffusion 1 as narrow as it can be, under the official names; in half precision, so that it is cast."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(32, 32, 32, 32), attention_head_dim=8, cross_attention_dim=16
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 1}
    text = CLIPTextModel(CLIPTextConfig(**sizes, num_hidden_layers=1))
    tensors = official_base(1, unet, vae, text)
    # `official` counts four blocks in the autoencoder; this one has two.
    for old, new in (("decoder.up.3.", "decoder.up.1."), ("decoder.up.2.", "decoder.up.0.")):
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def test_single_file_bases(watch: Watch) -> None:
    files: Files = [(small_base(), {"modelspec.prediction_type": "epsilon"})]
    path = watch.room / "here" / "base.safetensors"
    check_weights(watch, files, path, read_single_file)


def test_base_folders(watch: Watch, tiny_base_folder: Path) -> None:
    """Their configs, which diffusers and transformers read too."""
    folder = watch.room / "here" / "base"
    for part in tiny_base_folder.iterdir():
        (folder / part.name).mkdir(parents=True)
        for file in part.iterdir():
            put(folder / part.name / file.name, file.read_bytes())
    configs = {
        file.relative_to(folder).as_posix(): file.read_text(encoding="utf-8") for file in sorted(folder.rglob("*.json"))
    }
    small = [name for name, text in configs.items() if len(text) < 10_000]

    def read(name: str, config: str) -> Callable[[], object]:
        for each in small:
            put(folder / each, configs[each])
        put(folder / name, config)
        return lambda: load_base(str(folder), device=CPU)

    watch.accept(read(small[0], configs[small[0]]))
    inputs = st.sampled_from(small).flatmap(
        lambda name: st.tuples(
            st.just(name),
            st.one_of(st.builds(edited, st.just(json.loads(configs[name])), JSON_EDITS), VALUES.map(as_json)),
        )
    )
    watch.check(inputs, lambda each: read(*each))
