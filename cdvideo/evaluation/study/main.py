"""The command `evaluate.py study`. No torch is imported before the settings are checked."""

from __future__ import annotations

import importlib.util
from argparse import ArgumentParser, Namespace, _SubParsersAction
from pathlib import Path

from cdvideo.cli import add_common_flags, config_from_flags
from cdvideo.errors import UserError
from cdvideo.evaluation.study.config import StudyConfig
from cdvideo.runs import ensure_writable


def study_parser(commands: _SubParsersAction[ArgumentParser]) -> ArgumentParser:
    """The flags of `study`."""
    parser = commands.add_parser(
        "study",
        help="compare ways to learn a concept; goes on where it was interrupted",
        description="Compare ways to learn a concept, as FILE says: `study configs/evaluate/paper.yaml`.",
    )
    parser.add_argument("--base", metavar="NAME", help="tiny (the embedded one), or a folder in diffusers' layout")
    parser.add_argument("--judge", metavar="FOLDER", help="the judge (the one that ships)")
    parser.add_argument("--identity", metavar="FOLDER", help="the identity encoder (the one that ships)")
    parser.add_argument("--sprites", metavar="FOLDER", help="the world's drawings (.sprites)")
    parser.add_argument("--cache", metavar="FOLDER", help="concepts, pictures and scores, shared by all studies")
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    add_common_flags(parser, resume=False)
    return parser


def study_command(args: Namespace) -> None:
    """Makes what is missing, measures, and prints the tables."""
    files = [Path(text) for text in args.overrides if "=" not in text]
    if len(files) + (args.config is not None) > 1:
        raise UserError(
            f"{len(files)} files of settings", allowed="one", do="give one file, and the rest as key=value settings"
        )
    args.overrides = [text for text in args.overrides if "=" in text]
    args.config = files[0] if files else args.config
    config = config_from_flags(StudyConfig, args)
    ensure_writable(config.out)
    ensure_writable(config.cache)
    if importlib.util.find_spec("cv2") is None and config.films.methods:
        raise UserError(
            "OpenCV is not installed, and films are measured by optical flow",
            allowed="pip install 'cdvideo[eval]'",
            do="install it, or leave films out with films.methods=[]",
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "matplotlib is not installed, and studies draw plots",
            allowed="pip install 'cdvideo[eval]'",
            do="install it",
        )

    from cdvideo.evaluation.study.page import write_page
    from cdvideo.evaluation.study.run import print_tables, run_study

    results = run_study(config)
    page = write_page(results)
    if not config.quiet:
        print_tables(results)
        print(f"\nwrote {page}")
