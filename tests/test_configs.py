"""Every file under configs/ is one that the program takes."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import yaml

from cdvideo.config import load_config, to_yaml

CONFIGS = Path(__file__).parents[1] / "configs"
CLASSES = {  # how a file's path begins; the longest that fits
    "animate": "cdvideo.sampling.config.AnimateConfig",
    "base": "cdvideo.world.config.MakeBaseConfig",
    "concept": "cdvideo.concept.config.ConceptConfig",
    "evaluate": "cdvideo.evaluation.study.config.StudyConfig",
    "evaluate/base_": "cdvideo.evaluation.config.ReportConfig",
}
GIVEN = {"animate": ["prompt=a dog"]}  # what has no default
FILES = sorted(str(file.relative_to(CONFIGS)) for file in CONFIGS.rglob("*.y*ml"))


def kind_of(file: str) -> str:
    return max((start for start in CLASSES if file.startswith(start)), key=len)


def config_class(kind: str) -> type:
    module, _, name = CLASSES[kind].rpartition(".")
    return getattr(import_module(module), name)


def test_there_are_configs() -> None:
    assert FILES


@pytest.mark.parametrize("file", FILES)
def test_config_validates(file: str) -> None:
    kind = kind_of(file)
    config = load_config(config_class(kind), file=CONFIGS / file, overrides=GIVEN.get(kind, []))
    written = yaml.safe_load((CONFIGS / file).read_text(encoding="utf-8"))
    assert written, "it sets nothing"
    assert written.keys() <= yaml.safe_load(to_yaml(config)).keys()


@pytest.mark.parametrize("file", FILES)
def test_config_says_what_it_is_for(file: str) -> None:
    assert (CONFIGS / file).read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("kind", sorted(CLASSES))
def test_defaults_are_valid_and_survive_yaml(kind: str, tmp_path: Path) -> None:
    defaults = load_config(config_class(kind), overrides=GIVEN.get(kind, []))
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(defaults), encoding="utf-8")
    assert load_config(config_class(kind), file=file) == defaults
