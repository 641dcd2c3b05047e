"""Folders as training scripts leave them: which of their files are the adapter.

Beside it lie states of the training, whole models, earlier states of the same adapter (epochs, steps, checkpoint-500),
and the same adapter in other forms. None of those is added to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from cdvideo.concept import lycoris
from cdvideo.concept.concept import Concept
from cdvideo.concept.config import CONCEPT_FILE
from cdvideo.concept.lora import lora_paths
from cdvideo.errors import UserError
from cdvideo.interchange.files import CUSTOM_DIFFUSION, READABLE, TEXTUAL_INVERSION, read_foreign
from cdvideo.interchange.textual_inversion import partner_of

ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pti")
_STATE = re.compile(
    r"(optimizer|lr_?scheduler|scheduler|scaler|random_states|rng_state|training_args|custom_checkpoint|trainer_state)\b.*"
)
_WHOLE_MODEL = re.compile(r"((diffusion_)?pytorch_model|model)([-.].*)?\.(safetensors|bin)")
# kohya's dog-000002 and dog-step00000500, diffusers' learned_embeds-steps-500, a web UI's dog-500.
_SERIES = re.compile(r"(?P<name>.+?)[-_](?P<word>steps?|epochs?|ep|e|s)?[-_]?(?P<number>\d+)")
_CHECKPOINT = re.compile(r"(checkpoint|epoch|step|steps)[-_]?(\d+)")
_OF_MODELS = ("unet", "text_encoder", "text_encoder_2")
_SMALL = 10**6  # bytes that rows of a word may take

Say = Callable[[str], object]


def files_of(path: Path, say: Say = lambda _line: None) -> list[Path]:
    """The files that belong together: those of a folder, or a file with what lies beside it for it.

    Custom Diffusion's script leaves the tokens in files of their own beside the weights; they come along.

    Args:
        say: Is told what was passed over.

    Raises:
        UserError: For a folder without an adapter.
    """
    if path.is_dir():
        return _files_in(path, say)
    if read_foreign(path).kind != CUSTOM_DIFFUSION:
        return [path]
    beside = [file for file in _weights_in(path.parent) if file != path and file.stat().st_size < _SMALL]
    return [path, *(file for file in beside if _is_word_file(file))]


def _is_word_file(path: Path) -> bool:
    try:
        return read_foreign(path).kind == TEXTUAL_INVERSION
    except UserError:  # something else that lies there
        return False


def _weights_in(folder: Path) -> list[Path]:
    names = sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDINGS and file.is_file())
    return [file for file in names if not file.name.startswith("._") and _STATE.fullmatch(file.name.lower()) is None]


def _files_in(folder: Path, say: Say) -> list[Path]:
    if (folder / CONCEPT_FILE).is_file():  # a run's folder, which holds the run's state too
        return [folder / CONCEPT_FILE]
    files = _weights_in(folder)
    adapters = [file for file in files if _WHOLE_MODEL.fullmatch(file.name.lower()) is None]
    if not adapters:
        return _files_below(folder, files, say)
    _tell_left_out(say, folder, files, adapters, "whole models")
    best = {file.stem: file for file in sorted(adapters, key=lambda file: file.suffix == ".safetensors")}
    one_form = [file for file in adapters if best[file.stem] == file]
    _tell_left_out(say, folder, adapters, one_form, "the same in another form")
    last = _last_states(one_form)
    _tell_left_out(say, folder, one_form, last, "earlier states")
    partners = {partner_of(file) for file in last}
    return [file for file in last if file not in partners]


def _files_below(folder: Path, whole_models: Sequence[Path], say: Say) -> list[Path]:
    """The adapter in folders within: one for each model, as PEFT's scripts leave it; or the last checkpoint."""
    models = [folder / name for name in _OF_MODELS if (folder / name).is_dir()]
    if parts := [sub for sub in models if any(sub.glob("adapter_model.*")) or any(sub.glob("pytorch_lora_weights.*"))]:
        return [file for sub in parts for file in _files_in(sub, say)]
    matches = [(int(m[2]), sub) for sub in folder.iterdir() if sub.is_dir() and (m := _CHECKPOINT.fullmatch(sub.name))]
    if matches:
        _, last = max(matches)
        if len(matches) > 1:
            say(f"{folder}: {last.name} is the last of {len(matches)} states, and is taken")
        return _files_in(last, say)
    within = sorted(sub.name for sub in folder.iterdir() if sub.is_dir() and _weights_in(sub))
    is_base = (folder / "model_index.json").is_file()
    found = f"whole models ({whole_models[0].name})" if whole_models else "no file of weights"
    raise UserError(
        f"{folder} holds {'a base' if is_base else found}"
        + (f"; folders in it do: {', '.join(within)}" if within else ""),
        allowed=READABLE,
        do="give it as --base"
        if is_base
        else f"name {folder / within[0]}"
        if within
        else "name another folder, or a file",
    )


def _last_states(files: Sequence[Path]) -> list[Path]:
    """Of each series of states of one adapter the final one, else the one of the highest number."""
    stems = {file.stem: file for file in files}
    series: dict[str, list[tuple[int, Path]]] = {}
    for file in files:
        match = _SERIES.fullmatch(file.stem)
        if match and (match["word"] or len(match["number"]) >= 3 or ("-" in file.stem and match["name"] in stems)):
            series.setdefault(match["name"], []).append((int(match["number"]), file))
    left_out = set[Path]()
    for name, states in series.items():
        kept = stems[name] if name in stems else max(states)[1]
        left_out |= {file for _, file in states if file != kept}
    return [file for file in files if file not in left_out]


def _tell_left_out(say: Say, folder: Path, before: Sequence[Path], after: Sequence[Path], why: str) -> None:
    gone = [file.name for file in before if file not in after]
    if gone:
        more = f" and {len(gone) - 3} more" if len(gone) > 3 else ""
        say(f"{folder}: passed over {', '.join(gone[:3])}{more} ({why})")


def without_twins(folder: Path, parts: Sequence[tuple[Path, Concept]], say: Say) -> list[Concept]:
    """The concepts of a folder's files, each once where the same adapter lies there in several forms.

    Raises:
        UserError: For several that change the same layers, or have the same word, and are not the same.
    """
    kept: list[tuple[Path, Concept]] = []
    for path, concept in parts:
        twins = [(other, each) for other, each in kept if _changed(concept) & _changed(each)]
        if not twins:
            kept.append((path, concept))
        elif all(_same(concept, each) for _, each in twins):
            say(f"{folder}: passed over {path.name}, the same as {twins[0][0].name} in another form")
        else:
            what = min(_changed(concept) & _changed(twins[0][1]))
            raise UserError(
                f"{folder} holds several adapters for the same: {twins[0][0].name} and {path.name} both change {what}",
                allowed="one adapter in a folder, in parts that do not meet, with its words",
                do=f"name the file that you want: {path}; or several to be added up, with commas between them",
            )
    return [concept for _, concept in kept]


def _changed(concept: Concept) -> set[str]:
    """The layers and the words that a concept changes."""
    words = {f"the word {token}" for token in concept.tokens}
    if concept.metadata.adapter == "lora":
        return words | lora_paths(concept.weights)
    layers = lycoris.by_layer(concept.weights)
    return words | set(layers) | {name.removesuffix(".delta") for name in concept.weights if name.endswith(".delta")}


def _same(one: Concept, other: Concept) -> bool:
    """Whether two concepts change the same by the same, but for rounding."""
    if _changed(one) != _changed(other) or one.metadata.adapter != other.metadata.adapter:
        return False
    if any(rows.shape != other.tokens[token].shape for token, rows in one.tokens.items()):
        return False
    pairs: list[tuple[Tensor, Tensor]] = [(rows, other.tokens[token]) for token, rows in one.tokens.items()]
    if one.metadata.adapter == "lora":
        return all(_alike(a, b) for a, b in pairs) and _same_products(one, other)
    pairs += [(tensor, other.weights[name]) for name, tensor in one.weights.items() if name in other.weights]
    return one.weights.keys() == other.weights.keys() and all(_alike(a, b) for a, b in pairs)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a.float() - b.float()).norm() <= 1e-2 * a.float().norm())


def _same_products(one: Concept, other: Concept) -> bool:
    """|B A - B' A'| beside |B A|, by the products of their small sides: (B A) . (B' A') = tr(B' B'' A'' A')."""
    apart = whole = 0.0
    scales = [float(each.metadata.adapter_settings["alpha"]) for each in (one, other)]
    for layer in lora_paths(one.weights):
        downs, ups = (
            [each.weights[f"{layer}.lora_{side}.weight"].float().flatten(1) for each in (one, other)] for side in "AB"
        )
        ups = [up * scale / len(down) for up, down, scale in zip(ups, downs, scales, strict=True)]
        inner = [
            [((u.T @ v) * (a @ b.T)).sum().item() for v, b in zip(ups, downs, strict=True)]
            for u, a in zip(ups, downs, strict=True)
        ]
        whole += inner[0][0]
        apart += inner[0][0] - 2 * inner[0][1] + inner[1][1]
    return apart <= 1e-4 * whole
