"""Semantic drift, measured while a concept is trained: does it still stand, and is it still read, as one of its class?

ClassDiffusion (arXiv 2405.17532), section 3: tuning moves "a sks dog" out of the cluster of dog phrases, and the class
word loses attention; with it goes what the base knew to do with dogs. Text is measured on phrases that no loss ever
sees, attention on the same noisy latents each time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cdvideo.base.loader import Base
from cdvideo.concept.attention_maps import START, attention_maps, word_positions
from cdvideo.concept.concept import Concept
from cdvideo.concept.drift_file import DRIFT_FILE, ConceptDrift, DriftRecord, load_drift, save_drift
from cdvideo.concept.phrases import HELD_OUT_PHRASES, fill
from cdvideo.concept.semantic import phrase_features

TEXT_EVERY, ATTENTION_EVERY = 10, 50  # steps; together they cost one or two hundredths of a training
ATTENTION_PHRASE = "a {} wearing headphones"
NOISE_LEVELS = (0.3, 0.7)  # of the training schedule's timesteps
PICTURES = 2  # latents that attention is measured on
MAP_HEIGHT = 16  # maps are kept at the finest resolution up to this: where words are told apart best (2208.01626)


class DriftMeter:
    """Measures concepts of some class words, and keeps the path that they take.

    Args:
        class_words: Token to class word.
        latents: Token to latents_NCHW of the concept's pictures; the first few serve to measure attention.
        steps: Of the whole training; the last one is always measured.
    """

    def __init__(
        self, base: Base, class_words: Mapping[str, str], latents: Mapping[str, Tensor], *, steps: int
    ) -> None:
        self.base, self.latents, self.steps = base, latents, steps
        self.record = DriftRecord(
            text_steps=[],
            attention_steps=[],
            concepts={token: self._new_path(token, word) for token, word in class_words.items()},
        )

    def due(self, step: int) -> bool:
        """Whether this step is one to measure at: every `TEXT_EVERY`, and the last."""
        return step % TEXT_EVERY == 0 or step == self.steps

    @torch.no_grad()
    def measure(self, concept: Concept, step: int) -> dict[str, float]:
        """Measures where this step is due; means over the concepts.

        Returns:
            - `drift_distance`: the mean of 1 - cos between a phrase of the concept and the same phrase of the class.
            - `drift_cosine`: the mean cosine of the concept's phrases to the centre of the class's cluster. It stays
              high for a concept whose phrases have become all alike, which the distance does not.
            - `class_cosine`: the same for the class's own phrases, a constant.
            - `drift_percentile`: the share, in %, of the class's own phrases that stand no nearer to the centre than
              the concept's do on average.
            Every `ATTENTION_EVERY` steps, and at the last, also:
            - `attention_class`, `attention_concept`: the shares of cross-attention in [0, 1] that the class word and
              the token get, averaged over resolutions.
            Empty at steps that are not due.
        """
        if not self.due(step):
            return {}
        self.record.text_steps.append(step)
        found = [self._measure_text(concept, token) for token in self.record.concepts]
        if step % ATTENTION_EVERY == 0 or step == self.steps:
            self.record.attention_steps.append(step)
            for metrics, token in zip(found, self.record.concepts, strict=True):
                metrics |= self._measure_attention(concept, token)
        return {name: sum(metrics[name] for metrics in found) / len(found) for name in found[0]}

    def save(self, folder: Path) -> None:
        """Writes what was measured so far into the folder, as `DRIFT_FILE`."""
        save_drift(self.record, folder / DRIFT_FILE)

    def restore(self, folder: Path, step: int) -> None:
        """Takes up what an interrupted training had measured up to a step."""
        self.record = load_drift(folder / DRIFT_FILE).until(step)

    @torch.no_grad()
    def _new_path(self, token: str, class_word: str) -> ConceptDrift:
        maps = self._attention(None, token, class_word)
        words = tuple(word_positions(self.base.tokenizer, _prompt(f"{token} {class_word}"), {token: 1}))
        class_TD = class_features(self.base, class_word).cpu()
        return ConceptDrift(
            class_word=class_word,
            words=words,
            heights=tuple(maps[START]),
            class_TD=class_TD,
            class_mass_WR=_mass(maps, words),
            concept_TD=class_TD,
        )

    def _measure_text(self, concept: Concept, token: str) -> dict[str, float]:
        path = self.record.concepts[token]
        phrases = [fill(template, f"{token} {path.class_word}") for template in HELD_OUT_PHRASES]
        path.concept_TD = F.normalize(phrase_features(self.base, phrases, {token: concept.tokens[token]})).cpu()
        path.path.append(path.concept_TD.mean(dim=0))
        own_T = cosines_to_centre(path.class_TD, path.class_TD)
        cosine = cosines_to_centre(path.concept_TD, path.class_TD).mean()
        return {
            "drift_distance": 1 - (path.concept_TD * path.class_TD).sum(dim=1).mean().item(),
            "drift_cosine": cosine.item(),
            "class_cosine": own_T.mean().item(),
            "drift_percentile": 100 * (own_T <= cosine).float().mean().item(),
        }

    def _measure_attention(self, concept: Concept, token: str) -> dict[str, float]:
        path = self.record.concepts[token]
        maps = self._attention(concept, token, f"{token} {path.class_word}")
        height = max((h for h in path.heights if h <= MAP_HEIGHT), default=min(path.heights))
        path.mass.append(_mass(maps, path.words))
        path.maps.append(torch.stack([maps[word][height][0] for word in path.words]).half())
        shares = dict(zip(path.words, path.mass[-1].mean(dim=1).tolist(), strict=True))
        return {
            "attention_class": sum(shares[word] for word in path.class_word.split()),
            "attention_concept": shares[token],
        }

    def _attention(self, concept: Concept | None, token: str, phrase: str) -> dict[str, dict[int, Tensor]]:
        schedule = int(self.base.scheduler_config["num_train_timesteps"])
        timesteps = [int(level * schedule) for level in NOISE_LEVELS]
        latents_NCHW = self.latents[token][:PICTURES]
        generator = torch.Generator().manual_seed(0)
        return attention_maps(self.base, concept, _prompt(phrase), latents_NCHW, timesteps, generator)


@torch.no_grad()
def class_features(base: Base, class_word: str) -> Tensor:
    """A class's cluster: unit features_TD of the held-out phrases with the class word in them."""
    return F.normalize(phrase_features(base, [fill(template, class_word) for template in HELD_OUT_PHRASES]))


def cosines_to_centre(features_TD: Tensor, class_TD: Tensor) -> Tensor:
    """Each phrase's cosine to the centre of a cluster, the mean of its unit features: cosines_T in [-1, 1]."""
    return F.cosine_similarity(features_TD, F.normalize(class_TD).mean(dim=0), dim=-1)


def _prompt(phrase: str) -> str:
    return fill(ATTENTION_PHRASE, phrase)


def _mass(maps: Mapping[str, Mapping[int, Tensor]], words: Sequence[str]) -> Tensor:
    """The words' shares of attention, mass_WR; 0 for words that do not stand in the prompt."""
    heights = maps[START].keys()
    return torch.tensor([[maps[w][h].mean().item() if w in maps else 0.0 for h in heights] for w in words])
