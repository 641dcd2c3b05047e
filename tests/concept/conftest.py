"""A concept small enough to be learned in a second: the tiny models, three pictures, a few steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from cdvideo.concept.config import ConceptConfig, DataConfig, OptimConfig, SemanticConfig
from cdvideo.media.images import Picture
from cdvideo.runs import Run, create_run


@pytest.fixture
def pictures() -> list[Picture]:
    """The same blue blob with a white patch, at three places."""
    found = []
    for number in range(3):
        image = Image.new("RGB", (80, 64), (40 * number, 160, 60))
        draw = ImageDraw.Draw(image)
        draw.ellipse((20 + 5 * number, 12, 60 + 5 * number, 52), fill=(30, 60, 230))
        draw.ellipse((30 + 5 * number, 20, 42 + 5 * number, 32), fill="white")
        found.append(Picture(name=f"{number}.png", image=image))
    return found


@pytest.fixture
def config() -> ConceptConfig:
    return ConceptConfig(
        steps=6,
        checkpoint_every=2,
        data=DataConfig(variants=2),
        semantic=SemanticConfig(phrases=4),
        optim=OptimConfig(batch_size=2, lr=1e-3),
    )


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with create_run(tmp_path / "runs", "sks-dog") as made:
        yield made
