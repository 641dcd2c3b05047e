"""Files from one form into another, from the command line: what scripts/convert.py runs."""

from __future__ import annotations

import dataclasses
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cdvideo.cli import add_common_flags, config_from_flags, print_usage_footer
from cdvideo.errors import UserError
from cdvideo.interchange.config import ConvertConfig
from cdvideo.runs import ensure_writable

if TYPE_CHECKING:
    from cdvideo.concept.concept import Concept

CONVERTED = Path("runs/converted")


def main(argv: Sequence[str]) -> None:
    """Converts concepts and adapters between cdvideo and the forms that others read.

    Raises:
        UserError: wrong settings, a file that can not be read or does not fit the base, a form that can not hold it.
    """
    start = time.perf_counter()
    parser = ArgumentParser(
        description="Converts concepts and adapters between cdvideo and the forms that others read.", allow_abbrev=False
    )
    parser.add_argument("file", metavar="FILE[:WEIGHT][,FILE...]", help="a file or a folder, of any form that is read")
    forms = ["kohya", "peft", "diffusers", "textual-inversion", "custom-diffusion", "cdvideo"]
    parser.add_argument("--to", choices=forms, help="the form to write")
    parser.add_argument("--inspect", action="store_true", help="say what the file is, and write nothing")
    parser.add_argument("--base", metavar="NAME", help="the base that the file was made for (tiny)")
    parser.add_argument(
        "--rank", type=int, metavar="N", help="the most rank of a LoRA's layers (all that the change has)"
    )
    parser.add_argument("--token", metavar="WORD", help="what to call the token")
    parser.add_argument("--class-word", metavar="WORDS", help="what kind of thing it is")
    add_common_flags(parser, resume=False, draws=False)
    config = config_from_flags(ConvertConfig, parser.parse_intermixed_args(argv))
    for path, _ in config.files:
        if not path.exists():
            raise UserError(
                f"there is no file or folder {path}", allowed="what was trained or fetched", do="correct it"
            )
    if config.inspect:
        _inspect(config)
    else:
        _convert(config)
    if not config.quiet:
        print_usage_footer(start)


def _inspect(config: ConvertConfig) -> None:
    from cdvideo.interchange.folders import files_of
    from cdvideo.interchange.inspect import describe

    for path, _ in config.files:
        for file in files_of(path, print):
            print("\n".join(describe(file)))


def _convert(config: ConvertConfig) -> None:
    folder = config.out or CONVERTED / f"{_name(config)}-{config.to}"
    was_there = folder.exists()
    ensure_writable(folder)
    try:
        _write(config, folder)
    except BaseException:
        if not was_there and not any(folder.iterdir()):
            folder.rmdir()
        raise


def _write(config: ConvertConfig, folder: Path) -> None:
    from cdvideo.base.loader import load_base
    from cdvideo.device import use_device
    from cdvideo.interchange import write
    from cdvideo.interchange.load import load_adapters

    base = load_base(config.base, device=use_device(config.device))
    report = (lambda line: None) if config.quiet else print
    concept = load_adapters(base, config.files, report=report)
    export = write.Export(base, _renamed(concept, config), folder, _name(config), config.rank, report)
    writers = {
        "kohya": write.write_kohya,
        "peft": write.write_peft,
        "diffusers": write.write_diffusers,
        "textual-inversion": write.write_textual_inversion,
        "custom-diffusion": write.write_custom_diffusion,
        "cdvideo": write.write_cdvideo,
    }
    writers[config.to](export)


def _name(config: ConvertConfig) -> str:
    """What to call the result: the first file, or its folder where the file is called as all are."""
    path = config.files[0][0].resolve()
    return path.parent.name if path.stem in ("concept", "pytorch_lora_weights", "learned_embeds") else path.stem


def _renamed(concept: Concept, config: ConvertConfig) -> Concept:
    """The concept with its one token called as asked for, and its class word."""
    from cdvideo.concept.concept import distinct_words

    if not config.token and not config.class_word:
        return concept
    words = distinct_words(concept.tokens)
    if len(words) != 1:
        raise UserError(
            f"--token or --class-word for {len(words)} tokens", allowed="one token", do="leave the flag out"
        )
    ((token, *_),) = words
    rows_KD = concept.tokens[token]
    name, word = config.token or token, config.class_word or concept.metadata.class_words[token]
    metadata = dataclasses.replace(concept.metadata, class_words={name: word})
    return dataclasses.replace(concept, tokens={name: rows_KD}, metadata=metadata)
