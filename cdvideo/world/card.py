"""The model card of the embedded base, written from what its training recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cdvideo.world.config import MakeBaseConfig
from cdvideo.world.heldout import HELDOUT_INDIVIDUALS, HELDOUT_TRIPLES

TITLES = {"vae": "Autoencoder", "text": "Text encoder", "unet": "Image UNet", "motion": "Motion modules"}
HEAD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# The embedded base of cdvideo

A small text-to-image model with the architecture of Stable Diffusion, and motion modules in the layout of AnimateDiff,
trained from scratch by `scripts/make_base.py` on an illustrated world that this package renders. It draws that world at
{resolution} x {resolution} pixels and nothing else: no photographs, no people, no text.

Load it with `cdvideo.load_base("tiny")`, or with diffusers' `StableDiffusionPipeline.from_pretrained` and, with
`MotionAdapter.from_pretrained(folder + "/motion")`, `AnimateDiffPipeline.from_pretrained`.
"""
TAIL = """
## Licence of the data

The drawings are Fluent Emoji (Microsoft, MIT licence) and Noto Color Emoji (Google, SIL Open Font License 1.1), fetched
when the base is built and not part of this folder; backdrops, boards, headphones and markings are drawn by this
package. See NOTICE. The weights are released under Apache-2.0.
"""


def write_card(config: MakeBaseConfig, folder: Path) -> None:
    """Writes ``folder``/README.md from ``folder``/training.json, the config and the held-out lists."""
    facts: dict[str, Any] = json.loads((folder / "training.json").read_text())
    stages = [stage for stage in TITLES if stage in facts]
    bytes_all = sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))
    lines = [HEAD.format(resolution=config.resolution), "## Training\n"]
    lines.append(f"{_data_line(facts)} Weights in this folder: {bytes_all / 2**20:.1f} MiB in half precision.\n")
    lines.append("| part | parameters | steps | batch | minutes | device |\n|---|---|---|---|---|---|")
    for stage in stages:
        fact = facts[stage]
        lines.append(
            f"| {TITLES[stage]} | {fact['parameters']:,} | {fact['steps']:,} | {fact['batch']} | "
            f"{fact['seconds'] / 60:.1f} | {fact['device']}, {fact['dtype']} |"
        )
    lines.append("\n## Figures\n\n| part | figure | value |\n|---|---|---|")
    common = {"parameters", "steps", "of", "batch", "seconds", "device", "dtype", "data"}
    for stage in stages:
        lines += [f"| {TITLES[stage]} | {k} | {v} |" for k, v in facts[stage].items() if k not in common]
    lines.append("\n`psnr_db`: mean over the held-out stills, round trip, uint8. `retrieval_*`: caption to picture.")
    lines.append(
        "`cosine_*`: between end-of-text features of phrases that name the same class, and the nearest other class."
    )
    lines.append("\n## Never seen in training\n")
    triples = "; ".join(" + ".join(triple) for triple in HELDOUT_TRIPLES)
    lines.append(f"Individuals, kept for studies of concepts: {', '.join(HELDOUT_INDIVIDUALS)}.\n")
    lines.append(f"{len(HELDOUT_TRIPLES)} triples of subject, thing and setting: {triples}.")
    (folder / "README.md").write_text("\n".join(lines) + "\n" + TAIL, encoding="utf-8")


def _data_line(facts: dict[str, Any]) -> str:
    """What each part was trained and measured on; parts that share their data are named together."""
    parts: dict[str, list[str]] = {}
    for stage in [stage for stage in TITLES if stage in facts]:
        for split, made in facts[stage]["data"].items():
            kind = {
                "train": f"{made['count']:,} stills",
                "heldout": f"{made['count']:,} held-out stills to measure on",
                "clips": f"{made['count']:,} clips of {made.get('frames')} frames",
            }[split]
            text = f"{kind}, each with {made['captions']} captions, seed {made['seed']}"
            parts.setdefault(text, []).append(TITLES[stage][0].lower() + TITLES[stage][1:])
    groups = (f"{text} ({', '.join(titles)})" for text, titles in parts.items())
    return f"Data: {'; '.join(groups)}."
