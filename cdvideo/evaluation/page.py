"""The report on disk: results.json, one HTML page with everything in it, and its pictures as files of their own."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from cdvideo.evaluation.bench import Report, Shown
from cdvideo.evaluation.figures import Figure
from cdvideo.media.export import write_video
from cdvideo.runs import atomic_path

FPS = 8.0
SHEET_COLUMNS = 8
METHODS = """
Intervals are of 95 %, but for a range, which is that of all runs. Wilson: score interval of a proportion, each picture
counted as one trial, also where seeds share a prompt. Bootstrap: percentiles of 10,000 resamples. Whether a figure is
as asked for is judged by its value, not by its interval. Subject, thing and setting are named by the judge, a small
network that no training has seen. Flow is OpenCV's dense inverse search; subject consistency is VBench's formula on the
judge's features. Unknown words are made up, and stand before, between or after the parts of the prompt.
"""
STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #c62828; }
@media (prefers-color-scheme: dark) { :root { --good: #57c27d; --bad: #ff7b72; } }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .8rem; }
figure { margin: 0; } figure img { width: 100%; border-radius: 4px; } figcaption { font-size: .8rem; }
.films { grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); }
"""


def write_report(report: Report, out: Path, *, also: Path | None = None) -> Path:
    """Writes results.json, index.html, sheet.png and films/ into `out`; returns the page's path.

    Args:
        also: another place for the JSON.
    """
    text = json.dumps(as_json(report), indent=2) + "\n"
    for path in [out / "results.json", *([also] if also else [])]:
        with atomic_path(path) as part:
            part.write_text(text, encoding="utf-8")
    films = [write_film(shown, out / "films" / f"{i + 1}.webp") for i, shown in enumerate(report.films)]
    if report.sheet:
        with atomic_path(out / "sheet.png") as part:
            contact_sheet(report.sheet).save(part)
    page = out / "index.html"
    with atomic_path(page) as part:
        part.write_text(render_page(report, films), encoding="utf-8")
    return page


def as_json(report: Report) -> dict[str, object]:
    """Everything but the pictures."""
    return {
        "settings": report.settings,
        "figures": [figure.as_json() for figure in report.figures],
        "tables": report.tables,
    }


def render_page(report: Report, films: Sequence[bytes]) -> str:
    """One HTML page with the pictures in it. films: an animated webp for each of the report's films."""
    asked = [figure for figure in report.figures if figure.passed is not None]
    reached = sum(figure.passed is True for figure in asked)
    body = [
        "<h1>The embedded base, measured</h1>",
        f"<p>{reached} of {len(asked)} figures are as asked for. Nothing on this page was picked: pictures and films "
        "are the first of a shuffled order that the seed fixes.</p>",
        figures_table(report.figures),
        f"<p>{METHODS}</p>",
        f"<h2>{len(report.sheet)} held-out triples</h2>",
        f'<div class="grid">{"".join(card(shown, still_bytes(shown)) for shown in report.sheet)}</div>',
    ]
    if report.films:
        cards = "".join(card(shown, film) for shown, film in zip(report.films, films, strict=True))
        body += [f"<h2>{len(report.films)} films of held-out triples</h2>", f'<div class="grid films">{cards}</div>']
    for title, rows in report.tables.items():
        body.append(f"<details><summary>{escape(title)}</summary>{class_table(rows)}</details>")
    settings = "".join(f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in report.settings.items())
    body.append(f"<h2>Settings</h2><table>{settings}</table>")
    head = f'<meta charset="utf-8"><title>The embedded base, measured</title><style>{STYLE}</style>'
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}{view}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"
    )


def figures_table(figures: Sequence[Figure]) -> str:
    """All figures beside what was asked for, grouped by part."""
    rows = []
    for part, group in groupby(figures, key=lambda figure: figure.part):
        rows.append(f'<tr><th colspan="6">{escape(part)}</th></tr>')
        rows += [figure_row(figure) for figure in group]
    head = "<tr><th>figure</th><th>measured</th><th>interval</th><th>over</th><th>asked for</th><th></th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def figure_row(figure: Figure) -> str:
    interval = ""
    if figure.interval is not None:
        interval = f"{show(figure.interval[0])} to {show(figure.interval[1])} ({figure.method})"
    verdict = {None: "", True: '<span class="good">reached</span>', False: '<span class="bad">not reached</span>'}
    cells = [f"<td>{escape(figure.name)}</td>"]
    cells.append(f'<td class="number">{show(figure.value)} {escape(figure.unit)}</td>')
    cells += [f"<td>{escape(text)}</td>" for text in (interval, f"{figure.n:,} {figure.of}", figure.asked)]
    return f"<tr>{''.join(cells)}<td>{verdict[figure.passed]}</td></tr>"


def class_table(rows: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(rows.values())))
    head = "".join(f"<th>{escape(name)}</th>" for name in ["", *columns])
    lines = [
        f"<tr><td>{escape(name)}</td>"
        + "".join(f'<td class="number">{show(row[column])}</td>' for column in columns)
        + "</tr>"
        for name, row in rows.items()
    ]
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def card(shown: Shown, webp: bytes) -> str:
    """A picture or film with its prompt, and what the judge saw where that is something else."""
    verdict = '<span class="good">right</span>'
    if not shown.right:
        pairs = zip(shown.seen, shown.ask.triple, strict=True)
        seen = ", ".join(name or "nothing worn" for name, wanted in pairs if name != wanted) or "not steady"
        verdict = f'<span class="bad">judged: {escape(seen)}</span>'
    image = f'<img alt="{escape(shown.ask.prompt)}" src="data:image/webp;base64,{base64.b64encode(webp).decode()}">'
    return f"<figure>{image}<figcaption>{escape(shown.ask.prompt)}<br>{verdict}</figcaption></figure>"


def show(value: float) -> str:
    """Three figures that count, whole numbers as they are."""
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def still_bytes(shown: Shown) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(shown.frames_FHWC[0]).save(buffer, "webp", quality=90)
    return buffer.getvalue()


def write_film(shown: Shown, path: Path) -> bytes:
    """Writes an animated webp and returns its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(iter(shown.frames_FHWC), path, fps=FPS, metadata={"prompt": shown.ask.prompt})
    return path.read_bytes()


def contact_sheet(sheet: Sequence[Shown]) -> Image.Image:
    """All pictures in rows of eight, without words."""
    side = sheet[0].frames_FHWC.shape[1]
    rows = -(-len(sheet) // SHEET_COLUMNS)
    canvas = np.full((rows * side, min(SHEET_COLUMNS, len(sheet)) * side, 3), 255, dtype=np.uint8)
    for i, shown in enumerate(sheet):
        top, left = i // SHEET_COLUMNS * side, i % SHEET_COLUMNS * side
        canvas[top : top + side, left : left + side] = shown.frames_FHWC[0]
    return Image.fromarray(canvas)
