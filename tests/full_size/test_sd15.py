"""Stable Diffusion 1.5 at its full size with random weights: it fits in memory, equals diffusers, trains and films.

Slow: several minutes on one core; 11 GB of disk, 8 GB of memory. `-m slow -s` shows what was measured.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import MotionAdapter, UNetMotionModel

from cdvideo.base.loader import load_base
from cdvideo.base.text import encode_text, tokenize
from cdvideo.motion.files import load_motion
from cdvideo.motion.video_unet import VideoUNet
from cdvideo.sampling.denoise import draw_noise
from cdvideo.sampling.prompt_kv import compile_prompts, reading
from tests.full_size.sd15 import save_motion_v3, save_one_file, save_sd15, weights_bytes

pytestmark = [pytest.mark.slow, pytest.mark.parity]

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
PROMPT = "a dog wearing headphones surfing"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """sd15, the base, whose own size is 256 pixels; and mm, motion modules of AnimateDiff v3. Gone afterwards."""
    folder = tmp_path_factory.mktemp("full")
    save_sd15(folder / "sd15", sample_size=32)
    save_motion_v3(folder / "mm")
    yield folder
    shutil.rmtree(folder)


LOADING = """
import sys, torch
from pathlib import Path
from cdvideo.base.loader import load_base
from cdvideo.base.memory import weight_bytes
from cdvideo.cli import peak_memory_bytes
status = Path("/proc/self/status").read_text()
before = int(status.partition("VmRSS:")[2].split()[0]) * 1024
base = load_base(sys.argv[1], device=torch.device("cpu"), dtype=getattr(torch, sys.argv[2]), report=print)
# Weights that are not cast lie in their file and take room as they are read: so all of them are read.
for module in base.modules:
    for parameter in module.parameters():
        parameter.sum()
print("took", weight_bytes(*base.modules), peak_memory_bytes() - before, before)
"""


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("sd15", "float32"),
        ("sd15", "bfloat16"),
        ("sd15.safetensors", "float32"),
        ("sd15.safetensors", "bfloat16"),
        ("sd15.ckpt", "bfloat16"),
    ],
)
def test_loading_holds_the_weights_once(folder: Path, name: str, dtype: str) -> None:
    """A base in float32, as it is and cast: at its highest the process has grown by the weights alone."""
    path = folder / name
    if path.suffix:
        save_one_file(folder / "sd15", path)
    said = run(sys.executable, "-c", LOADING, str(path), dtype)
    if path.suffix:
        path.unlink()
    assert "matched UNet 686/686, VAE 248/248, text encoder 196/196" in said
    weights, grown, before = (int(number) for number in said.split("took ")[1].split())
    print(
        f"{name} in {dtype}: weights {weights / 1e9:.2f} GB, the process grew by {grown / 1e9:.2f} GB from "
        f"{before / 1e9:.2f} GB: {grown / weights:.3f} times the weights"
    )
    assert weights == pytest.approx(weights_bytes(folder / "sd15") / (1 if dtype == "float32" else 2), rel=1e-3)
    assert grown <= 1.15 * weights


@torch.no_grad()
def test_unets_equal_diffusers(folder: Path) -> None:
    """The image UNet on a compiled prompt, and the film's walk, which diffusers' model shares its weights with."""
    base = load_base(str(folder / "sd15"), device=CPU)
    latents_BCHW = draw_noise([0], (4, 32, 32))
    text_BLD = encode_text(base.text_encoder, tokenize(base.tokenizer, [PROMPT])).hidden_BLD
    theirs = base.unet(latents_BCHW, 500, text_BLD).sample
    with reading(base.unet, compile_prompts(base, [PROMPT])):
        ours = base.unet(latents_BCHW, 500, None).sample
    print(f"image UNet: max abs difference {(ours - theirs).abs().max():.2e}, spread {theirs.std():.2f}")
    assert theirs.std() > 0.1 and (ours - theirs).abs().max() <= 1e-4

    motion = load_motion(folder / "mm", device=CPU, norm_mode="diffusers")
    latents_BFCHW = draw_noise([1], (2, 4, 32, 32))
    ours = VideoUNet(base.unet, motion)(latents_BFCHW, 500, text_BLD)
    adapter = MotionAdapter.from_pretrained(folder / "mm")
    with init_empty_weights():  # without a copy of the weights
        peer = UNetMotionModel.from_unet2d(base.unet, adapter, load_weights=False)
    peer.load_state_dict({**base.unet.state_dict(), **adapter.state_dict()}, strict=True, assign=True)
    text_NLD = text_BLD.repeat_interleave(2, dim=0)
    theirs = peer.eval()(latents_BFCHW.transpose(1, 2), 500, text_NLD).sample.transpose(1, 2)
    still = base.unet(latents_BFCHW[0], 500, text_NLD).sample
    print(
        f"film UNet: max abs difference {(ours - theirs).abs().max():.2e}, motion {(ours[0] - still).abs().max():.2f}"
    )
    assert (ours[0] - still).abs().max() > 0.05
    assert (ours - theirs).abs().max() <= 1e-4


def test_the_scripts_end_well(folder: Path, tmp_path: Path) -> None:
    """Three steps of training, with the semantic loss, and two of a film of four frames, 256 pixels."""
    common = ["--base", str(folder / "sd15"), "--device", "cpu", "--out"]
    quick = ["--steps", "3", "optim.batch_size=1", "data.variants=1", "sample.every=0"]
    quick += ["data.focus=picture", "preserve.background_weight=0"]  # masks of the subject take hundreds of passes
    trained = run(sys.executable, "scripts/train_concept.py", *common, str(tmp_path / "run"), *quick)
    concept = tmp_path / "run" / "concept.safetensors"
    assert concept.is_file()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    last = next(metrics for line in lines if (metrics := json.loads(line))["step"] == 3)
    assert last["loss_denoise"] > 0 and last["loss_semantic"] > 0

    prompt = ["--prompt", "a sks dog surfing", "--concept", str(concept), "--motion", str(folder / "mm")]
    quick = ["--frames", "4", "--steps", "2", "--format", "gif"]
    filmed = run(sys.executable, "scripts/animate.py", *prompt, *common, str(tmp_path / "film"), *quick)
    assert len(list((tmp_path / "film").glob("*.gif"))) == 1
    for name, said in (("training", trained), ("filming", filmed)):
        peak = float(re.findall(r"peak memory ([\d.]+) GB", said)[-1])
        print(f"{name}: peak {peak:.2f} GB")
        assert peak <= 9


def run(*command: str) -> str:
    """What a process says; it must end well."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
