from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from cdvideo.evaluation.bench import Report, Shown
from cdvideo.evaluation.figures import Figure, mean, ratio, share
from cdvideo.evaluation.page import show, write_report
from cdvideo.evaluation.prompts import Ask

ASK = Ask("a dog wearing a top hat <surfing>", "dog", "top hat", "surfing")


@pytest.fixture
def report() -> Report:
    rng = np.random.default_rng(0)
    film_FHWC = rng.integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    right = np.array([True] * 87 + [False] * 13)
    return Report(
        figures=[
            share(right, part="Stills", name="subject", of="pictures", at_least=92),
            ratio([1.0, 3.0], [2.0, 2.0], part="Films", name="flow", of="films", at_least=0.6, at_most=1.6),
            mean([30.0, 31.0], part="Autoencoder", name="PSNR", unit="dB", of="stills"),
        ],
        tables={"Stills: subject": {"<dog>": {"right, %": 87.0, "pictures": 100}}},
        sheet=[Shown(ASK, film_FHWC[:1], ("dog", "", "surfing"), False), Shown(ASK, film_FHWC[1:2], ASK.triple, True)],
        films=[Shown(ASK, film_FHWC, ("dog", "top hat", "snow"), False)],
        settings={"seed": 1},
    )


def test_figures_carry_interval_and_verdict(report: Report) -> None:
    subject, flow, psnr = report.figures
    assert (subject.value, subject.passed, subject.asked) == (87.0, False, "at least 92 %")
    assert subject.interval == pytest.approx((79.02, 92.24), abs=0.01)
    assert (flow.value, flow.passed, flow.asked) == (1.0, True, "0.6 to 1.6 x")
    assert flow.interval == (0.5, 1.5)
    assert (psnr.value, psnr.passed, psnr.asked) == (30.5, None, "")


@pytest.mark.parametrize(("value", "passed"), [(30.0, True), (30.1, False)])
def test_at_most(value: float, passed: bool) -> None:
    figure = Figure(part="", name="", value=value, unit="s", n=1, of="calls", at_most=30)
    assert figure.passed is passed
    assert figure.asked == "at most 30 s"


def test_the_page_holds_figures_pictures_and_films(report: Report, tmp_path: Path) -> None:
    text = write_report(report, tmp_path).read_text()
    assert '<td class="number">87 %</td><td>79.0 to 92.2 (Wilson)</td><td>100 pictures</td>' in text
    assert text.count("not reached</span>") == 1
    assert "1 of 2 figures are as asked for" in text
    assert len(re.findall(r'src="data:image/webp;base64,UklG[^"]+"', text)) == 3  # UklG: RIFF
    assert "a dog wearing a top hat &lt;surfing&gt;" in text and "<surfing>" not in text
    assert "judged: nothing worn<" in text
    assert "judged: snow<" in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text), "the page needs no other file"


def test_files_beside_the_page(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "out", also=tmp_path / "elsewhere" / "figures.json")
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names == {"results.json", "index.html", "sheet.png", "films/1.webp"}
    results = json.loads((tmp_path / "elsewhere" / "figures.json").read_text())
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["figures"][0]["interval_95"] == pytest.approx([79.018, 92.237], abs=1e-2)
    assert [figure["passed"] for figure in results["figures"]] == [False, True, None]


def test_numbers_are_short() -> None:
    assert [show(v) for v in (600.0, 12.345, 0.98765, -0.5)] == ["600", "12.3", "0.988", "-0.500"]
