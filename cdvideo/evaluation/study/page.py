"""The study on one HTML page: tables, plots, and the same prompts from the same noise, method by method."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from cdvideo.evaluation.drawing import Pictures
from cdvideo.evaluation.figures import Figure
from cdvideo.evaluation.page import FPS, STYLE, show
from cdvideo.evaluation.study import plots as study_plots
from cdvideo.evaluation.study.config import TOKEN
from cdvideo.evaluation.study.pieces import asked
from cdvideo.evaluation.study.results import HALVES, Measured, StudyResults, Table, training_curves
from cdvideo.media.export import write_video
from cdvideo.runs import atomic_path

SHOWN_STILLS, SHOWN_FILMS = 6, 2  # prompts of each concept
MORE_STYLE = """
td small { display: block; opacity: .65; } .wide { overflow-x: auto; } .plot { max-width: 100%; background: white; }
table.pictures td { padding: .15rem; border: 0; max-width: 7rem; font-size: .8rem; }
table.pictures img { width: 7rem; border-radius: 4px; display: block; }
img.all { outline: 2px solid var(--good); } img.lacks { outline: 2px solid var(--bad); }
"""
METHODS = """
Intervals are of 95 %: percentiles of 10,000 resamples of the concepts and, within each, of its prompts; seeds are
averaged first. Where all are right, or all are wrong, it is Wilson's score interval of concepts and prompts. Two
methods are compared on the same concepts, prompts and seeds, resampled together. Composition is right where the judge,
a small network that no training has seen, finds the subject and all that the prompt asks for; what it does not ask for
is not looked at. Worn and setting count the pictures whose prompt asks for one. Every method draws the same prompts
from the same noise. No prompt takes place where the concept's own pictures do.
"""
LIKENESS = """
Likeness (identity, CLIP-I, DINO-I) is the mean cosine of a picture to the concept's pictures; agreement (CLIP-T,
BLIP-T) that with the prompt, in which the class word stands alone. Diversity is 1 - the mean cosine of the pictures of
a prompt to each other. Copying is the largest cosine to one of the concept's pictures, less what these have among
themselves: above 0 it is nearer to one of them than they are to each other. Both are of the judge's features.
Class pull is drift that is seen: how much nearer to the concept's pictures (cosine of identity) the class's own came,
drawn without the token; one number for each training.
"""


def write_page(results: StudyResults) -> Path:
    """Writes index.html with everything in it, and plots and films as files of their own; returns the page's path."""
    out, plots = results.config.out, draw_plots(results)
    for name, svg in plots.items():
        with atomic_path(out / f"{name}.svg") as part:
            part.write_bytes(svg)
    with atomic_path(out / "index.html") as part:
        part.write_text(render_page(results, plots), encoding="utf-8")
    return out / "index.html"


def render_page(results: StudyResults, plots: Mapping[str, bytes]) -> str:
    """The whole page. plots: SVG by file name (`draw_plots`)."""
    concepts = results.config.concepts
    body = ["<h1>Ways to learn a concept, compared</h1>", f"<p>{escape(_about(results))}</p>"]
    for half in results.tables:
        body += half_section(results, half, plots)
    for name, title in (("training", "While learning"), ("steps", "Over the steps")):
        if name in plots:
            body += [f"<h2>{title}</h2>", plot_image(plots[name], title)]
    for title, svg in results.drift.items():
        body += [f"<h3>{escape(title)}</h3>", plot_image(svg, title)]
    if results.classes:
        body.append("<h2>The class itself, asked for without the token</h2>")
        body += [image(still(np.asarray(sheet)), title, "plot") for title, sheet in results.classes.items()]
    chosen = (
        f"Nothing was picked: the seed chooses the prompts. What was trained is asked for as {TOKEN} and the class "
        "word. Where the outline is green the judge finds all."
    )
    body += ["<h2>Pictures</h2>", f"<p>{chosen}</p>", *(picture_grid(results, concept) for concept in concepts)]
    if results.films:
        body += ["<h2>Films</h2>", *(picture_grid(results, concept, film=True) for concept in concepts)]
    instruments = "; ".join(f"{name}: {what}" for name, what in results.settings["instruments"].items())
    body += [f"<h2>How it was measured</h2><p>{METHODS}{LIKENESS}</p><p>{escape(instruments)}</p>"]
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in results.settings.items())
    body.append(f"<details><summary>Settings</summary><table>{rows}</table></details>")
    head = f'<meta charset="utf-8"><title>Ways to learn a concept</title><style>{STYLE}{MORE_STYLE}</style>'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    content = "\n".join(body)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{content}\n</body></html>\n'


def draw_plots(results: StudyResults) -> dict[str, bytes]:
    """All plots that there is something to draw for, by file name."""
    curves = training_curves(results)
    plots = {
        f"pareto-{half.replace(' ', '-')}": study_plots.pareto(results.config, table)
        for half, table in results.tables.items()
        if all("identity" in row for row in table.values())
    }
    if curves and (svg := study_plots.training(curves)) is not None:
        plots["training"] = svg
    if results.checkpoints:
        plots["steps"] = study_plots.over_steps(results.checkpoints, curves)
    return plots


def half_section(results: StudyResults, half: str, plots: Mapping[str, bytes]) -> list[str]:
    """Tables and plot of some of the concepts."""
    concepts = ", ".join(getattr(results.config, HALVES[half]))
    body = [f"<h2>{escape(half.capitalize())}: {escape(concepts)}</h2>", table_of(results.tables[half])]
    if svg := plots.get(f"pareto-{half.replace(' ', '-')}"):
        body.append(plot_image(svg, "composition against identity"))
    body += ["<h3>Composition, by kind of prompt</h3>", table_of(results.kinds[half])]
    further = {"Compared": results.against, "Films": results.films, "Films, compared": results.films_against}
    for title, tables in further.items():
        if any(tables.get(half, {}).values()):
            body += [f"<h3>{title}</h3>", table_of(tables[half])]
    return body


def table_of(table: Table) -> str:
    """Methods as rows; each cell a value and its interval. What n counts stands in the cell's title."""
    columns = list(dict.fromkeys(name for row in table.values() for name in row))
    head = "".join(f"<th>{escape(name)}</th>" for name in ["", *columns])
    lines = [
        f"<tr><td>{escape(method)}</td>{''.join(cell(row.get(name)) for name in columns)}</tr>"
        for method, row in table.items()
        if row
    ]
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def cell(figure: Figure | None) -> str:
    if figure is None:
        return "<td></td>"
    low, high = figure.interval or (figure.value, figure.value)
    over = escape(f"n = {figure.n:,} {figure.of}; {figure.method}")
    value = f"{show(figure.value)} {figure.unit}".strip()
    return f'<td class="number" title="{over}">{value}<small>{show(low)} to {show(high)}</small></td>'


def picture_grid(results: StudyResults, concept: str, *, film: bool = False) -> str:
    """Some prompts of a concept, chosen by the seed: a row for each method, the concept's own pictures above."""
    config = results.config
    found = [
        m for m in results.measured
        if m.piece.concept == concept and m.piece.film == film and m.piece.step is None
        and m.piece.seed == config.training_seeds[0]
    ]  # fmt: skip
    prompts, _ = asked(config, found[0].piece)
    first = range(0, len(prompts), config.films.seeds if film else config.seeds)
    rng = np.random.default_rng([config.seed, zlib.crc32(concept.encode())])
    shown = sorted(rng.permutation(first)[: SHOWN_FILMS if film else SHOWN_STILLS])
    own = "".join(f"<td>{image(still(p), 'of the concept')}</td>" for p in results.references[concept])
    rows = [f"<tr><th>its pictures</th>{own}</tr>"] if not film else []
    rows.append(
        "<tr><th></th>" + "".join(f"<td>{escape(prompts[i].text(prompts[i].subject))}</td>" for i in shown) + "</tr>"
    )
    for measured in found:
        pictures = np.load(measured.file, mmap_mode="r")
        cells = [picture_cell(results, measured, pictures[i], i) for i in shown]
        rows.append(f"<tr><th>{escape(measured.piece.method.name)}</th>{''.join(cells)}</tr>")
    return f'<h3>{escape(concept)}</h3><div class="wide"><table class="pictures">{"".join(rows)}</table></div>'


def picture_cell(results: StudyResults, measured: Measured, picture: Pictures, index: int) -> str:
    """A still, or a film as an animated webp that is also written as a file."""
    right = measured.scores["composition"][index] == 1
    if not measured.piece.film:
        data = still(picture)
    else:
        path = results.config.out / "films" / f"{measured.file.stem}-{index}.webp"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(iter(np.asarray(picture)), path, fps=FPS, metadata={"method": measured.piece.method.name})
        data = path.read_bytes()
    return f"<td>{image(data, measured.piece.method.name, 'all' if right else 'lacks')}</td>"


def plot_image(svg: bytes, alt: str) -> str:
    return f'<img class="plot" alt="{escape(alt)}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'


def image(webp: bytes, alt: str, style: str = "") -> str:
    data = base64.b64encode(webp).decode()
    return f'<img class="{style}" alt="{escape(alt)}" src="data:image/webp;base64,{data}">'


def still(picture_HWC: Pictures) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(picture_HWC)).save(buffer, "webp", quality=88)
    return buffer.getvalue()


def _about(results: StudyResults) -> str:
    config = results.config
    counts: Sequence[tuple[int, str]] = (
        (len(config.methods), "methods"), (len(config.concepts), "concepts"), (4 * config.prompts, "prompts each"),
        (config.seeds, "seeds"), (len(config.training_seeds), "training seeds"),
    )  # fmt: skip
    return ", ".join(f"{count} {name}" for count, name in counts) + ". Whatever is shown is also in results.json."
