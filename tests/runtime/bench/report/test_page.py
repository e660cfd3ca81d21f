"""The report: complete, self-contained and safe to open."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from html_page import Page
from PIL import Image
from small_models import with_props

from vitrm import data
from vitrm.runtime.bench.report.gallery import png_address
from vitrm.runtime.bench.report.page import _parity, render
from vitrm.runtime.bench.rows import BenchResult
from vitrm.runtime.bench.run import bench

pytestmark = pytest.mark.slow

NASTY = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def result(artifact: Path, rough: Path) -> BenchResult:
    named = with_props(
        artifact,
        artifact.with_name("named & <b>.onnx"),
        run=f'"{NASTY}"',
        classes='["<i>0</i>","1","2","3","4","5","6","7","8","9"]',
    )
    # Other class names than the data set's: this one is measured on photographs.
    return bench(
        [artifact, rough, named], run=str(artifact.parent / "run"), batches=(1, 4), seconds=0.05, threads=1, depths=True
    )


@pytest.fixture(scope="module")
def text(result: BenchResult) -> str:
    return render(replace(result, command=f"vitrm-bench {NASTY}")).replace("\u00a0", " ")


def test_needs_nothing_from_elsewhere(text: str) -> None:
    page = Page(text)
    assert page.open == []
    assert page.sources
    assert all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert not re.search(r"https?://|url\(|@import|<script|<link|<iframe", text)
    assert "default-src 'none'" in text


def test_has_its_parts(text: str, result: BenchResult) -> None:
    page = Page(text)
    for heading in (
        "Results",
        "What halting saves",
        "Latency",
        "By class",
        "Accuracy by depth",
        "Where the answers differ",
        "What was measured",
        "How it was measured",
    ):
        assert f"<h2>{heading}</h2>" in text
    assert len(page.labels) == 6  # what halting saves, two distributions, two confusion matrices, by depth
    assert all(len(label) > 20 for label in page.labels)
    assert all(page.alts)
    assert text.count('scope="row"') >= len(result.rows)
    assert result.rows[1].weights_sha256 is not None
    assert result.rows[1].weights_sha256 in text


def test_a_phone_has_a_brief_table_of_speed(text: str, result: BenchResult) -> None:
    brief = text[text.index('class="small brief"') :].partition("</table>")[0]
    assert brief.count('scope="row"') == len(result.rows)
    assert brief.count('scope="rowgroup"') == len({row.batch for row in result.rows})


def test_parity_is_counted_in_answers() -> None:
    parity = {"logits": 3.7e-6, "agreement": 0.984375, "images": 64}
    assert _parity(parity) == "logits 3.7e-06; 63 of 64 answers the same"
    assert _parity({}) == "not recorded"


def test_shows_the_images_that_differ(text: str, result: BenchResult) -> None:
    assert result.evidence is not None
    rough = next(s for s in result.evidence.cases if s.name == "rough.onnx")
    assert rough.comparison is not None
    differing = rough.comparison.disagreeing
    assert f"answers {len(differing)} of 359 images differently" in text
    test = data.load("digits", "test")
    shown = text[text.index("rough.onnx</b> answers") :]
    first = re.search(r'src="data:image/png;base64,([^"]+)" alt="test image (\d+), a (\d)"', shown)
    assert first is not None
    number = int(first[2])
    assert number in differing
    assert int(first[3]) == test.labels[number]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(first[1])))).transpose(2, 0, 1)
    np.testing.assert_array_equal(pixels, test.pixels[number])
    assert shown.count("<li><img") >= min(24, len(differing))


def test_shows_how_each_class_fares(text: str, result: BenchResult) -> None:
    assert result.evidence is not None
    part = text[text.index("<h2>By class</h2>") : text.index("<h2>Accuracy by depth</h2>")]
    exact, rough = (one.result for one in result.by_class)
    for label in range(10):
        cells = "".join(
            f'<td data-label="{name}" class="n">{text}</td>'
            for name, text in (
                ("images", exact.images[label]),
                ("tiny.onnx", f"{100 * exact.recall[label]:.1f} %"),
                ("rough.onnx", f"{100 * rough.recall[label]:.1f} %"),
            )
        )
        assert f'<th scope="row">{label}</th>{cells}' in part
    label, answer, count = rough.most_confused(1)[0]
    assert f"<title>{label} taken for {answer}: {count}</title>" in part
    assert len(re.findall(r'class="cell"', part)) == sum(int((one.confusion > 0).sum()) for one in (exact, rough))
    # The surest mistakes, with the sure and wrong answer first.
    case = next(c for c in result.evidence.cases if c.name == "rough.onnx")
    assert case.sample.labels is not None
    wrong = case.predictions.top1 != case.sample.labels
    surest = int(np.flatnonzero(wrong)[case.predictions.probabilities.max(1)[wrong].argmax()])
    assert f"rough.onnx</b> is wrong on {wrong.sum()} of 359 images. On " in part
    assert "its eager model is wrong too. The 12 it is surest of" in part
    assert part.count(f'alt="test image {surest},') == 1  # what an artifact before got as wrong is not shown again


def test_says_when_nothing_differs(text: str) -> None:
    assert "tiny.onnx</b> and its eager model give the same answer on all 359 images" in text


def test_escapes_what_users_write(text: str) -> None:
    assert NASTY not in text
    assert "<i>0</i>" not in text
    assert "named &amp; &lt;b&gt;.onnx" in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_failed_rows_say_why(artifact: Path, tmp_path: Path) -> None:
    found = bench([artifact, tmp_path / "gone.onnx"], batches=(1,), limit=5, seconds=0.05, threads=1, eager=False)
    page = render(found)
    Page(page)
    told = re.sub(r"<svg.*?</svg>|<style>.*?</style>", "", page, flags=re.DOTALL)
    assert re.search(r"\d\u00a0%", told)
    assert not re.search(r"\d (%|×|ms|kB|MB)(?!\w)", told)  # no line breaks between a number and its unit
    assert "gone.onnx does not exist" in page
    assert "has no eager model to compare with" in page


def test_png_round_trip() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 7), np.uint8)
    kind, encoded = png_address(pixels).split(",")
    assert kind == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert image.size == (7, 5)
    np.testing.assert_array_equal(np.asarray(image).transpose(2, 0, 1), pixels)
