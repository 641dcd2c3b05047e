"""What the scripts share: the same flags, the same exit codes, the same last line. Imports no torch.

A script is its `main` and one line:

    def main(argv: Sequence[str]) -> None:
        parser = ArgumentParser(description=..., allow_abbrev=False)
        parser.add_argument("--token")
        add_common_flags(parser)
        args = parser.parse_intermixed_args(argv)  # key=value settings may stand anywhere
        config = config_from_flags(ConceptConfig, args)
        ...

    if __name__ == "__main__":
        sys.exit(run_main(main))
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cdvideo.config import load_config, setting_names
from cdvideo.cpu import prepare_cpu
from cdvideo.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILURE, EXIT_INTERRUPTED, UserError
from cdvideo.install import torchvision_fault

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def run_main(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Runs a script's main and returns the exit code of the process.

    Args:
        main: Takes the arguments after the script's name.
        argv: These arguments; by default those of the process.

    Returns:
        0 done, 1 failure (with its traceback), 2 bad input or config, or a torchvision that does not fit torch, 130
        interrupted. Where the reader of what is printed has gone (`| head`), 1 without a word.
    """
    prepare_cpu()  # before any main imports torch
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # Windows writes to files and pipes in cp1252, which knows few letters
    try:
        return _exit_code(main, argv)
    finally:
        _reader_has_gone()  # or the interpreter finds out at its end, and complains


def _exit_code(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None) -> int:
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as stop:  # argparse: 0 after --help, 2 after a wrong flag
        return int(stop.code or EXIT_DONE)
    except Exception as error:
        if (fault := torchvision_fault()) is not None:  # whatever transformers makes of it
            print(f"error: {fault}", file=sys.stderr)
            return EXIT_BAD_INPUT
        if not (isinstance(error, BrokenPipeError) and _reader_has_gone(trial="\n")):
            traceback.print_exc()
        return EXIT_FAILURE
    return EXIT_DONE


def _reader_has_gone(trial: str = "") -> bool:
    """Whether standard output is a closed pipe, as a trial shows; if so, what is still to be printed goes nowhere."""
    try:
        print(trial, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def add_common_flags(parser: ArgumentParser, *, resume: bool = True, draws: bool = True) -> None:
    """Adds the flags that every script has. All default to "not given" (None or False): the config holds the defaults.

    Args:
        parser: To be read with `parse_intermixed_args`, so that settings may stand anywhere among the flags.
        resume: Whether the script's work can be taken up again, so that it has `--resume`.
        draws: Whether chance and precision matter to it, so that it has `--seed` and `--dtype`.
    """
    group = parser.add_argument_group("common flags")
    group.add_argument("overrides", nargs="*", metavar="key=value", help="settings, over those of --config")
    group.add_argument("--config", type=Path, metavar="FILE", help="a YAML file of settings, over the defaults")
    if draws:
        group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same result")
    group.add_argument("--out", type=Path, metavar="FOLDER", help="where results are written")
    group.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    if draws:
        group.add_argument("--dtype", choices=["auto", "fp32", "bf16", "fp16"], help="precision of the computation")
    if resume:
        group.add_argument("--resume", action="store_true", help="continue the run that was interrupted")
    group.add_argument("--quiet", action="store_true", help="no progress bars and no summary")


def config_from_flags(cls: type[T], args: Namespace) -> T:
    """The config that the arguments ask for: defaults, --config over them, key=value over it, flags over all.

    A flag sets the field of its name (`--class-word` sets `class_word`), or that of its `dest`, which may stand in a
    group (`dest="windows.size"`); other flags are left to the script.

    Raises:
        UserError: As `load_config`; and for a setting that is given both as a flag and as key=value.
    """
    names = {*setting_names(cls)}
    given = {name: value for name, value in vars(args).items() if value is not None and value is not False}
    flags = {name: value for name, value in given.items() if name in names}
    twice = flags.keys() & {override.partition("=")[0].strip() for override in args.overrides}
    if twice:
        name = min(twice)
        flag = "a flag" if "." in name else f"--{name.replace('_', '-')}"
        raise UserError(
            f"{name} is given twice, as {flag} and as {name}=...",
            allowed="one of both",
            do="remove one of both",
        )
    texts = [f"{name}={_as_text(value)}" for name, value in flags.items()]
    return load_config(cls, file=args.config, overrides=[*args.overrides, *texts])


def print_usage_footer(start_time: float) -> None:
    """Prints what the run took: "done in 42.1 s, peak memory 1.23 GB", and the GPU's peak where one was used.

    Args:
        start_time: `time.perf_counter()` at the start of the run, in seconds.
    """
    seconds = time.perf_counter() - start_time
    line = f"done in {seconds:.1f} s, peak memory {peak_memory_bytes() / 1e9:.2f} GB"
    torch = sys.modules.get("torch")  # not imported for a footer's sake
    if torch is not None and torch.cuda.is_initialized():
        line += f", peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB"
    print(line)


def peak_memory_bytes() -> int:
    """The most memory (resident set) that this process has held, in bytes."""
    if sys.platform == "linux":
        # Not getrusage: there a process starts with the peak of the one that launched it.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _as_text(value: object) -> str:
    """A flag's value as it would be typed after `key=`; JSON's lists are YAML's."""
    return json.dumps(value) if isinstance(value, (list, bool)) else str(value)
