"""Every file under configs/ is one that the program takes."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import yaml

from cdvideo.config import load_config, to_yaml

CONFIGS = Path(__file__).parents[1] / "configs"
CLASSES = {
    "animate": "cdvideo.sampling.config.AnimateConfig",
    "base": "cdvideo.world.config.MakeBaseConfig",
    "concept": "cdvideo.concept.config.ConceptConfig",
    "evaluation": "cdvideo.evaluation.config.ReportConfig",
}
GIVEN = {"animate": ["prompt=a dog"]}  # what has no default
FILES = sorted(str(file.relative_to(CONFIGS)) for file in CONFIGS.rglob("*.y*ml"))


def config_class(folder: str) -> type:
    module, _, name = CLASSES[folder].rpartition(".")
    return getattr(import_module(module), name)


def test_there_are_configs() -> None:
    assert FILES


@pytest.mark.parametrize("file", FILES)
def test_config_validates(file: str) -> None:
    folder = Path(file).parts[0]
    config = load_config(config_class(folder), file=CONFIGS / file, overrides=GIVEN.get(folder, []))
    written = yaml.safe_load((CONFIGS / file).read_text(encoding="utf-8"))
    assert written, "it sets nothing"
    assert written.keys() <= yaml.safe_load(to_yaml(config)).keys()


@pytest.mark.parametrize("file", FILES)
def test_config_says_what_it_is_for(file: str) -> None:
    assert (CONFIGS / file).read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("folder", sorted(CLASSES))
def test_defaults_are_valid_and_survive_yaml(folder: str, tmp_path: Path) -> None:
    defaults = load_config(config_class(folder), overrides=GIVEN.get(folder, []))
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(defaults), encoding="utf-8")
    assert load_config(config_class(folder), file=file) == defaults
