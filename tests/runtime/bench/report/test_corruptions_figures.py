"""Corruptions on the page: what an eye could not tell apart is drawn once."""

from __future__ import annotations

import re
from dataclasses import replace

from vitrm.runtime.bench.report.corruptions import alike, figure_rows, names, overview, same_within
from vitrm.runtime.bench.robustness.corruptions import SEVERITIES
from vitrm.runtime.bench.robustness.measure import BROKEN, Figures, Robustness, UnderCorruption
from vitrm.runtime.bench.robustness.table import most_told, reading, sentences

HALTING = Figures(accuracy=0.8, full_accuracy=0.8, lost=0.0, mean_steps_used=2.0, mean_halt_prob=0.9)
NEVER = replace(HALTING, full_accuracy=None, lost=None, mean_steps_used=6.0)
PLAIN = Figures(accuracy=0.8)


def in_fog(seen: Figures, name: str = "a.onnx") -> Robustness:
    fog = UnderCorruption(name="fog", group="weather", severities=(seen,) * len(SEVERITIES), mean=seen)
    return Robustness(
        name=name,
        data="digits",
        images=100,
        total=100,
        seed=0,
        steps=6,
        halt_threshold=0.9,
        budget=0.003,
        budget_from="stored",
        clean=seen,
        corruptions=(fog,),
        mean=seen,
    )


def test_lines_that_coincide_are_one() -> None:
    for lost, coincide in ((0.004, True), (0.016, False)):
        figure = figure_rows([[in_fog(replace(HALTING, full_accuracy=0.8 + lost, lost=lost))]])[-1][-1]
        assert ("right at full depth" in [s.name for s in figure.legend]) != coincide
        assert ("halting costs at most 1 point" in figure.caption) == coincide


def test_charts_beside_each_other_have_one_axis_and_no_color_twice() -> None:
    weak = replace(in_fog(HALTING), mean=replace(HALTING, accuracy=0.2))
    weak = replace(weak, corruptions=(replace(weak.corruptions[0], severities=(replace(HALTING, accuracy=0.2),) * 5),))
    hurt, noticed = figure_rows([[weak]])[0]
    grids = [re.findall(r'class="grid"[^>]* y1="([^"]+)"', figure.chart) for figure in (hurt, noticed)]
    assert grids[0] == grids[1]
    kinds = {s.color for s in hurt.legend if s.name != "all corruptions"}
    assert not kinds & {s.color for s in noticed.legend}


def test_only_marks_that_occur_are_explained() -> None:
    clean = in_fog(HALTING)
    broken = replace(clean, corruptions=(replace(clean.corruptions[0], budget=BROKEN),))
    assert "✗" not in " ".join(reading([clean]))
    assert "✗: more than the budget" in " ".join(reading([broken]))
    assert "?" not in " ".join(reading([broken]))


def test_artifacts_that_are_alike_are_shown_once() -> None:
    never, halting = in_fog(NEVER, "a · no halting"), in_fog(replace(HALTING, accuracy=0.795), "a · halting at 0.9")
    other = in_fog(replace(HALTING, accuracy=0.7), "b")
    groups = alike([never, halting, other])
    assert groups == [[never, halting], [other]]
    assert most_told(groups[0]) is halting
    assert names(groups[0]) == "a · no halting, halting at 0.9"
    assert same_within(groups[0]) == (
        "The charts are of a · no halting; those of a · halting at 0.9 are the same within 1 point."
    )
    assert same_within(groups[1]) == ""
    warnings = [text for text, warns in sentences(groups[0]) if warns]
    assert len(warnings) == 1
    assert "halt_prob of a · no halting and a · halting at 0.9 is too sure" in warnings[0]


def test_an_artifacts_charts_of_corruptions_are_a_row() -> None:
    shares = (0.9, 0.8, 0.7, 0.6)
    kinds = (HALTING, PLAIN, HALTING, PLAIN)
    found = [in_fog(replace(k, accuracy=s), f"{n}.onnx") for k, s, n in zip(kinds, shares, "abcd", strict=True)]
    groups = alike(found)
    assert [[figure.title for figure in row] for row in figure_rows(groups)] == [
        ["b.onnx: which corruptions hurt", "d.onnx: which corruptions hurt"],
        ["a.onnx: which corruptions hurt", "a.onnx: does halt_prob notice?"],
        ["c.onnx: which corruptions hurt", "c.onnx: does halt_prob notice?"],
    ]
    shown = overview(groups, {})
    assert shown is not None
    assert [series.name for series in shown.legend] == ["a.onnx", "b.onnx", "c.onnx", "d.onnx"]
    assert overview(groups[:1], {}) is None
