"""Bases, motion modules and motion LoRAs as people have them: read rightly, or refused by their right name."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cdvideo.base import hashes
from cdvideo.base.checkpoint import read_metadata, read_tensors
from cdvideo.base.ldm import used_layers
from cdvideo.base.loader import Base, find_base, load_base, weights_hash
from cdvideo.base.memory import base_from_configs
from cdvideo.base.prompts import encode_prompts
from cdvideo.base.signatures import describe_bytes
from cdvideo.concept.concept import public_base_name
from cdvideo.errors import UserError
from cdvideo.motion.config import MotionConfig
from cdvideo.motion.files import load_motion
from cdvideo.motion.lora import fold_motion_lora
from cdvideo.motion.modules import MotionModules
from cdvideo.motion.video_unet import VideoUNet
from tests.base.ldm_names import make_text_encoder, make_unet, make_vae, official, save_folder
from tests.motion import animatediff_names

CPU = torch.device("cpu")
PROMPT = "a photo of a dog!"
CLIP = "cond_stage_model.transformer."


@pytest.fixture(scope="module", params=[1, 2])
def family(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {number: save_folder(tmp_path_factory.mktemp(f"sd{number}"), number) for number in (1, 2)}


@pytest.fixture(scope="module")
def tensors() -> dict[int, dict[str, Tensor]]:
    """All of Stable Diffusion 1 and 2 in one file each; 2 has a layer of its text encoder that is not used."""
    made = {number: official(number, make_unet(number), make_vae(), make_text_encoder(number)) for number in (1, 2)}
    return {number: {name: t.detach().clone() for name, t in of.items()} for number, of in made.items()}


@pytest.fixture(scope="module")
def whole(folders: dict[int, Path]) -> dict[int, Base]:
    return {number: load_base(str(folder), device=CPU) for number, folder in folders.items()}


def saved(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    return path


def assert_same(one: Base, other: Base) -> None:
    """Weights, reading of a prompt, prediction and size."""
    for ours, theirs in zip(one.modules, other.modules, strict=True):
        left, right = ours.state_dict(), theirs.state_dict()
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in right)
    with torch.no_grad():
        read, wanted = (encode_prompts(base, [PROMPT]).hidden_BLD for base in (one, other))
    assert (read - wanted).abs().max() <= 1e-5
    assert one.tokenizer.pad_token == other.tokenizer.pad_token
    assert one.text_encoder.config.hidden_act == other.text_encoder.config.hidden_act
    assert one.resolution == other.resolution
    assert one.scheduler_config["prediction_type"] == other.scheduler_config["prediction_type"]


def test_stable_diffusion_2_under_clip_s_names(
    tensors: dict[int, dict[str, Tensor]], whole: dict[int, Base], tmp_path: Path
) -> None:
    """F01: known by its UNet's linear projections; gelu, padding with "!", v and 768 pixels."""
    text = make_text_encoder(2).state_dict()
    file = {name: tensor for name, tensor in tensors[2].items() if not name.startswith("cond_stage_model.")}
    file |= {f"{CLIP}text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in text.items()}
    path = saved(file, tmp_path / "sd2.safetensors")
    said: list[str] = []
    base = load_base(str(path), device=CPU, report=said.append)
    assert_same(base, whole[2])
    assert (base.resolution, base.text_encoder.config.hidden_act) == (768, "gelu")
    assert "Stable Diffusion 2.x in one file" in said[0] and "text encoder 52/52" in said[0]
    outline = base_from_configs(str(path), dtype=torch.float32)
    assert outline is not None and outline.resolution == 768


def test_a_text_encoder_and_a_unet_of_two_families_are_told(
    tensors: dict[int, dict[str, Tensor]], tmp_path: Path
) -> None:
    """The kind of F01: nothing is guessed where the parts contradict each other."""
    mixed = {name: t for name, t in tensors[1].items() if not name.startswith("cond_stage_model.")}
    mixed |= {name: t for name, t in tensors[2].items() if name.startswith("cond_stage_model.")}
    with pytest.raises(UserError, match=r"the text encoder of Stable Diffusion 2 and a UNet of 1\.x"):
        load_base(str(saved(mixed, tmp_path / "mixed.safetensors")), device=CPU)
    wide = dict(tensors[1])
    for name in [name for name in wide if "attn2.to_k" in name or "attn2.to_v" in name]:
        wide[name] = torch.cat([wide[name]] * 2, dim=1)
    with pytest.raises(UserError, match="UNet that reads text of width 128, and text encoders of width 64"):
        load_base(str(saved(wide, tmp_path / "wide.safetensors")), device=CPU)


@pytest.mark.parametrize("left_out", [("text_projection",), ("resblocks.3.", "text_projection", "logit_scale")])
def test_stable_diffusion_2_without_what_it_does_not_use(
    tensors: dict[int, dict[str, Tensor]], whole: dict[int, Base], tmp_path: Path, left_out: tuple[str, ...]
) -> None:
    """F02: all three layers that are used, whether the fourth is in the file or not."""
    file = {name: t for name, t in tensors[2].items() if not any(part in name for part in left_out)}
    path = saved(file, tmp_path / "sd2.safetensors")
    said: list[str] = []
    assert_same(load_base(str(path), device=CPU, report=said.append), whole[2])
    assert "text encoder 52/52" in said[0]
    outline = base_from_configs(str(path), dtype=torch.float32)
    assert outline is not None and outline.text_encoder.config.num_hidden_layers == 3


@pytest.mark.parametrize(("layers", "used"), [(24, 23), (23, 23), (22, 22)])
def test_layers_of_the_released_width_are_counted(layers: int, used: int) -> None:
    names = {f"cond_stage_model.model.transformer.resblocks.{n}.ln_1.bias": torch.zeros(1) for n in range(layers)}
    table = torch.zeros(2, 1024, device="meta")
    assert used_layers({**names, "cond_stage_model.model.token_embedding.weight": table}) == used


@pytest.mark.parametrize("name", ["{}.fp16.safetensors", "{}.bf16.safetensors"])
def test_a_folder_of_one_variant_alone(folders: dict[int, Path], tmp_path: Path, name: str) -> None:
    """F12: read, and said."""
    shutil.copytree(folders[1], tmp_path / "sd")
    for file in (tmp_path / "sd").rglob("*.safetensors"):
        file.rename(file.with_name(name.format(file.stem)))
    said: list[str] = []
    base = load_base(str(tmp_path / "sd"), device=CPU, report=said.append)
    assert_same(base, load_base(str(folders[1]), device=CPU))
    assert f"of variants: unet {name[3:7]}, text_encoder {name[3:7]}, vae {name[3:7]}" in said[0]


def test_one_part_of_a_variant_and_a_variant_nobody_knows(folders: dict[int, Path], tmp_path: Path) -> None:
    shutil.copytree(folders[1], tmp_path / "sd")
    unet = tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    unet = unet.rename(unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    shutil.copy(unet, unet.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    assert_same(load_base(str(tmp_path / "sd"), device=CPU), load_base(str(folders[1]), device=CPU))
    unet.unlink()
    with pytest.raises(UserError, match=r"unet holds no weights but diffusion_pytorch_model\.non_ema\.safetensors"):
        load_base(str(tmp_path / "sd"), device=CPU)


def as_diffusers(name: str) -> str:
    for ours, theirs in ((".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."), (".proj_out.", ".to_out.0.")):
        name = name.replace(ours, theirs)
    return name


def before_attention(name: str) -> str:
    for ours, theirs in ((".q.", ".query."), (".k.", ".key."), (".v.", ".value."), (".proj_out.", ".proj_attn.")):
        name = name.replace(ours, theirs)
    return name.replace("attn_1.norm.", "attn_1.group_norm.")


@pytest.mark.parametrize("rename", [as_diffusers, before_attention, str])
@pytest.mark.parametrize("matrices", [True, False])
def test_the_vae_s_attention_in_every_form(
    tensors: dict[int, dict[str, Tensor]],
    whole: dict[int, Base],
    tmp_path: Path,
    rename: Callable[[str], str],
    matrices: bool,
) -> None:
    """F15: diffusers' names, old and new, for matrices or convolutions; biases as convolutions of one pixel have."""
    file = {}
    for name, tensor in tensors[1].items():
        if "attn_1" in name and ".norm." not in name:
            if name.endswith("bias"):
                tensor = tensor if matrices else tensor[:, None, None]
            elif matrices:
                tensor = tensor[:, :, 0, 0]
        file[rename(name) if "attn_1" in name else name] = tensor
    assert_same(load_base(str(saved(file, tmp_path / "sd.safetensors")), device=CPU), whole[1])


def test_the_vae_s_attention_as_convolutions_in_a_folder(
    folders: dict[int, Path], whole: dict[int, Base], tmp_path: Path
) -> None:
    shutil.copytree(folders[1], tmp_path / "sd")
    path = tmp_path / "sd" / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    for name in [name for name in weights if ".attentions.0.to_" in name]:
        weights[name] = weights[name][..., None, None].contiguous()
    save_file(weights, path)
    assert_same(load_base(str(tmp_path / "sd"), device=CPU), whole[1])


UNET = "model.diffusion_model."


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (f"{UNET}time_embed.cond_proj.weight", "a latent consistency model"),
        ("edm_vpred.sigma_max", "EDM's noise levels, as CosXL"),
        ("embedding_manager.embedder.x", "embeddings of textual inversion beside the model"),
        ("control_model.input_hint_block.0.weight", "a ControlNet beside the model"),
        ("some.stranger", "1 keys without a place, such as some.stranger"),
    ],
)
def test_one_more_key_makes_another_model(
    tensors: dict[int, dict[str, Tensor]], tmp_path: Path, key: str, said: str
) -> None:
    """F34: named, with advice that does not send anybody to fetch the same file again."""
    path = saved({**tensors[1], key: torch.ones(2)}, tmp_path / "sd.safetensors")
    with pytest.raises(UserError, match=said) as caught:
        load_base(str(path), device=CPU)
    assert "again" not in caught.value.do


def test_a_safety_checker_beside_the_model_is_never_called(
    tensors: dict[int, dict[str, Tensor]], whole: dict[int, Base], tmp_path: Path
) -> None:
    file = {**tensors[1], "safety_checker.concept_embeds": torch.ones(17, 8)}
    assert_same(load_base(str(saved(file, tmp_path / "sd.safetensors")), device=CPU), whole[1])


@pytest.mark.parametrize(
    ("keep", "more", "said"),
    [
        (UNET, {f"{UNET}label_emb.0.0.weight": torch.ones(2, 2)}, "the UNet of Stable Diffusion XL alone"),
        (UNET, {}, "a UNet alone, without text encoder and autoencoder"),
        ("cond_stage_model", {}, "no UNet of Stable Diffusion"),
    ],
)
def test_a_part_alone_is_named(
    tensors: dict[int, dict[str, Tensor]], tmp_path: Path, keep: str, more: dict[str, Tensor], said: str
) -> None:
    file = {name: t for name, t in tensors[1].items() if name.startswith(keep)} | more
    with pytest.raises(UserError, match=said):
        load_base(str(saved(file, tmp_path / "part.safetensors")), device=CPU)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4265380512\n"
NO_WEIGHTS = {
    "a web page": b"\n<!DOCTYPE html><html>Sign in</html>",
    "a Git LFS pointer": POINTER,
    "a PNG picture": b"\x89PNG\r\n\x1a\n" + bytes(40),
    "a JPEG picture": b"\xff\xd8\xff\xe0" + bytes(40),
    "a JSON text": b'{"error": "not found"}',
    "an empty file": b"",
    "a gzip archive": b"\x1f\x8b\x08\x00" + bytes(40),
    "a GGUF file": b"GGUF" + bytes(40),
    "a text": b"Please log in first.",
}


@pytest.mark.parametrize("what", NO_WEIGHTS)
def test_what_is_no_file_of_weights_is_named(tmp_path: Path, what: str) -> None:
    """F28: for bases and motion modules, by the first bytes; a pointer fetched again is a pointer again."""
    for ending in ("ckpt", "safetensors"):
        path = tmp_path / f"a.{ending}"
        path.write_bytes(NO_WEIGHTS[what])
        for read in (
            lambda path: load_base(str(path), device=CPU),
            lambda path: load_motion(path, device=CPU),
        ):
            with pytest.raises(UserError, match=f"can not be read: it is {what}") as caught:
                read(path)
            assert what == "an empty file" or "again" not in caught.value.do


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_pointer_within_a_folder_is_named(folders: dict[int, Path], tmp_path: Path, part: str) -> None:
    shutil.copytree(folders[1], tmp_path / "sd")
    (file,) = (tmp_path / "sd" / part).glob("*.safetensors")
    file.write_bytes(POINTER)
    with pytest.raises(UserError, match=r"is a Git LFS pointer[\s\S]*git lfs pull"):
        load_base(str(tmp_path / "sd"), device=CPU)


def test_a_zip_of_something_else_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("model/readme.txt", "hello")
    with pytest.raises(UserError, match="a zip archive, and not one of torch"):
        read_tensors(tmp_path / "a.pt")


def test_files_of_weights_are_not_taken_for_others(tmp_path: Path) -> None:
    """Also those whose length looks like another kind's first bytes."""
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    torch.save({"a": torch.ones(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "page.safetensors").write_bytes(b"<" + bytes(7) + b"{" + bytes(59))
    assert {describe_bytes(path) for path in tmp_path.iterdir()} == {None}
    shutil.copy(tmp_path / "a.pt", tmp_path / "named.safetensors")
    assert read_metadata(tmp_path / "named.safetensors") == {}


@pytest.mark.parametrize("config", ["{", "[1]", '{"a": ' * 2000])
@pytest.mark.parametrize("part", ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_a_damaged_config_is_told(tiny_base_folder: Path, tmp_path: Path, part: str, config: str) -> None:
    shutil.copytree(tiny_base_folder, tmp_path / "base")
    (tmp_path / "base" / part).write_text(config)
    with pytest.raises(UserError, match=f"{Path(part).name} can not be read"):
        load_base(str(tmp_path / "base"), device=CPU)


@pytest.mark.parametrize(
    ("part", "setting", "said"),
    [
        ("unet/config.json", {"time_cond_proj_dim": 256}, "a latent consistency model"),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, "a VAE whose latents are centred"),
        ("vae/config.json", {"latents_std": [1.0] * 4}, "a VAE whose latents are scaled"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatch"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "a model that predicts 'sample'"),
    ],
)
def test_folders_of_other_kinds_are_named(
    tiny_base_folder: Path, tmp_path: Path, part: str, setting: dict[str, Any], said: str
) -> None:
    """What would pass for Stable Diffusion and never get what it was trained with."""
    shutil.copytree(tiny_base_folder, tmp_path / "base")
    path = tmp_path / "base" / part
    path.write_text(json.dumps({**json.loads(path.read_text()), **setting}))
    with pytest.raises(UserError, match=said):
        load_base(str(tmp_path / "base"), device=CPU)


def test_a_unet_that_reads_the_guidance_is_not_filmed(tiny_base: Base) -> None:
    tiny_base.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(UserError, match="time_cond_proj_dim"):
        VideoUNet(tiny_base.unet, MotionModules.for_unet(tiny_base.unet, motion_num_attention_heads=2))


@pytest.mark.parametrize("stated", ["yaml", "header", "key", ""])
def test_the_prediction_is_measured_only_where_nobody_states_it_and_never_in_float16(
    tensors: dict[int, dict[str, Tensor]], tmp_path: Path, stated: str
) -> None:
    """float16 takes minutes on CPUs."""
    more = {"v_pred": torch.zeros(0)} if stated == "key" else {}
    path = tmp_path / "sd2.safetensors"
    metadata = {"modelspec.prediction_type": "v"} if stated == "header" else None
    save_file({name: t.contiguous().clone() for name, t in (tensors[2] | more).items()}, path, metadata=metadata)
    if stated == "yaml":  # in Latin-1
        path.with_suffix(".yaml").write_bytes('author: "M\xfcller"\nparameterization: "v"\n'.encode("latin-1"))
    asked: list[torch.dtype] = []

    def look(module: nn.Module, _inputs: object) -> None:
        if isinstance(module, UNet2DConditionModel):
            asked.append(module.dtype)

    with nn.modules.module.register_module_forward_pre_hook(look):
        base = load_base(str(path), device=CPU, dtype=torch.float16)
    assert asked == ([] if stated else [torch.float32])
    assert base.scheduler_config["prediction_type"] == "v_prediction"
    assert base.unet.dtype == base.text_encoder.dtype == torch.float16


def test_pickles_that_hold_themselves_are_told(tmp_path: Path) -> None:
    endless: dict[str, Any] = {"weight": torch.ones(1)}
    endless["state_dict"] = endless
    torch.save(endless, tmp_path / "a.pt")
    with pytest.raises(UserError, match="nest more than 64 deep"):
        read_tensors(tmp_path / "a.pt")
    deep: Any = torch.ones(1)
    for _ in range(100):
        deep = [deep]
    torch.save({"weight": deep}, tmp_path / "b.pt")
    with pytest.raises(UserError, match="nest more than 64 deep"):
        read_tensors(tmp_path / "b.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(1).expand(400_000_000),
        torch.ones(1).expand(10**15),
        torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (10**9,)),
        torch.empty(10**12, device="meta"),
    ],
)
def test_tensors_that_claim_more_than_is_stored_are_told(tmp_path: Path, tensor: Tensor, zipped: bool) -> None:
    path = tmp_path / "a.pt"
    torch.save({"state_dict": {"weight": tensor}}, path, _use_new_zipfile_serialization=zipped)
    assert path.stat().st_size < 10_000
    with pytest.raises(UserError, match="fewer numbers in the file|sparse, quantised or without"):
        read_tensors(path)


def fake_repository(cache: Path, base: Path, commits: dict[str, str]) -> None:
    """A model as the hub's client keeps it: a branch or tag is a file with the commit."""
    repository = cache / "models--kept--model"
    (repository / "refs").mkdir(parents=True)
    for name, commit in commits.items():
        (repository / "refs" / name).write_text(commit)
        shutil.copytree(base, repository / "snapshots" / commit)


def test_a_hub_id_with_a_revision_is_resolved_once(
    tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = {"main": "a" * 40, "v1": "b" * 40}
    fake_repository(tmp_path, tiny_base_folder, commits)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    asked: list[object] = []
    real = huggingface_hub.snapshot_download

    def counted(*names: Any, **options: Any) -> str:
        asked.append(options.get("revision"))
        return str(real(*names, **options))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", counted)
    monkeypatch.chdir(tmp_path)
    assert find_base("kept/model").name == commits["main"]
    for _ in range(3):
        assert find_base("kept/model@v1").name == commits["v1"]
    assert asked == [None, "v1"]
    assert load_base("kept/model@v1", device=CPU).hash == weights_hash(tiny_base_folder)
    assert public_base_name("kept/model@v1") == "kept/model@v1"
    with pytest.raises(UserError, match="'kept/model@v2' can not be had from the hub"):
        find_base("kept/model@v2")


def test_a_model_that_the_hub_has_in_half_precision_alone(
    tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_base_folder, tmp_path / "hub")
    for file in (tmp_path / "hub").rglob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))

    def answer(_name: str, *, allow_patterns: list[str]) -> str:
        files = [file for file in (tmp_path / "hub").rglob("*") if file.is_file()]
        names = [str(file.relative_to(tmp_path / "hub")) for file in files]
        for name in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns):
            (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "hub" / name, tmp_path / "here" / name)
        return str(tmp_path / "here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    monkeypatch.chdir(tmp_path)
    base = load_base("half/model", device=CPU)
    wanted = load_base(str(tiny_base_folder), device=CPU)
    assert all(torch.equal(base.unet.state_dict()[name], t) for name, t in wanted.unet.state_dict().items())


def test_the_hash_of_large_weights_is_noted_and_never_stale(
    tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CDVIDEO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "NOTED_FROM", 0)
    monkeypatch.setattr(hashes, "SETTLED", 0.0)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base_folder, copy)
    read: list[Path] = []
    real = hashes._digest_file
    monkeypatch.setattr(hashes, "_digest_file", lambda digest, file: (read.append(file), real(digest, file)))
    first = weights_hash(copy)
    assert len(read) == 3 and weights_hash(copy) == first and len(read) == 3
    notes = tmp_path / "cache" / "hashes.json"
    assert str(copy) not in notes.read_text(), "no paths in it"
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.bias"][0] += 1
    stat = file.stat()
    save_file(weights, file, metadata={"format": "pt"})
    assert file.stat().st_size == stat.st_size
    second = weights_hash(copy)
    assert second != first, "of equal size"
    notes.write_text("{damaged")
    assert weights_hash(copy) == second, "a note that can not be read is done without"
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("CDVIDEO_CACHE", str(blocked / "below"))
    assert weights_hash(copy) == second, "where nothing can be noted"


def test_names_of_bases_tell_no_folders(tmp_path: Path) -> None:
    (tmp_path / "alice-model.safetensors").write_bytes(b"")
    assert public_base_name(f"{tmp_path}/alice-model.safetensors") == "alice-model.safetensors"
    assert public_base_name("/home/alice/gone/model.safetensors") == "model.safetensors"
    assert public_base_name(r"C:\Users\alice\model.ckpt") == "model.ckpt"
    assert public_base_name("owner/model") == "owner/model" and public_base_name("tiny") == "tiny"


def test_motion_modules_that_are_not_there_are_told(tmp_path: Path) -> None:
    """F29."""
    with pytest.raises(UserError, match=r"there is no motion file .*missing\.ckpt"):
        load_motion(tmp_path / "missing.ckpt", device=CPU)


def test_motion_modules_under_wrapped_names(tmp_path: Path) -> None:
    adapter = animatediff_names.make_adapter("v3")
    weights = {f"module._orig_mod.unet.{name}": tensor for name, tensor in animatediff_names.official(adapter).items()}
    motion = load_motion(saved(weights, tmp_path / "mm.safetensors"), device=CPU)
    assert all(torch.equal(motion.state_dict()[name], tensor) for name, tensor in adapter.state_dict().items())


def test_motion_modules_under_unknown_names_are_told(tmp_path: Path) -> None:
    path = saved({"other.motion_modules.0.norm.weight": torch.ones(2)}, tmp_path / "mm.safetensors")
    with pytest.raises(UserError, match=r"under unknown names, such as other\.motion_modules"):
        load_motion(path, device=CPU)


@pytest.mark.parametrize("value", ['"abc"', "null", "{}", "0"])
def test_a_motion_config_of_other_types_is_told(tmp_path: Path, value: str) -> None:
    (tmp_path / "config.json").write_text(
        f'{{"_class_name": "MotionAdapter", "block_out_channels": [32, 64], "motion_num_attention_heads": {value}}}'
    )
    with pytest.raises(UserError):
        load_motion(tmp_path, device=CPU)


def test_what_motion_modules_were_made_for_is_named() -> None:
    with init_empty_weights():
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D",) * 3,
            up_block_types=("UpBlock2D",) * 3,
        )
    with pytest.raises(UserError, match=r"\(of Stable Diffusion 1\.x or 2\.x\)[\s\S]*\(of Stable Diffusion XL\)"):
        MotionConfig().check_fits(unet)


def test_a_motion_lora_in_diffusers_folder(tmp_path: Path) -> None:
    """F30: as the file in it."""
    adapter = animatediff_names.make_adapter("v2")
    mm = saved(animatediff_names.official(adapter), tmp_path / "mm.safetensors")
    (tmp_path / "zoom").mkdir()
    lora = saved(animatediff_names.official_lora(adapter), tmp_path / "zoom" / "diffusion_pytorch_model.safetensors")
    of_folder, of_file = load_motion(mm, device=CPU), load_motion(mm, device=CPU)
    fold_motion_lora(of_folder, tmp_path / "zoom")
    fold_motion_lora(of_file, lora)
    ours, theirs = of_folder.state_dict(), of_file.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    shutil.copy(lora, lora.with_name("another.safetensors"))
    lora.rename(lora.with_name("one.safetensors"))  # no longer the one that diffusers would read
    with pytest.raises(UserError, match="holds another.safetensors, one.safetensors"):
        fold_motion_lora(of_folder, tmp_path / "zoom")


def test_motion_director_s_lora(tmp_path: Path) -> None:
    """F17: attentions' outputs and the layers between them too; W + up @ down in each."""
    mm = saved(animatediff_names.official(animatediff_names.make_adapter("v2")), tmp_path / "mm.safetensors")
    place = "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0"
    ours = "down_blocks.0.motion_modules.0.transformer_blocks.0"
    changed = {
        f"{place}.attention_blocks.0.processor.to_q_lora": (f"{ours}.attn1.to_q.weight", 32, 32),
        f"{place}.attention_blocks.0.to_out.processor.0_lora": (f"{ours}.attn1.to_out.0.weight", 32, 32),
        f"{place}.ff.net.0.processor.proj_lora": (f"{ours}.ff.net.0.proj.weight", 256, 32),
        f"{place}.ff.net.processor.2_lora": (f"{ours}.ff.net.2.weight", 32, 128),
    }
    lora = {}
    for stem, (_, out, into) in changed.items():
        lora |= {f"{stem}.up.weight": torch.randn(out, 4), f"{stem}.down.weight": torch.randn(4, into)}
    motion = load_motion(mm, device=CPU)
    before = {name: tensor.clone() for name, tensor in motion.state_dict().items()}
    said: list[str] = []
    fold_motion_lora(motion, saved(lora, tmp_path / "temporal_unet.safetensors"), strength=0.5, report=said.append)
    assert "matched 8/8" in said[0]
    for stem, (name, *_) in changed.items():
        wanted = before[name] + 0.5 * lora[f"{stem}.up.weight"] @ lora[f"{stem}.down.weight"]
        assert torch.allclose(motion.state_dict()[name], wanted, atol=1e-5)
