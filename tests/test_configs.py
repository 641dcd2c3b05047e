"""Every file under configs/ is one that the program takes."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from cdvideo.config import load_config, to_yaml

CONFIGS = Path(__file__).parents[1] / "configs"
CLASSES = {
    "animate": "cdvideo.sampling.config.AnimateConfig",
    "base": "cdvideo.world.config.MakeBaseConfig",
    "concept": "cdvideo.concept.config.ConceptConfig",
}
FILES = sorted(str(file.relative_to(CONFIGS)) for file in CONFIGS.rglob("*.y*ml"))


def config_class(folder: str) -> type:
    module, _, name = CLASSES[folder].rpartition(".")
    return getattr(import_module(module), name)


def test_there_are_configs() -> None:
    assert FILES


@pytest.mark.parametrize("file", FILES)
def test_config_validates(file: str) -> None:
    config = load_config(config_class(Path(file).parts[0]), file=CONFIGS / file)
    assert config.__class__.__name__ == CLASSES[Path(file).parts[0]].rpartition(".")[2]


@pytest.mark.parametrize("file", FILES)
def test_config_says_what_it_is_for(file: str) -> None:
    assert (CONFIGS / file).read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("folder", sorted(CLASSES))
def test_defaults_are_valid_and_survive_yaml(folder: str, tmp_path: Path) -> None:
    defaults = load_config(config_class(folder))
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(defaults), encoding="utf-8")
    assert load_config(config_class(folder), file=file) == defaults
