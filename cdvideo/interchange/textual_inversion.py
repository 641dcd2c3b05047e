"""Textual inversion (arXiv 2208.01618): rows of text input under a word, in diffusers' files and those of web UIs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.base.prompts import text_widths
from cdvideo.errors import UserError
from cdvideo.interchange import sdxl
from cdvideo.interchange.files import Foreign


def read_rows(foreign: Foreign, base: Base) -> dict[str, Tensor]:
    """rows_KD by token, in float32.

    Files of a web UI often name no word; there the file's own name is the word, and so it is here.

    Raises:
        UserError: For rows of another width than this base reads, or for another number of text encoders.
    """
    is_for_two = isinstance(foreign.content, Mapping) and bool(set(sdxl.ROWS) & foreign.content.keys())
    if is_for_two and not (base.is_sdxl and set(sdxl.ROWS) <= foreign.content.keys()):
        raise UserError(
            f"{foreign.path} was made for SDXL: it holds rows for its text encoders ({', '.join(foreign.content)})",
            allowed="rows for this base's text encoder" if not base.is_sdxl else "rows for both text encoders",
            do="use an embedding for this base, or another --base",
        )
    rows = {name: rows.detach().float().reshape(-1, rows.shape[-1]) for name, rows in _named_rows(foreign).items()}
    width = sum(text_widths(base))
    for name, rows_KD in rows.items():
        if rows_KD.shape[1] != width:
            raise UserError(
                f"{foreign.path}: {name} has {rows_KD.shape[1]} channels, base {base.name!r} reads {width}: matched "
                f"0/{len(rows)}",
                allowed="rows made for this base's text encoder (768: Stable Diffusion 1, 1024: 2; clip_l and clip_g "
                "together are SDXL)",
                do="use the --base that the file was made for",
            )
    return rows


def _named_rows(foreign: Foreign) -> dict[str, Tensor]:
    content: Any = foreign.content
    if isinstance(content, Tensor):
        return {foreign.path.stem: content}
    if set(sdxl.ROWS) <= content.keys():
        return {foreign.path.stem: sdxl.joined_rows(content)}
    if "emb_params" in content:
        return {foreign.path.stem: content["emb_params"]}
    if "string_to_param" in content:
        return {_web_ui_name(foreign): rows for rows in dict(content["string_to_param"].items()).values()}
    return dict(content)


def _web_ui_name(foreign: Foreign) -> str:
    name = foreign.content.get("name")
    return name if isinstance(name, str) and name else foreign.path.stem
