"""The command `evaluate.py train-identity`. No torch is imported before the settings are checked."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, _SubParsersAction
from pathlib import Path

from cdvideo.cli import add_common_flags, config_from_flags
from cdvideo.errors import UserError
from cdvideo.evaluation.identity.config import IdentityConfig
from cdvideo.runs import ensure_writable


def identity_parser(commands: _SubParsersAction[ArgumentParser]) -> ArgumentParser:
    """The flags of `train-identity`."""
    parser = commands.add_parser("train-identity", help="train the identity encoder; goes on where it was interrupted")
    parser.add_argument("--minutes", type=float, metavar="M", help="how long to train; the schedule ends with them")
    parser.add_argument("--sprites", type=Path, default=Path(".sprites"), metavar="FOLDER", help="the world's drawings")
    parser.add_argument("--vae", metavar="FOLDER", help="the base's VAE, for round trips")
    add_common_flags(parser, resume=False)
    return parser


def train_identity_command(args: Namespace) -> None:
    """Renders what is missing, trains, measures, and prints how well individuals are told apart."""
    config = config_from_flags(IdentityConfig, args)
    if args.minutes is not None and args.minutes <= 0:
        raise UserError(f"--minutes {args.minutes}", allowed="a number above 0", do="give the training some time")
    if config.vae is not None and not (config.vae / "config.json").is_file():
        raise UserError(f"no VAE in {config.vae}", allowed="a folder with config.json", do="correct --vae")
    ensure_writable(config.out)

    import torch

    from cdvideo.device import use_device
    from cdvideo.evaluation.identity.card import KINDS, PARTS
    from cdvideo.evaluation.identity.data import render
    from cdvideo.evaluation.identity.training import train_identity
    from cdvideo.world.training import Limits

    device = use_device(config.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    render(config, args.sprites)
    seconds = None if args.minutes is None else 60 * args.minutes
    limits = Limits(seconds=seconds, fit=seconds is not None, quiet=args.quiet)
    facts = train_identity(config, args.sprites, device, limits)
    if not args.quiet:
        for part in [part for part in PARTS if part in facts]:
            told = ", ".join(f"{KINDS[k]} {facts[part][k]['auc']:.4f}" for k in KINDS if k in facts[part])
            print(f"{PARTS[part]}: cosine {facts[part]['same']['cosine']:.3f}; AUC against {told}")
        print(f"wrote {config.out}")
