"""Textual inversion (arXiv 2208.01618): rows of text input under a word, in everybody's files.

diffusers keeps {word: rows}; web UIs string_to_param or emb_params, where the word is the file's name, and for SDXL
clip_l and clip_g; diffusers' script for SDXL a second file, learned_embeds_2; Replicate's trainer text_encoders_0 and
_1, whose rows are called <s0>, <s1>, ...; OneTrainer bundle_emb.<word>.<form> within a LoRA.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.base.prompts import text_widths
from cdvideo.errors import UserError
from cdvideo.interchange.files import (
    BUNDLED,
    CLONEOFSIMO,
    DELTA,
    TEXTUAL_INVERSION,
    TWO_ROWS,
    Foreign,
    read_foreign,
)

WORD = "cdvideo.word"  # in the header of files that we write, whose own name may have to be another
_ALIASES = "special_params.json"  # where Replicate's trainer keeps what the user calls <s0><s1>
_FORMS = {"clip_l", "clip_g", "emb_params", "t5", "string_to_param", "vector", "clip_l_out", "clip_g_out"}


def read_rows(foreign: Foreign, base: Base) -> dict[str, Tensor]:
    """rows_KD by word, in float32; two words with the same rows where a file has a name inside and another outside.

    In a web UI the file's own name is the word, in diffusers the one that is inside: here both are.

    Raises:
        UserError: For rows of another width than this base reads, for another number of text encoders, and for none.
    """
    rows = {word: _as_rows(foreign, word, value) for word, value in _named_rows(foreign, base).items()}
    if not rows:
        raise UserError(
            f"{foreign.path} changes nothing: it holds no rows",
            allowed="an embedding that was trained",
            do="fetch it again, or train it anew",
        )
    _require_width(foreign, base, rows)
    return rows


def split_bundle(foreign: Foreign, base: Base) -> dict[str, Tensor]:
    """rows_KD by word, of the embeddings that OneTrainer and others keep within a LoRA. Raises as `read_rows`."""
    words: dict[str, dict[str, Tensor]] = {}
    for key, tensor in foreign.tensors.items():
        if key.startswith(BUNDLED):
            word, form = _bundled(key.removeprefix(BUNDLED))
            words.setdefault(word, {})[form] = tensor
    rows: dict[str, Tensor] = {}
    for word, forms in words.items():
        if len(forms) == 1 and not {name for pair in TWO_ROWS for name in pair} & forms.keys():
            rows[word] = _as_rows(foreign, word, next(iter(forms.values())))
        elif base.is_sdxl or len(forms) > 1:
            rows[word] = _joined(foreign, base, word, forms)
        else:  # OneTrainer calls the rows of Stable Diffusion 1 and 2 clip_l where it saves ComfyUI's form
            rows[word] = _as_rows(foreign, word, next(iter(forms.values())))
    _require_width(foreign, base, rows)
    return rows


def words_of(foreign: Foreign) -> dict[str, int]:
    """The words that a file brings, with the number of their rows; of most adapters none. No base is needed."""
    content: Any = foreign.content
    named: Mapping[str, Any]
    if foreign.kind == TEXTUAL_INVERSION:
        named = {foreign.path.stem: content} if isinstance(content, Tensor) else _words_inside(foreign)
    elif foreign.kind == DELTA:
        rows_of = content.get("modifier_token", {})
        named = rows_of if isinstance(rows_of, Mapping) else {}
    elif foreign.kind == CLONEOFSIMO:
        named = {} if isinstance(content, list) else {key: rows for key, rows in content.items() if ":" not in key}
    else:
        bundled = {key.removeprefix(BUNDLED): t for key, t in foreign.tensors.items() if key.startswith(BUNDLED)}
        named = {_bundled(key)[0]: rows for key, rows in bundled.items()}
    return {
        word: rows.numel() // rows.shape[-1]
        for word, rows in named.items()
        if isinstance(rows, Tensor) and _has_rows(rows)
    }


def _has_rows(rows: Tensor) -> bool:
    return rows.ndim > 0 and rows.numel() > 0


def _words_inside(foreign: Foreign) -> dict[str, Any]:
    content: Mapping[str, Any] = foreign.content
    for pair in TWO_ROWS:
        rows = next((content[name] for name in pair if name in content), None)
        if isinstance(rows, Tensor) and _has_rows(rows):
            return _numbered(foreign, rows) if pair == TWO_ROWS[1] else {foreign.path.stem: rows}
    if "emb_params" in content:
        return {foreign.path.stem: content["emb_params"]}
    return _of_web_ui(content, foreign.path.stem) if "string_to_param" in content else dict(content)


def _bundled(key: str) -> tuple[str, str]:
    """The word and the form of a bundled key; words may have dots. Of a bare one the whole is the word."""
    parts = key.split(".")
    at = next((i for i in range(1, len(parts)) if parts[i] in _FORMS), None)
    return (key, "") if at is None else (".".join(parts[:at]), parts[at])


def _named_rows(foreign: Foreign, base: Base) -> dict[str, Tensor]:
    content: Any = foreign.content
    stem = foreign.path.stem
    if isinstance(content, Tensor):
        return {stem: content}
    for pair in TWO_ROWS:
        if set(pair) & content.keys():
            joined = _joined(foreign, base, stem, {name: content[name] for name in pair if name in content})
            return _numbered(foreign, joined) if pair == TWO_ROWS[1] else {foreign.header.get(WORD, stem): joined}
    if "emb_params" in content:
        return {stem: content["emb_params"]}
    if "string_to_param" in content:
        return _of_web_ui(content, stem)
    words = {str(word): rows for word, rows in content.items()}
    partner = partner_of(foreign.path)
    return words if partner is None else _with_partner(foreign, base, words, partner)


def _of_web_ui(content: Mapping[str, Any], stem: str) -> dict[str, Tensor]:
    """Each placeholder's rows under its own name; those of "*", the usual one, under the file's and the inner one."""
    inner, rows = content.get("name"), dict[str, Any]()
    params = content["string_to_param"]
    for placeholder, value in params.items() if isinstance(params, Mapping) else ():
        if placeholder == "*" or len(params) == 1:
            words = [inner] if isinstance(inner, str) and inner else []
            words += [stem] if stem.lower() not in (word.lower() for word in words) else []
        else:
            words = [str(placeholder)]
        rows |= dict.fromkeys(words, value)
    return rows


def _numbered(foreign: Foreign, rows_KD: Tensor) -> dict[str, Tensor]:
    """Replicate's rows: each a word of its own, <s0> and so on, and all together under what the user called them."""
    rows = {f"<s{index}>": row[None] for index, row in enumerate(rows_KD)}
    try:
        aliases = json.loads(foreign.path.with_name(_ALIASES).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return rows
    for word, stands_for in aliases.items() if isinstance(aliases, dict) else ():
        parts = [f"{part}>" for part in str(stands_for).split(">") if part]
        if parts and all(part in rows for part in parts):
            rows[str(word)] = torch.cat([rows[part] for part in parts])
    return rows


def partner_of(path: Path) -> Path | None:
    """The file beside with the rows for SDXL's second text encoder: learned_embeds_2 for learned_embeds."""
    if not path.name.startswith("learned_embeds") or path.name.startswith("learned_embeds_2"):
        return None
    partner = path.with_name(path.name.replace("learned_embeds", "learned_embeds_2", 1))
    if not partner.is_file():
        return None
    widths = [{rows.shape[-1] for rows in read_foreign(file).tensors.values()} for file in (path, partner)]
    return partner if widths[0] != widths[1] else None  # else another state of the same training


def _with_partner(foreign: Foreign, base: Base, words: Mapping[str, Tensor], partner: Path) -> dict[str, Tensor]:
    others = read_foreign(partner).content
    if not isinstance(others, Mapping) or others.keys() != words.keys():
        raise UserError(
            f"{foreign.path} and {partner.name} beside it are of different words",
            allowed="the two files of one training, with the same words in both",
            do="put files of one training into the folder",
        )
    pair = TWO_ROWS[0]
    return {
        word: _joined(foreign, base, word, dict(zip(pair, (rows, others[word]), strict=True)))
        for word, rows in words.items()
    }


def _joined(foreign: Foreign, base: Base, word: str, parts: Mapping[str, Tensor]) -> Tensor:
    """A word's rows_KD for both text encoders, from what files keep apart."""
    pair = next((pair for pair in TWO_ROWS if set(pair) & parts.keys()), TWO_ROWS[0])
    if not (base.is_sdxl and set(pair) == parts.keys()):
        raise UserError(
            f"{foreign.path} was made for SDXL: it holds rows for its text encoders ({', '.join(parts)})",
            allowed="rows for this base's text encoder" if not base.is_sdxl else "rows for both text encoders",
            do="use an embedding for this base, or another --base",
        )
    rows = [_as_rows(foreign, word, parts[name]) for name in pair]
    if len(rows[0]) != len(rows[1]):
        raise UserError(
            f"{foreign.path}: {word} has {len(rows[0])} rows for one text encoder and {len(rows[1])} for the other",
            allowed="as many rows for both",
            do="fetch it again, or train it anew",
        )
    return torch.cat(rows, dim=1)


def _as_rows(foreign: Foreign, word: str, rows: Any) -> Tensor:
    if not isinstance(rows, Tensor) or rows.ndim not in (1, 2) or rows.numel() == 0:
        shape = f"of shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else f"a {type(rows).__name__}"
        raise UserError(
            f"{foreign.path}: what it holds for {word} is {shape}",
            allowed="rows of a word, of shape (rows, channels)",
            do="fetch it again, or train it anew",
        )
    return rows.detach().float().reshape(-1, rows.shape[-1])


def _require_width(foreign: Foreign, base: Base, rows: Mapping[str, Tensor]) -> None:
    widths = text_widths(base)
    for word, rows_KD in rows.items():
        found, width = rows_KD.shape[1], sum(widths)
        if found == width:
            continue
        half = base.is_sdxl and found in widths
        raise UserError(
            f"{foreign.path}: {word} has {found} channels, base {base.name!r} reads {width}: matched 0/{len(rows)}"
            + ("; it is one half, of one of SDXL's two text encoders" if half else ""),
            allowed="rows made for this base's text encoder (768: Stable Diffusion 1, 1024: 2; clip_l and clip_g "
            "together are SDXL)",
            do="name the folder with both halves, learned_embeds and learned_embeds_2"
            if half
            else "use the --base that the file was made for",
        )
