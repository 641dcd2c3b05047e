"""What films read along their frames and steps: compiled prompts, mixed.

A prompt is compiled to K and V once. Prompt travel goes linearly from one compiled prompt to the next, and a concept
at a part of its strength is a mixture of the prompt compiled with it and without it; the UNet never knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.base.text import tokenize
from cdvideo.concept.concept import Concept
from cdvideo.errors import UserError
from cdvideo.sampling.keyframes import between
from cdvideo.sampling.options import Control
from cdvideo.sampling.prompt_kv import PromptKV, compile_prompts


@dataclass(frozen=True)
class FilmPrompts:
    """One film's prompts: K and V of R rows, which are the negative prompt where there is guidance, and one prompt for
    each key frame. `plain`: the same without the concept, where it does not act in full. `loop`: the frames of a film
    whose end flows into its beginning."""

    keys: tuple[int, ...]
    rows: PromptKV
    plain: PromptKV | None
    control: Control
    loop: int | None = None

    @property
    def varies(self) -> bool:
        """Whether what is read depends on the frame or the step."""
        return len(self.keys) > 1 or not all(curve.constant for curve in self.control.concept_curves)

    def read(
        self, pick: Callable[[PromptKV], Tensor], share: float, *, negative: bool, done: float, frames: Sequence[int]
    ) -> Tensor:
        """One of the tensors that a prompt is compiled to, for these frames; one row where all read the same.

        Args:
            pick: such as K of a layer, for R rows.
            share: of the concept's strength that acts there.
            done: share of the denoising that lies behind.
        """
        weights_FR = self._weights(negative, frames)
        over_steps, over_frames = self.control.concept_curves
        if self.loop is not None:
            over_frames = over_frames.closed(self.loop)
        strength_F = torch.tensor([over_steps.at(done) * over_frames.at(f) for f in frames]) * share
        if (weights_FR == weights_FR[0]).all() and (strength_F == strength_F[0]).all():
            weights_FR, strength_F = weights_FR[:1], strength_F[:1]
        read = _mix(pick(self.rows), weights_FR)
        if self.plain is None:
            return read
        return torch.lerp(
            _mix(pick(self.plain), weights_FR), read, strength_F.to(read).view(-1, *[1] * (read.ndim - 1))
        )

    def _weights(self, negative: bool, frames: Sequence[int]) -> Tensor:
        """weights_FR: how much each frame reads of each row."""
        count = len(next(iter(self.rows.layers.values()))[0])
        weights_FR = torch.zeros(len(frames), count)
        if negative:
            weights_FR[:, 0] = 1
            return weights_FR
        for row, frame in enumerate(frames):
            for key, weight in between(self.keys, frame):
                weights_FR[row, count - len(self.keys) + key] = weight
        return weights_FR


def compile_film(
    base: Base,
    prompts: dict[int, str],
    negative_prompt: str | None,
    *,
    concept: Concept | None,
    control: Control,
    size: tuple[int, int] | None = None,
    loop: int | None = None,
) -> FilmPrompts:
    """Compiles one film's prompts, by key frame; alone, so that they do not depend on the film's company.

    Args:
        negative_prompt: None without guidance.
        size: as in `compile_prompts`.
        loop: the frames of a film whose end flows into its beginning; its last prompt goes over into its first.

    Raises:
        UserError: a part of the concept's strength is asked for, and it has no part that can be given.
    """
    if loop is not None and len(prompts) > 1:
        prompts = {**prompts, loop: prompts[min(prompts)]}
    texts = [*([] if negative_prompt is None else [negative_prompt]), *prompts.values()]
    plain = None
    if not control.concept_is_whole:
        plain = compile_prompts(base, texts, concept=class_in_place(base, concept), size=size)
    return FilmPrompts(tuple(prompts), compile_prompts(base, texts, concept=concept, size=size), plain, control, loop)


def class_in_place(base: Base, concept: Concept | None) -> Concept:
    """The concept without its effect: its tokens read as their class words do, in as many places, so that all else in
    a prompt stays where it is.

    Raises:
        UserError: no concept, or one whose class nobody knows.
    """
    allowed = "a concept that knows its class word"
    if concept is None:
        raise UserError("a strength for a concept where there is none", allowed=allowed, do="name one with --concept")
    tables = [encoder.get_input_embeddings().weight for encoder in base.text_encoders.values()]
    tokens = {}
    for token, rows_KD in concept.tokens.items():
        word = concept.metadata.class_words.get(token, "")
        batch = tokenize(base.tokenizer, [word])
        ids = batch.ids_BL[0, 1 : int(batch.eos_B[0])]
        if len(ids) == 0:
            raise UserError(f"a strength for {token!r}, whose class is not known", allowed=allowed, do="leave it 1")
        mean_D = torch.cat([table[ids.to(table.device)].float().mean(0) for table in tables])
        tokens[token] = mean_D.expand(len(rows_KD), -1)
    return Concept(tokens, {}, concept.metadata)


def read_films(films: Sequence[FilmPrompts], *, guided: bool, done: float, frames: Sequence[int]) -> PromptKV:
    """What a batch of films reads at one step, in these frames: the negative prompts first where there is guidance.

    Returns:
        One row for each film where no film's frames differ in what they read, else one for each frame of each film.
    """

    def read(pick: Callable[[PromptKV], Tensor], layer: str | None = None) -> Tensor:
        rows = [
            film.read(
                pick,
                1.0 if layer is None else film.control.share_of(layer),
                negative=negative,
                done=done,
                frames=frames,
            )
            for negative in ([True, False] if guided else [False])
            for film in films
        ]
        count = max(map(len, rows))
        return torch.cat([row.expand(count, *row.shape[1:]) for row in rows])

    first = films[0].rows
    layers = {layer: (read(_in_layer(layer, 0), layer), read(_in_layer(layer, 1), layer)) for layer in first.layers}
    added = None if first.added is None else {name: read(_in_added(name)) for name in first.added}
    return PromptKV(layers, added)


def _in_layer(layer: str, part: int) -> Callable[[PromptKV], Tensor]:
    return lambda prompt: prompt.layers[layer][part]


def _in_added(name: str) -> Callable[[PromptKV], Tensor]:
    def pick(prompt: PromptKV) -> Tensor:
        assert prompt.added is not None
        return prompt.added[name]

    return pick


def _mix(rows: Tensor, weights_FR: Tensor) -> Tensor:
    """Rows taken as they are where weights are 0 and 1, else mixed."""
    if ((weights_FR == 0) | (weights_FR == 1)).all():
        return rows[weights_FR.argmax(dim=1).to(rows.device)]
    return torch.einsum("fr,r...->f...", weights_FR.to(rows), rows)
