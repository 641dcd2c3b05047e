"""The judge's card, written from what its training recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cdvideo.evaluation.judge.model import CLASSES, HEADS, WEIGHTS_FILE

HEAD = """---
license: apache-2.0
---
# The judge

A small convolutional network that looks at one picture of cdvideo's illustrated world and names three things: the
subject, what it wears, and the setting or doing. `scripts/evaluate.py base` counts with it how often the embedded base
draws what the prompt says. It knows this world alone; of photographs it says nothing of use.

It is an instrument for measuring. Nothing in this project is trained against it, and it shares neither renders nor seed
with the base's training: its stills hold all triples (those held out from the base too), individuals that the base
never sees and wider proportions, and go through erased background, moves, other colours, {round_trips}blur, noise and
compression.
"""
TAIL = """
Accuracy is measured on renders that took no part in training or calibration, with the weights as they are in this
folder, with 95 % Wilson intervals. Confidence is calibrated with one temperature for each head; the calibration error
is the expected calibration error over 15 bins.

## Licence of the data

The drawings are Fluent Emoji (Microsoft, MIT licence) and Noto Color Emoji (Google, SIL Open Font License 1.1); see
NOTICE. The weights are released under Apache-2.0.
"""


def write_card(folder: Path) -> None:
    """Writes folder/README.md from folder/training.json."""
    facts: dict[str, Any] = json.loads((folder / "training.json").read_text())
    trips = "round trips through the base's autoencoder, " if facts["vae_in_training"] else ""
    lines = [HEAD.format(round_trips=trips), "## Figures\n"]
    lines.append("| pictures | head | accuracy | 95 % interval | calibration error |\n|---|---|---|---|---|")
    titles = {"renders": "new renders", "round_trip": "new renders through the autoencoder"}
    for part in [part for part in titles if part in facts]:
        for head in HEADS:
            fact = facts[part][head]
            low, high = fact["interval"]
            lines.append(
                f"| {titles[part]} (n = {facts[part]['n']:,}) | {head} | {100 * fact['accuracy']:.2f} % | "
                f"{100 * low:.2f} to {100 * high:.2f} % | {fact['calibration_error']:.4f} |"
            )
        lines.append(f"| {titles[part]} | all three | {100 * facts[part]['all_three']:.2f} % | | |")
    lines.append("\n## Training\n")
    lines.append(
        f"{facts['parameters']:,} parameters, {facts['bytes'] / 2**20:.2f} MiB in half precision ({WEIGHTS_FILE}). "
        f"{facts['scenes']:,} stills with seed {facts['seed']}, {facts['steps']:,} steps of {facts['batch']} "
        f"pictures, {facts['seconds'] / 60:.1f} minutes on {facts['device']} ({facts['dtype']}, torch "
        f"{facts['torch']}), {facts['date']}. "
        f"Temperatures: {', '.join(f'{head} {value:.3f}' for head, value in facts['temperature'].items())}.\n"
    )
    lines.append("Anew: `python scripts/evaluate.py train-judge --out FOLDER --vae cdvideo/base/tiny/vae`.\n")
    lines.append("## Classes\n")
    lines += [f"- {head}: {', '.join(name or 'nothing' for name in names)}" for head, names in CLASSES.items()]
    (folder / "README.md").write_text("\n".join(lines) + "\n" + TAIL, encoding="utf-8")
