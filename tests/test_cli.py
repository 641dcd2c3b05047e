from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from cdvideo.cli import add_common_flags, config_from_flags, peak_memory_bytes, print_usage_footer, run_main
from cdvideo.errors import UserError

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    size: int = 3
    name: str = "any"


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    class_word: str = "dog"
    formats: tuple[str, ...] = ("mp4",)
    steps: int = 400
    seed: int = 5
    still: bool = False
    group: Group = Group()
    out: Path = Path("runs")


def read(*argv: str) -> Example:
    parser = ArgumentParser(allow_abbrev=False)
    parser.add_argument("--class-word")
    parser.add_argument("--formats", nargs="*")
    parser.add_argument("--still", action="store_true")
    parser.add_argument("--verbose")
    parser.add_argument("--big", action="store_const", const=9, dest="group.size")
    add_common_flags(parser)
    return config_from_flags(Example, parser.parse_intermixed_args(argv))


def test_nothing_given_leaves_the_defaults() -> None:
    assert read() == Example()


def test_flags_set_the_field_of_their_name() -> None:
    given = read("--class-word", "stuffed animal", "--seed", "0", "--still", "--out", "a b", "--verbose", "yes")
    assert given == Example(class_word="stuffed animal", seed=0, still=True, out=Path("a b"))
    assert read("--formats", "mp4", "no").formats == ("mp4", "no")


def test_flags_set_the_field_of_a_group_that_their_dest_names() -> None:
    assert read("--big", "group.name=x").group == Group(size=9, name="x")
    with pytest.raises(UserError, match=r"group.size is given twice, as a flag and as group.size="):
        read("--big", "group.size=2")


def test_settings_may_stand_anywhere_among_the_flags() -> None:
    assert read("steps=3", "--seed", "1", "class_word=cat") == Example(steps=3, seed=1, class_word="cat")


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "example.yaml"
    file.write_text("seed: 1\nsteps: 2\nclass_word: cat\n")
    assert read("--config", str(file), "--seed", "9", "steps=8") == Example(seed=9, steps=8, class_word="cat")


def test_a_setting_given_both_ways_is_refused() -> None:
    with pytest.raises(UserError, match="class_word is given twice, as --class-word and as class_word="):
        read("--class-word", "cat", "class_word=dog")


def test_unknown_and_shortened_flags_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--sede", "1"], ["--see", "1"]):
        with pytest.raises(SystemExit, match="2"):
            read(*argv)
        assert argv[0] in capsys.readouterr().err


def fail(error: BaseException) -> Callable[[Sequence[str]], None]:
    def main(argv: Sequence[str]) -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (UserError("frames=0", allowed="1 or more", do="ask for a frame"), 2, "error: frames=0\n  allowed: 1 or more"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("broken"), 1, "RuntimeError: broken"),
        (ValueError("broken"), 1, "ValueError: broken"),
        (SystemExit(2), 2, ""),
        (SystemExit(0), 0, ""),
    ],
)
def test_exit_codes(error: BaseException, code: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(fail(error), []) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(told) or told in captured.err.splitlines()
    assert ("Traceback" in captured.err) == (code == 1)
    assert captured.out == ""


def test_a_reader_that_goes_ends_the_script_without_a_word() -> None:
    """`script | head`: both where printing fails, and where the rest is printed at the end."""
    for lines in (200_000, 1):
        code = "import sys, cdvideo.cli as cli\n"
        code += f"sys.exit(cli.run_main(lambda argv: [print('line') for _ in range({lines})] and None, []))"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
        script = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=buffered, **pipes)
        assert script.stdout is not None and script.stderr is not None
        script.stdout.close()
        assert script.stderr.read() == b""
        assert script.wait() == (1 if lines > 1 else 0)
        script.stderr.close()


def test_another_broken_pipe_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(fail(BrokenPipeError("ffmpeg has ended")), []) == 1
    assert "BrokenPipeError: ffmpeg has ended" in capsys.readouterr().err


def test_main_gets_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[Sequence[str]] = []
    assert run_main(got.append, ["--a"]) == 0
    monkeypatch.setattr(sys, "argv", ["script.py", "--b"])
    assert run_main(got.append) == 0
    assert got == [["--a"], ["--b"]]


def test_footer(capsys: pytest.CaptureFixture[str]) -> None:
    print_usage_footer(time.perf_counter() - 12.34)
    match = re.fullmatch(r"done in 12\.3 s, peak memory (\d+\.\d\d) GB\n", capsys.readouterr().out)
    assert match
    assert float(match[1]) == pytest.approx(peak_memory_bytes() / 1e9, abs=0.02)


def test_peak_memory_sees_what_was_allocated_and_freed() -> None:
    code = "from cdvideo.cli import peak_memory_bytes as p; a = p(); b = bytearray(300_000_000); del b; print(p() - a)"
    grown = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert 290e6 < grown < 330e6


# The command line is a promise to those who script it: a flag is added or taken away here first.
COMMON = "--config --device --dtype --help --out --quiet --seed"
FLAGS = {
    "animate.py": "--also-still --attention --base --batch --codec --compare --compile --concept "
    "--concept-frames --concept-strength --dither --format --fps --frames --freeinit --guidance --init-image "
    "--init-video --loop --motion --motion-lora --motion-strength --negative-prompt --noise --num-videos --offload "
    "--prompt --scheduler --speed --steps --still --strength --window-blend --window-overlap "
    "--window-schedule --window-size",
    "benchmark.py concepts": "--base --concepts --films --frames --height --pairs --steps --width",
    "benchmark.py decode": "--base --frames --height --pairs --width",
    "benchmark.py length": "--base --height --pairs --steps --width",
    "benchmark.py sampler": "--base --frames --height --pairs --peak-tflops --peers --speed --steps --width",
    "benchmark.py training-step": "--base --pairs",
    "benchmark.py memory": "--base --frames --offload --resolution --steps",
    "evaluate.py base": "--base --films --json --judge --prompts --resume --seeds --sprites",
    "evaluate.py study": "--base --cache --identity --json --judge --sprites",
    "evaluate.py train-identity": "--minutes --sprites --vae",
    "evaluate.py train-judge": "--minutes --sprites --vae",
    "make_base.py": "--export --fit --minutes --sprites --stage",
    "train_concept.py": "--base --class-word --images --resume --steps --token",
}
BARE = {  # nothing is computed there, or nothing by chance, so not all of the common flags
    "convert.py": "--base --class-word --config --device --help --inspect --out --quiet --rank --to --token",
    "doctor.py": "--help --json",
}


def show_help(*command: str) -> str:
    script, *rest = command
    shown = [sys.executable, f"scripts/{script}", *rest, "--help"]
    return subprocess.run(shown, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_every_script_is_pinned() -> None:
    assert sorted(path.name for path in (ROOT / "scripts").glob("*.py")) == sorted(
        {name.split()[0] for name in FLAGS | BARE}
    )


@pytest.mark.parametrize("script", sorted({name.split()[0] for name in FLAGS if " " in name}))
def test_every_command_of_a_script_is_pinned(script: str) -> None:
    commands = re.search(r"\{([a-z,-]+)\} \.\.\.", show_help(script))
    assert commands
    assert sorted(commands[1].split(",")) == sorted(name.split()[1] for name in FLAGS if name.startswith(f"{script} "))


@pytest.mark.parametrize("command", FLAGS | BARE)
def test_flags_are_pinned(command: str) -> None:
    shown = re.findall(r"^  (?:-\w, )?(--[a-z-]+)", show_help(*command.split()), re.MULTILINE)
    pinned = BARE[command] if command in BARE else f"{COMMON} {FLAGS[command]}"
    assert set(shown) == {*pinned.split()}
