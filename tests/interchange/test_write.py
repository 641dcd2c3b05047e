"""What we write: read again it is what it was, and diffusers' own loaders draw with it what our sampler draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AnimateDiffPipeline, MotionAdapter, StableDiffusionPipeline
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor

from cdvideo.base.loader import Base, load_base
from cdvideo.concept.concept import Concept
from cdvideo.concept.file import SAMPLE_CONCEPT, load_concept
from cdvideo.errors import UserError
from cdvideo.interchange import write
from cdvideo.interchange.load import load_adapters
from cdvideo.motion.files import load_motion, save_motion
from cdvideo.motion.modules import MotionModules
from cdvideo.sampling.denoise import draw_noise
from cdvideo.sampling.image import sample_images
from cdvideo.sampling.video import sample_video
from tests.interchange.parts import ADAPTERS, NEGATIVE, PROMPT, draw_with, learned, peer_parts, with_text
from tests.interchange.test_lycoris import lycoris_file

Draw = Callable[..., Tensor]
WRITERS = {
    "cdvideo": write.write_cdvideo,
    "kohya": write.write_kohya,
    "diffusers": write.write_diffusers,
    "peft": write.write_peft,
    "custom-diffusion": write.write_custom_diffusion,
}


def written(base: Base, concept: Concept, folder: Path, to: str, rank: int | None = None) -> list[str]:
    lines: list[str] = []
    WRITERS[to](write.Export(base, concept, folder, "mine", rank, lines.append))
    return lines


def a_concept(base: Base, name: str) -> Concept:
    return with_text(learned(base, ADAPTERS["lora"])) if name == "lora+text" else learned(base, ADAPTERS[name])


@pytest.mark.parametrize(
    ("name", "to"),
    [
        *((name, to) for name in ("kv", "lora", "dora") for to in ("cdvideo", "kohya", "diffusers", "peft")),
        *(("lora+text", to) for to in ("cdvideo", "kohya", "diffusers")),
        ("kv", "custom-diffusion"),
    ],
)
def test_there_and_back(tiny_base: Base, tmp_path: Path, draw: Draw, name: str, to: str) -> None:
    """Rank is not limited, so even a change of full rank comes back whole."""
    concept = a_concept(tiny_base, name)
    written(tiny_base, concept, tmp_path, to)
    again = load_adapters(tiny_base, [(tmp_path, 1.0)])
    before, after, plain = draw(concept), draw(again), draw(None)
    print(f"{name} -> {to} -> back: max abs difference of latents {(after - before).abs().max():.2e}")
    assert again.tokens.keys() == {"sks"} and torch.equal(again.tokens["sks"], concept.tokens["sks"])
    assert (before - plain).abs().max() > 1e-2
    assert (after - before).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "to"),
    [
        *((name, to) for name in ("kv", "lora", "lora+text") for to in ("kohya", "diffusers")),
        ("dora", "diffusers"),  # diffusers drops kohya's dora_scale
    ],
)
def test_diffusers_draws_the_same_with_our_lora(
    tiny_base: Base, tmp_path: Path, draw: Draw, pipeline: StableDiffusionPipeline, name: str, to: str
) -> None:
    concept = a_concept(tiny_base, name)
    written(tiny_base, concept, tmp_path, to)
    ours, plain = draw(concept), draw(None)
    weight_name = "mine.safetensors" if to == "kohya" else "pytorch_lora_weights.safetensors"
    pipeline.load_lora_weights(tmp_path, weight_name=weight_name)
    pipeline.load_textual_inversion(tmp_path, weight_name="sks.safetensors")
    theirs = draw_with(pipeline)
    print(f"{name} as {to}: max abs difference of latents {(theirs - ours).abs().max():.2e}")
    assert (ours - plain).abs().max() > 1e-2
    assert (theirs - ours).abs().max() <= 1e-3


@pytest.mark.parametrize("form", ["loha", "lokr tucker"])
@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_lycoris_that_diffusers_can_not_read_goes_there_through_us(
    tiny_base: Base, tmp_path: Path, draw: Draw, pipeline: StableDiffusionPipeline, form: str, to: str
) -> None:
    lycoris_file(tiny_base, tmp_path / "theirs.safetensors", form)
    concept = load_adapters(tiny_base, [(tmp_path / "theirs.safetensors", 1.0)])
    written(tiny_base, concept, tmp_path / to, to)
    ours, plain = draw(concept), draw(None)
    again = draw(load_adapters(tiny_base, [(tmp_path / to, 1.0)]))
    pipeline.load_lora_weights(
        tmp_path / to, weight_name="mine.safetensors" if to == "kohya" else "pytorch_lora_weights.safetensors"
    )
    theirs = draw_with(pipeline)
    print(f"{form} as {to}: max abs difference of latents {(theirs - ours).abs().max():.2e}")
    assert (ours - plain).abs().max() > 1e-2
    assert (again - ours).abs().max() <= 1e-4
    assert (theirs - ours).abs().max() <= 1e-3


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_the_concept_that_ships_in_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    """On the embedded base, whose own files diffusers reads: nothing here is random but the noise."""
    base = load_base("tiny", device=torch.device("cpu"))
    concept = load_concept(SAMPLE_CONCEPT, base=base)
    written(base, concept, tmp_path, to)
    monkeypatch.setattr("cdvideo.sampling.image.decode_latents", lambda _vae, latents_BCHW, **_: latents_BCHW)
    options: dict[str, Any] = {"guidance": 4.0, "steps": 3, "negative_prompt": NEGATIVE}
    ours, plain = (sample_images(base, [PROMPT], seeds=[5], concept=each, **options) for each in (concept, None))

    pipeline = StableDiffusionPipeline(**peer_parts(load_base("tiny", device=torch.device("cpu"))))
    weight_name = "mine.safetensors" if to == "kohya" else "pytorch_lora_weights.safetensors"
    pipeline.load_lora_weights(tmp_path, weight_name=weight_name)
    pipeline.load_textual_inversion(tmp_path, weight_name="sks.safetensors")
    theirs = draw_with(pipeline, noise=draw_noise([5], tuple(ours.shape[1:])))
    print(f"{to}: max abs difference of latents {(theirs - ours).abs().max():.2e}")
    assert (ours - plain).abs().max() > 1e-2
    assert (theirs - ours).abs().max() <= 1e-3


def test_diffusers_draws_the_same_with_our_custom_diffusion(
    tiny_base: Base, tmp_path: Path, draw: Draw, pipeline: StableDiffusionPipeline
) -> None:
    concept = learned(tiny_base, ADAPTERS["kv"])
    written(tiny_base, concept, tmp_path, "custom-diffusion")
    file = "pytorch_custom_diffusion_weights.bin"
    pipeline.unet.load_attn_procs(tmp_path, weight_name=file, _pipeline=pipeline)
    pipeline.load_textual_inversion(tmp_path, weight_name="sks.bin")
    ours, theirs = draw(concept), draw_with(pipeline)
    assert (ours - draw(None)).abs().max() > 1e-2
    assert (theirs - ours).abs().max() <= 1e-3


def test_peft_reads_our_folder(tiny_base: Base, tmp_path: Path, draw: Draw, pipeline: StableDiffusionPipeline) -> None:
    concept = learned(tiny_base, ADAPTERS["lora"])
    written(tiny_base, concept, tmp_path, "peft")
    pipeline.unet = PeftModel.from_pretrained(pipeline.unet, tmp_path).get_base_model()
    pipeline.load_textual_inversion(tmp_path, weight_name="sks.safetensors")
    ours, theirs = draw(concept), draw_with(pipeline)
    assert (ours - draw(None)).abs().max() > 1e-2
    assert (theirs - ours).abs().max() <= 1e-3


@pytest.mark.parametrize(
    ("name", "to"), [("kv", "diffusers"), ("kv", "kohya"), ("dora", "diffusers"), ("lora+text", "diffusers")]
)
def test_diffusers_films_the_same_with_our_lora(
    tiny_base: Base, tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, to: str
) -> None:
    concept = a_concept(tiny_base, name)
    motion = MotionModules.for_unet(tiny_base.unet, motion_num_attention_heads=2, norm_mode="diffusers")
    for parameter in motion.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.15
    save_motion(motion, tmp_path / "motion")
    written(tiny_base, concept, tmp_path, to)

    monkeypatch.setattr("cdvideo.sampling.video.decode_frames", lambda _base, latents_FCHW, **_: latents_FCHW)
    options: dict[str, Any] = {"negative_prompt": NEGATIVE, "seed": 5, "frames": 4, "steps": 3, "guidance": 4.0}
    motion = load_motion(tmp_path / "motion", device=torch.device("cpu"))
    ours, plain = (sample_video(tiny_base, motion, PROMPT, concept=each, **options) for each in (concept, None))

    parts = peer_parts(load_base(str(tiny_base_folder), device=torch.device("cpu")))
    parts = {key: part for key, part in parts.items() if "safety" not in key}
    pipeline = AnimateDiffPipeline(**parts, motion_adapter=MotionAdapter.from_pretrained(tmp_path / "motion"))
    pipeline.set_progress_bar_config(disable=True)
    weight_name = "mine.safetensors" if to == "kohya" else "pytorch_lora_weights.safetensors"
    pipeline.load_lora_weights(tmp_path, weight_name=weight_name)
    pipeline.load_textual_inversion(tmp_path, weight_name="sks.safetensors")
    theirs = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        guidance_scale=4.0,
        num_inference_steps=3,
        num_frames=4,
        latents=draw_noise([5], (4, 4, 8, 8)).transpose(1, 2),
        output_type="latent",
    ).frames
    difference = (theirs[0].transpose(0, 1) - torch.as_tensor(ours)).abs().max()
    print(f"{name}: max abs difference of latents {difference:.2e}")
    assert (torch.as_tensor(ours) - torch.as_tensor(plain)).abs().max() > 1e-2
    assert difference <= 1e-3


def test_a_limited_rank_tells_its_error(tiny_base: Base, tmp_path: Path, draw: Draw) -> None:
    concept = learned(tiny_base, ADAPTERS["kv"])
    said = {rank: written(tiny_base, concept, tmp_path / str(rank), "kohya", rank)[0] for rank in (2, 8, None)}
    errors = {rank: float(line.partition("error ")[2].split()[0]) for rank, line in said.items()}
    assert errors[2] > errors[8] > 0.01 and errors[None] < 1e-6
    assert "of rank 2 to 2" in said[2]
    ours = draw(concept)
    off = {r: (draw(load_adapters(tiny_base, [(tmp_path / str(r), 1.0)])) - ours).abs().max() for r in (2, 8, None)}
    assert off[2] > off[8] > off[None]
    # The relative error is that of the weights themselves.
    change = torch.cat([delta.float().flatten() for delta in concept.weights.values()])
    near = load_adapters(tiny_base, [(tmp_path / "2" / "mine.safetensors", 1.0)])
    alpha = float(near.metadata.adapter_settings["alpha"])
    approximated = []
    for name in concept.weights:
        layer = name.removesuffix(".delta")
        down, up = near.weights[f"{layer}.lora_A.weight"], near.weights[f"{layer}.lora_B.weight"]
        approximated.append((up @ down * alpha / len(down)).flatten())
    assert (torch.cat(approximated) - change).norm() / change.norm() == pytest.approx(errors[2], rel=0.05)


def test_a_lora_of_a_higher_rank_is_brought_to_the_one_asked_for(tiny_base: Base, tmp_path: Path, draw: Draw) -> None:
    concept = learned(tiny_base, ADAPTERS["lora"])
    rank = int(concept.metadata.adapter_settings["rank"])
    (said,) = written(tiny_base, concept, tmp_path / "less", "kohya", rank - 1)[:1]
    assert f"of rank {rank - 1} to {rank - 1}: error" in said
    assert not any("error" in line for line in written(tiny_base, concept, tmp_path / "same", "kohya", rank))
    less, same = (draw(load_adapters(tiny_base, [(tmp_path / name, 1.0)])) for name in ("less", "same"))
    assert (same - draw(concept)).abs().max() < 1e-3 < (less - draw(concept)).abs().max()


def test_biases_have_no_place_in_a_lora(tiny_base: Base, tmp_path: Path) -> None:
    concept = learned(tiny_base, {"kind": "unet"})
    with pytest.raises(UserError, match=r"changes unet\..*bias and \d+ more"):
        written(tiny_base, concept, tmp_path, "kohya")
    said = written(tiny_base, concept, tmp_path, "kohya", rank=4)
    assert "biases and norms left out" in said[0]
    assert load_adapters(tiny_base, [(tmp_path, 1.0)]).metadata.adapter == "lora"


def test_what_a_form_can_not_hold_is_refused(tiny_base: Base, tmp_path: Path) -> None:
    token = learned(tiny_base, {"kind": "token"})
    lora, text = learned(tiny_base, ADAPTERS["lora"]), with_text(learned(tiny_base, ADAPTERS["lora"]))
    for concept, to, said in (
        (token, "kohya", "token alone"),
        (token, "custom-diffusion", "no weight"),
        (lora, "custom-diffusion", "changes "),
        (text, "peft", "text encoder"),
    ):
        with pytest.raises(UserError, match=said):
            written(tiny_base, concept, tmp_path, to)
    assert list(tmp_path.iterdir()) == []


def test_the_attention_s_other_weights_go_into_custom_diffusion(tiny_base: Base, tmp_path: Path, draw: Draw) -> None:
    targets = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
    concept = learned(tiny_base, {"kind": "lora", "targets": targets})
    written(tiny_base, concept, tmp_path, "custom-diffusion")
    again = load_adapters(tiny_base, [(tmp_path, 1.0)])
    assert again.metadata.adapter == "unet"
    assert (draw(again) - draw(concept)).abs().max() <= 1e-5


def test_kohya_s_header_says_what_it_is(tiny_base: Base, tmp_path: Path) -> None:
    written(tiny_base, learned(tiny_base, ADAPTERS["lora"]), tmp_path, "kohya")
    with safe_open(tmp_path / "mine.safetensors", framework="pt") as file:
        header = file.metadata()
    assert header["ss_network_module"] == "networks.lora" and header["ss_network_dim"] == "3"
    assert header["modelspec.trigger_phrase"] == "sks dog" and header["modelspec.title"] == "mine"
    assert str(tmp_path) not in str(header)


def test_textual_inversion_is_the_token_alone(tiny_base: Base, tmp_path: Path) -> None:
    concept, lines = learned(tiny_base, ADAPTERS["kv"]), []
    export = write.Export(tiny_base, concept, tmp_path, "mine", None, lines.append)
    write.write_textual_inversion(export)
    assert [path.name for path in tmp_path.iterdir()] == ["sks.safetensors"]
    assert "left out" in lines[0]
    again = load_adapters(tiny_base, [(tmp_path, 1.0)])
    assert again.metadata.adapter == "token" and torch.equal(again.tokens["sks"], concept.tokens["sks"])


def test_tokens_make_plain_file_names() -> None:
    assert write.file_name("<new1>") == "new1" and write.file_name("con") == "con-token"
    assert write.file_name("../a b") == "..-a-b"
