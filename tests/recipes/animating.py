"""What the tests of scripts/animate.py share."""

from __future__ import annotations

from pathlib import Path

import torch

from cdvideo.base.loader import load_base
from cdvideo.cli import run_main
from cdvideo.concept.concept import Concept, ConceptMetadata
from cdvideo.concept.file import save_concept
from cdvideo.concept.kv import kv_projections
from cdvideo.sampling.animate import main

CPU = torch.device("cpu")
QUICK = ["--frames", "3", "--steps", "2"]
PROMPT = "a sks dog surfing"


def save_tiny_concept(base_folder: Path, path: Path, token: str = "sks") -> None:
    base = load_base(str(base_folder), device=CPU)
    generator = torch.Generator().manual_seed(1)
    metadata = ConceptMetadata(
        class_words={token: "dog"},
        initialiser="dog",
        base_name="tiny",
        base_hash=base.hash,
        resolution=64,
        prediction_type="v_prediction",
        steps=1,
        lr=1e-4,
        token_lr=1e-3,
        seed=0,
        loss_weights={},
        sample_prompt="",
    )
    kv = {
        name: torch.randn(linear.weight.shape, generator=generator).half()
        for name, linear in kv_projections(base.unet).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_concept(Concept(tokens={token: torch.randn(1, 32, generator=generator)}, weights=kv, metadata=metadata), path)


def call(base_folder: Path, *arguments: str, prompt: str = PROMPT) -> int:
    return run_main(main, ["--prompt", prompt, "--base", str(base_folder), *QUICK, *arguments])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
