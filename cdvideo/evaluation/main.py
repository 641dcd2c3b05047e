"""The command line of scripts/evaluate.py. No torch is imported before the settings are checked."""

from __future__ import annotations

import importlib.util
import sys
import time
from argparse import ArgumentParser, Namespace, _SubParsersAction
from collections.abc import Sequence
from pathlib import Path

from cdvideo.cli import add_common_flags, config_from_flags, print_usage_footer
from cdvideo.errors import UserError
from cdvideo.evaluation.config import JudgeConfig, ReportConfig
from cdvideo.evaluation.identity.main import identity_parser, train_identity_command
from cdvideo.evaluation.study.main import study_command, study_parser
from cdvideo.runs import ensure_writable


def main(argv: Sequence[str]) -> None:
    """Runs one of the measuring commands.

    Raises:
        UserError: wrong settings, or something that is missing.
    """
    start = time.perf_counter()
    parser = ArgumentParser(description="Measure the base, compare ways to learn a concept, train the judge.")
    commands = parser.add_subparsers(dest="command", required=True)
    runners = {
        "base": (_base_parser(commands), _measure_base),
        "train-judge": (_judge_parser(commands), _train_judge),
        "train-identity": (identity_parser(commands), train_identity_command),
        "study": (study_parser(commands), study_command),
    }
    if not argv or argv[0] not in runners:
        parser.parse_args(argv)  # --help, or the list of commands with exit code 2
        sys.exit(2)
    subparser, run = runners[argv[0]]
    args = subparser.parse_intermixed_args(argv[1:])  # settings may stand anywhere
    run(args)
    if not args.quiet:
        print_usage_footer(start)


def _base_parser(commands: _SubParsersAction[ArgumentParser]) -> ArgumentParser:
    parser = commands.add_parser("base", help="measure the embedded base: results.json and a page with the pictures")
    parser.add_argument("--base", metavar="NAME", help="tiny (the embedded one), or a folder in diffusers' layout")
    parser.add_argument("--judge", metavar="FOLDER", help="the judge (the one that ships)")
    parser.add_argument("--sprites", metavar="FOLDER", help="the world's drawings (.sprites)")
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    parser.add_argument("--prompts", type=int, metavar="N", help="trained-on triples, and as many held-out ones (300)")
    parser.add_argument("--seeds", type=int, metavar="N", help="pictures for each prompt (2)")
    parser.add_argument("--films", type=int, metavar="N", help="films of held-out triples (100); 0 for none")
    add_common_flags(parser)
    return parser


def _measure_base(args: Namespace) -> None:
    config = config_from_flags(ReportConfig, args)
    ensure_writable(config.out)
    if importlib.util.find_spec("cv2") is None and config.films:
        raise UserError(
            "OpenCV is not installed, and films are measured by optical flow",
            allowed="pip install 'cdvideo[eval]'",
            do="install it, or leave films out with --films 0",
        )

    from cdvideo.evaluation.base_report import measure_base
    from cdvideo.evaluation.page import write_report

    report = measure_base(config)
    page = write_report(report, config.out, also=config.json)
    if not config.quiet:
        for figure in report.figures:
            verdict = {None: "", True: "reached", False: "NOT REACHED"}[figure.passed]
            low, high = figure.interval or (figure.value, figure.value)
            value = f"{figure.value:8.3f} {figure.unit:<6} [{low:.3f}, {high:.3f}]"
            print(f"{figure.part}: {figure.name}: {value} n = {figure.n}  {figure.asked}  {verdict}")
        print(f"wrote {page}")


def _judge_parser(commands: _SubParsersAction[ArgumentParser]) -> ArgumentParser:
    parser = commands.add_parser("train-judge", help="train the judge; goes on where it was interrupted")
    parser.add_argument("--minutes", type=float, metavar="M", help="how long to train; the schedule ends with them")
    parser.add_argument("--sprites", type=Path, default=Path(".sprites"), metavar="FOLDER", help="the world's drawings")
    parser.add_argument("--vae", metavar="FOLDER", help="the base's VAE, for round trips")
    add_common_flags(parser, resume=False)
    return parser


def _train_judge(args: Namespace) -> None:
    config = config_from_flags(JudgeConfig, args)
    if args.minutes is not None and args.minutes <= 0:
        raise UserError(f"--minutes {args.minutes}", allowed="a number above 0", do="give the training some time")
    if config.vae is not None and not (config.vae / "config.json").is_file():
        raise UserError(f"no VAE in {config.vae}", allowed="a folder with config.json", do="correct --vae")
    ensure_writable(config.out)

    import torch

    from cdvideo.device import use_device
    from cdvideo.evaluation.judge.data import render
    from cdvideo.evaluation.judge.model import HEADS
    from cdvideo.evaluation.judge.training import train_judge
    from cdvideo.world.training import Limits

    device = use_device(config.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    render(config, args.sprites)
    seconds = None if args.minutes is None else 60 * args.minutes
    facts = train_judge(config, device, Limits(seconds=seconds, fit=seconds is not None, quiet=args.quiet))
    if not args.quiet:
        for part in ("renders", "round_trip"):
            if part in facts:
                shares = ", ".join(f"{head} {100 * facts[part][head]['accuracy']:.2f} %" for head in HEADS)
                print(f"{part} (n = {facts[part]['n']}): {shares}, all three {100 * facts[part]['all_three']:.2f} %")
        print(f"wrote {config.out}")
