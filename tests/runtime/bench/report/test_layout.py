"""The report as a browser lays it out: on a desk, on a phone, on paper."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import browser
import pytest

from vitrm.runtime.bench.report.page import render
from vitrm.runtime.bench.run import bench

pytestmark = [pytest.mark.browser, pytest.mark.slow]

A4 = 703  # CSS pixels between the margins
# Pairs of texts of one drawing that lie on each other.
OVERLAPS = """
[...document.querySelectorAll('svg')].flatMap((svg) => {
  const texts = [...svg.querySelectorAll('text')].map((t) => [t.textContent, t.getBoundingClientRect()]);
  return texts.flatMap(([a, p], i) => texts.slice(i + 1).filter(([, q]) =>
    Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1 && Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 3
  ).map(([b]) => `${a} | ${b}`));
})
"""
# Texts that reach beyond their drawing.
CLIPPED = """
[...document.querySelectorAll('svg')].flatMap((svg) => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter((t) => {
    const box = t.getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 2;
  }).map((t) => t.textContent);
})
"""
# What reaches beyond the page, or hides behind a scroll bar.
HIDDEN = """
[...document.querySelectorAll('body *:not(svg *)')].filter((e) => e.getClientRects().length && !e.closest('thead') && (
  e.getBoundingClientRect().right > innerWidth + 1 || (e.clientWidth > 0 && e.scrollWidth > e.clientWidth + 1
    && getComputedStyle(e).display !== 'inline'))).map((e) => `${e.tagName}.${e.className}: ${e.textContent.slice(0, 60)}`)
"""


@pytest.fixture(scope="module")
def page(artifact: Path, loop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every chart but those of energy and corruptions, of files with long names."""
    folder = tmp_path_factory.mktemp("report")
    long = folder / "an-experiment-of-a-long-afternoon-with-a-very-long-name-that-goes-on-and-on-s3-fp32.onnx"
    long.write_bytes(artifact.read_bytes())
    found = bench(
        [long, loop],
        run=str(artifact.parent / "run"),
        batches=(1, 4),
        halt_thresholds=(1, 0.5),
        seconds=0.05,
        threads=1,
        depths=True,
    )
    (folder / "index.html").write_text(render(replace(found, command="vitrm-bench …")), encoding="utf-8")
    long.unlink()
    return folder


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Tab]:
    with browser.chromium(tmp_path_factory.mktemp("chromium") / "profile") as tab:
        yield tab


@pytest.mark.parametrize("surface", ["desk", "phone", "paper"])
def test_nothing_overlaps_and_nothing_is_cut(surface: str, page: Path, tab: browser.Tab) -> None:
    with browser.served(page) as address:
        tab.open(address, width={"desk": 1280, "phone": 390, "paper": A4}[surface])
        if surface == "paper":
            tab.send("Emulation.setEmulatedMedia", media="print")
        tab.wait("document.readyState === 'complete' && document.querySelector('svg') !== null")
        assert tab.evaluate("document.querySelectorAll('svg text').length") > 60
        assert tab.evaluate(OVERLAPS) == []
        assert tab.evaluate(CLIPPED) == []
        assert tab.evaluate(HIDDEN) == []
        assert tab.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")
        tab.send("Emulation.setEmulatedMedia", media="")
    assert tab.problems == []


@pytest.mark.parametrize(("width", "beside"), [(1280, True), (1024, True), (900, True), (390, False)])
def test_two_charts_stand_beside_each_other_but_on_a_phone(
    width: int, beside: bool, page: Path, tab: browser.Tab
) -> None:
    with browser.served(page) as address:
        tab.open(address, width=width)
        tab.wait("document.readyState === 'complete' && document.querySelector('svg') !== null")
        pairs = tab.evaluate("""[...document.querySelectorAll('.charts')].filter((row) => row.children.length > 1)
          .map((row) => [...row.children].slice(0, 2).map((e) => e.getBoundingClientRect().top))""")
        assert pairs
        assert all((first == second) == beside for first, second in pairs)
