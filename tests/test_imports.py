"""The direction of imports, read from the sources; and that nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cdvideo

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cdvideo"

# Each part, and the parts it may import besides itself, lowest first. Scripts and tests may import all.
GROUND = {"errors", "config"}
TOOLS = GROUND | {"cli", "runs", "device", "media", "attention"}
SAMPLING = TOOLS | {"base", "concept", "motion", "interchange", "sampling"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "cpu": set(),
    "install": {"errors"},
    "cli": GROUND | {"cpu", "install"},
    "runs": GROUND,
    "device": GROUND,
    "attention": GROUND,
    "media": GROUND | {"runs"},
    "base": TOOLS,
    "concept": TOOLS | {"base"},
    "motion": TOOLS | {"base"},
    "interchange": TOOLS | {"base", "concept", "motion"},
    "sampling": SAMPLING,
    "models": TOOLS,
    "world": TOOLS | {"base", "motion", "models"},
    "evaluation": SAMPLING | {"world", "cpu", "doctor"},
    "web": SAMPLING,
    "doctor": TOOLS | {"base", "install"},
    "recipes": SAMPLING,
}


def part_of(file: Path, root: Path = PACKAGE) -> str:
    return file.relative_to(root).parts[0].removesuffix(".py")


def imported_parts(source: str, package: str) -> Iterator[str]:
    """The parts of cdvideo that a module of `package` imports, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" if origin == "cdvideo" else origin for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "cdvideo":
                yield (*name.split("."), "the package itself")[1]


def wrong_imports(root: Path) -> list[str]:
    wrong = []
    for file in sorted(root.rglob("*.py")):
        if file == root / "__init__.py":  # the public names: all of them lazy
            continue
        part = part_of(file, root)
        package = ".".join(["cdvideo", *file.parent.relative_to(root).parts])
        for imported in imported_parts(file.read_text(encoding="utf-8"), package):
            if imported not in ALLOWED[part] | {part}:
                wrong.append(f"{file.relative_to(root)} imports {imported}")
    return wrong


def test_imports_run_one_way() -> None:
    assert wrong_imports(PACKAGE) == []


def test_the_rule_itself_has_no_circle() -> None:
    done: set[str] = set()
    while ready := {part for part, allowed in ALLOWED.items() if part not in done and allowed - {part} <= done}:
        done |= ready
    assert done == ALLOWED.keys()


@pytest.mark.parametrize(
    "line",
    [
        "import cdvideo.sampling.video",
        "import cdvideo",
        "from cdvideo import sampling",
        "from cdvideo import load_base",
        "from cdvideo.sampling import video",
        "from cdvideo.sampling.video import sample_video",
        "from .. import sampling",
        "from ..sampling.video import sample_video",
        "def later():\n    from cdvideo.world.scenes import sample_scene",
        "if TYPE_CHECKING:\n    from cdvideo.motion.modules import MotionModules",
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "concept").mkdir()
    (tmp_path / "concept" / "trainer.py").write_text(
        f"import torch\nfrom . import losses\nfrom cdvideo.base import text\n{line}\n"
    )
    (found,) = wrong_imports(tmp_path)
    assert found.startswith("concept/trainer.py imports ")


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def light_modules() -> list[str]:
    """What must load without torch: every package, every config, and what scripts need before they start to work."""
    files = [*PACKAGE.rglob("__init__.py"), *PACKAGE.rglob("config.py"), PACKAGE / "cli.py", PACKAGE / "runs.py"]
    return sorted(".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files)


def test_packages_and_configs_load_without_torch() -> None:
    modules = light_modules()
    assert {"cdvideo", "cdvideo.config", "cdvideo.base", "cdvideo.concept.config"} <= set(modules)
    code = "import importlib, sys\n"
    code += f"for module in {modules}:\n    importlib.import_module(module)\n    print(module, 'torch' in sys.modules)"
    assert [line for line in run_python(code).splitlines() if line.endswith("True")] == []


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.py")))
def test_a_config_error_is_told_before_torch_is_loaded(script: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['scripts/{script}', 'no_such_setting=1']\n"
        "try:\n"
        f"    runpy.run_path('scripts/{script}', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    print(stop.code, 'torch' in sys.modules)\n"
    )
    assert run_python(code).split() == ["2", "False"]


@pytest.mark.parametrize("name", cdvideo.__all__)
def test_public_names(name: str) -> None:
    assert getattr(cdvideo, name).__name__ == name
    assert name in dir(cdvideo)


def test_unknown_public_name() -> None:
    with pytest.raises(AttributeError, match="module 'cdvideo' has no attribute 'load_bass'"):
        _ = cdvideo.load_bass
