"""The identity encoder's card, written from what its training recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cdvideo.evaluation.identity.model import WEIGHTS_FILE

HEAD = """---
license: apache-2.0
---
# The identity encoder

A small convolutional network that turns one picture of cdvideo's illustrated world into a unit feature. The cosine of
two features says how surely the pictures show the same individual, wherever it is and whatever it wears. With it the
study of tuning methods measures identity. It knows this world alone; of photographs it says nothing of use, and it is
neither CLIP nor DINO.

It is an instrument for measuring. Nothing in this project is trained against it. It was trained with a supervised
contrastive loss (arXiv 2004.11362) on individuals in pairs of look-alikes (the same class and drawing; another fur, or
another marking), a few classes in a batch, each individual in scenes of every setting and with every thing worn. None
of them has the fur and the marking of an individual that is held out for concepts. The pictures are turned, moved,
mirrored, changed in colour by a fifth of what the judge sees, {round_trips}blurred, made noisy and
compressed.
"""
TAIL = """
Measured on individuals that took no part in training, with the weights as they are in this folder. A pair of pictures
is said to show the same individual where their cosine exceeds a threshold. AUC: how often a pair of the same individual
has the higher cosine of two pairs. Equal error rate: where as many of the same are missed as of others are let in.

## Licence of the data

The drawings are Fluent Emoji (Microsoft, MIT licence) and Noto Color Emoji (Google, SIL Open Font License 1.1); see
NOTICE. The weights are released under Apache-2.0.
"""
PARTS = {
    "unseen": "unseen individuals",
    "heldout": "the ten held out for concepts",
    "heldout_round_trip": "the ten, through the autoencoder, against plain renders",
}
KINDS = {"look_alike": "its look-alike", "same_class": "another of its class", "other_class": "of another class"}


def write_card(folder: Path) -> None:
    """Writes folder/README.md from folder/training.json."""
    facts: dict[str, Any] = json.loads((folder / "training.json").read_text())
    trips = "sent through the base's autoencoder, " if facts["vae_in_training"] else ""
    lines = [HEAD.format(round_trips=trips), "## Figures\n"]
    lines.append("| pictures of | against | mean cosine | AUC | equal error rate | pairs |\n|---|---|---|---|---|---|")
    for part in [part for part in PARTS if part in facts]:
        same = facts[part]["same"]
        lines.append(f"| {PARTS[part]} | itself | {same['cosine']:.3f} | | | {same['n']:,} |")
        for kind in [kind for kind in KINDS if kind in facts[part]]:
            fact = facts[part][kind]
            lines.append(
                f"| {PARTS[part]} | {KINDS[kind]} | {fact['cosine']:.3f} | {fact['auc']:.4f} | "
                f"{100 * fact['equal_error_rate']:.2f} % | {fact['n']:,} |"
            )
    lines.append("\n## Training\n")
    if facts["from_judge"]:
        lines.append(
            f"{facts['from_judge']} of the {facts['tensors']} tensors of its stages began as the judge's; the rest "
            "began at random, and all were trained.\n"
        )
    lines.append(
        f"{facts['parameters']:,} parameters, {facts['bytes'] / 2**20:.2f} MiB in half precision ({WEIGHTS_FILE}). "
        f"{facts['individuals']:,} individuals, {facts['views']} views of each, seed {facts['seed']}; "
        f"{facts['steps']:,} steps of {facts['batch']} pictures, {facts['seconds'] / 60:.1f} minutes on "
        f"{facts['device']} ({facts['dtype']}, torch {facts['torch']}), {facts['date']}.\n"
    )
    lines.append("Anew: `python scripts/evaluate.py train-identity --out FOLDER --vae cdvideo/base/tiny/vae`.")
    (folder / "README.md").write_text("\n".join(lines) + "\n" + TAIL, encoding="utf-8")
