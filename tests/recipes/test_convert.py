"""scripts/convert.py from end to end, and films of files from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cdvideo.base.loader import load_base
from cdvideo.cli import run_main
from cdvideo.concept.file import load_concept, save_concept
from cdvideo.interchange import folders, main
from cdvideo.interchange.config import parse_files
from cdvideo.sampling import animate
from tests.interchange.parts import ADAPTERS, learned

CPU = torch.device("cpu")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base_folder: Path) -> Path:
    """A folder with a run's concept, `runs/rex/concept.safetensors`, and a LoRA of kohya's, `style.safetensors`."""
    monkeypatch.chdir(tmp_path)
    base = load_base(str(tiny_base_folder), device=CPU)
    Path("runs/rex").mkdir(parents=True)
    save_concept(learned(base, ADAPTERS["kv"], rows=1), Path("runs/rex/concept.safetensors"))
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_v"
    factors = {f"{stem}.lora_down.weight": torch.randn(2, 32), f"{stem}.lora_up.weight": torch.randn(32, 2)}
    save_file(factors, "style.safetensors", metadata={"modelspec.trigger_phrase": "in a style"})
    return tmp_path


def convert(base_folder: Path, *arguments: str) -> int:
    return run_main(main.main, [*arguments, "--base", str(base_folder)])


def still(base_folder: Path, concept: str, out: str) -> int:
    flags = ["--prompt", "a sks dog", "--still", "--steps", "2", "--base", str(base_folder), "--out", out]
    return run_main(animate.main, [*flags, "--concept", concept])


def picture(out: str) -> np.ndarray:
    return np.asarray(Image.open(Path(out) / "a-sks-dog-0.png")).astype(int)


@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft", "custom-diffusion"])
def test_there_and_back_gives_the_same_picture(
    tiny_base_folder: Path, workplace: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    concept = Path("runs/rex/concept.safetensors")
    assert convert(tiny_base_folder, str(concept), "--to", to) == 0
    said = capsys.readouterr().out
    folder = Path(f"runs/converted/rex-{to}")
    assert f"wrote {folder}/" in said and "peak memory" in said
    if to != "custom-diffusion":
        assert "error" in said and "of the change" in said
    assert convert(tiny_base_folder, str(folder), "--to", "cdvideo", "--out", "back", "--class-word", "dog") == 0
    (back,) = Path("back").iterdir()
    assert load_concept(back).metadata.class_words == {"sks": "dog"}
    for name, file in (("ours", concept), ("foreign", folder), ("back", back), ("none", "none")):
        assert still(tiny_base_folder, str(file), name) == 0
    assert np.abs(picture("ours") - picture("foreign")).max() <= 1
    assert np.abs(picture("ours") - picture("back")).max() <= 1
    assert np.abs(picture("ours") - picture("none")).max() > 2


def test_films_take_several_files_with_weights(
    tiny_base_folder: Path, workplace: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert still(tiny_base_folder, "runs/rex/concept.safetensors,style.safetensors:0.5", "both") == 0
    assert "kohya LoRA style.safetensors: matched 2/2 tensors" in capsys.readouterr().out
    settings = json.loads(Path("both/a-sks-dog-0.json").read_text())
    assert settings["concept"] == "rex + style at 0.5"
    assert still(tiny_base_folder, "style.safetensors", "style") == 0
    assert "lacks the concept's token" not in caplog.text, "a LoRA has none"
    assert still(tiny_base_folder, "runs/rex/concept.safetensors", "rex") == 0
    assert np.abs(picture("both") - picture("rex")).max() > 2
    assert np.abs(picture("both") - picture("style")).max() > 2


def test_several_become_one(tiny_base_folder: Path, workplace: Path) -> None:
    assert convert(tiny_base_folder, "style.safetensors:0.5", "--to", "kohya", "--out", "half") == 0
    before, after = load_file("style.safetensors"), load_file("half/style.safetensors")
    up, down = (next(key for key in before if part in key) for part in ("up.weight", "down.weight"))
    alpha = after[up.replace("lora_up.weight", "alpha")]
    torch.testing.assert_close(after[up] @ after[down] * alpha / 2, 0.5 * before[up] @ before[down])


def test_inspecting_needs_no_base(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(main.main, ["style.safetensors,runs/rex", "--inspect", "--base", "absent"]) == 0
    said = capsys.readouterr().out
    assert "style.safetensors: kohya LoRA, 2 tensors" in said and "2 in 1 layers" in said
    assert "modelspec.trigger_phrase: in a style" in said
    assert "cdvideo concept" in said and 'tokens "sks dog"' in said


def test_the_token_may_get_another_name(tiny_base_folder: Path, workplace: Path) -> None:
    concept = "runs/rex/concept.safetensors"
    assert convert(tiny_base_folder, concept, "--to", "textual-inversion", "--token", "<rex>", "--out", "ti") == 0
    assert load_file("ti/rex.safetensors").keys() == {"<rex>"}
    assert convert(tiny_base_folder, "style.safetensors", "--to", "cdvideo", "--token", "<rex>") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["style.safetensors"], "nothing to do"),
        (["absent.safetensors", "--to", "kohya"], "no file or folder absent.safetensors"),
        (["style.safetensors:0", "--to", "kohya"], "other than 0"),
        (["style.safetensors", "--to", "kohya", "--rank", "0"], "rank=0"),
        (["style.safetensors", "--to", "cdvideo", "--rank", "2"], "rank=2 with to=cdvideo, which is no LoRA"),
        (
            ["runs/rex/concept.safetensors", "--to", "kohya", "--token", "two words"],
            "token=two words: must be one word",
        ),
        (["style.safetensors", "--to", "custom-diffusion"], "changes mid_block"),
        (["style.safetensors", "--to", "textual-inversion"], "no token"),
    ],
)
def test_what_can_not_be_done_is_told(
    tiny_base_folder: Path, workplace: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(tiny_base_folder, *arguments) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and "allowed:" in complaint and "do:" in complaint


def test_weights_stand_behind_a_colon() -> None:
    assert parse_files("a.pt:0.8, b.safetensors ,c:x.pt:-1e-1,") == (
        (Path("a.pt"), 0.8),
        (Path("b.safetensors"), 1.0),
        (Path("c:x.pt"), -0.1),
    )


def test_a_run_s_folder_is_its_concept(workplace: Path) -> None:
    Path("runs/rex/state.safetensors").write_bytes(b"the state of the run")
    assert folders.files_of(Path("runs/rex")) == [Path("runs/rex/concept.safetensors")]
