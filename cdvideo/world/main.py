"""The command line of the embedded base's training. Imports torch only once flags and settings are in order."""

from __future__ import annotations

import time
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from cdvideo.cli import add_common_flags, config_from_flags, print_usage_footer
from cdvideo.errors import UserError
from cdvideo.world.config import STAGES, WAN_STAGES, MakeBaseConfig


def main(argv: Sequence[str]) -> None:
    """The command line of scripts/make_base.py."""
    start = time.perf_counter()
    parser = ArgumentParser(description="Make the embedded base. Every stage goes on where it was interrupted.")
    parser.add_argument(
        "--stage", choices=[*dict.fromkeys([*STAGES, *WAN_STAGES]), "scenes", "clips", "all", "all-wan"], default="all"
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="most minutes that each training stage takes now")
    parser.add_argument("--fit", action="store_true", help="end the training schedule with the minutes")
    parser.add_argument("--sprites", type=Path, default=Path(".sprites"), metavar="FOLDER", help="the world's drawings")
    parser.add_argument("--export", type=Path, default=Path("cdvideo/base/tiny"), metavar="FOLDER")
    add_common_flags(parser, resume=False)
    args = parser.parse_intermixed_args(argv)
    config = config_from_flags(MakeBaseConfig, args)
    if args.fit and args.minutes is None:
        raise UserError("--fit without --minutes", allowed="--minutes M --fit", do="say how many minutes there are")
    if args.minutes is not None and args.minutes <= 0:
        raise UserError(f"--minutes {args.minutes}", allowed="a number above 0", do="give the stage some time")

    from cdvideo.world.make_base import make_base
    from cdvideo.world.training import Limits

    limits = Limits(seconds=args.minutes and 60 * args.minutes, fit=args.fit, quiet=args.quiet)
    stages = {"all": STAGES, "all-wan": WAN_STAGES}.get(args.stage, (args.stage,))
    make_base(config, stages, limits=limits, sprites=args.sprites, export=args.export)
    if not args.quiet:
        print_usage_footer(start)
