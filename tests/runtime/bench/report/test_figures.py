"""Figures of the page: their captions and whiskers say what was measured, and no more."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vitrm.runtime.bench.accuracy import wilson
from vitrm.runtime.bench.report.charts import distribution_chart, spans_decades
from vitrm.runtime.bench.report.figures import depth_figure, halting_figures, savings_figure
from vitrm.runtime.bench.rows import DepthCurve
from vitrm.runtime.halting.choose import HaltingChoice, HaltingPoint, Reliability


def point(threshold: float, accuracy: float, mean_steps: float) -> HaltingPoint:
    return HaltingPoint(
        threshold=threshold, accuracy=accuracy, mean_steps=mean_steps, halted_first=0.5, lost=1, gained=0
    )


CHOICE = HaltingChoice(
    name="a.onnx",
    data="digits",
    images=100,
    steps=6,
    budget=0.003,
    full=point(2.0, 0.9, 6.0),
    chosen=point(0.9, 0.89, 1.5),
    drop_bound=0.003,
    points=(point(0.5, 0.8, 1.1), point(0.9, 0.89, 1.5)),
    by_depth=(0.8, 0.85, 0.88, 0.89, 0.9, 0.9),
    reliability=Reliability(count=(60, 540), stated=(0.4, 0.95), true=(0.5, 0.9), ece=0.055),
)


def test_an_images_answers_count_as_one_and_the_last_bin_is_named() -> None:
    _, figure = halting_figures([CHOICE])
    assert figure.legend[0].spans == (wilson(5, 10), wilson(81, 90))
    assert "90 % of the answers lie in the last bin, above 0.50." in figure.caption
    assert "the 6 answers to an image count as one" in figure.caption


def test_thresholds_are_a_line_up_to_full_depth() -> None:
    figure, _ = halting_figures([CHOICE])
    assert figure.legend[0].points[-1] == (6.0, 0.9)
    assert 'class="spot"' in figure.chart
    assert 'class="dot"' not in figure.chart


def test_a_choice_is_two_sentences() -> None:
    figure, _ = halting_figures([CHOICE])
    assert figure.caption == (
        "Chosen: 0.9, the cheapest threshold that is sure (95 %) to keep the budget (of 100 validation images of digits, at most 0.3 "
        "points may be given up). 89.00 % are right after 1.50 steps on average, 90.00 % after 6: 1 lost, 0 gained, with 95 % confidence at most 0.30 points."
    )


def test_the_budget_is_a_line_and_why_a_cheaper_threshold_is_not_chosen_is_said() -> None:
    lucky = replace(CHOICE, points=(point(0.5, 0.899, 1.1), point(0.9, 0.89, 1.5)))
    for choice, cheaper in ((CHOICE, False), (lucky, True)):
        figure, _ = halting_figures([choice])
        assert "the budget" in figure.chart
        assert ("Cheaper ones above the dotted line" in figure.caption) == cheaper


def test_latency_has_one_kind_of_axis() -> None:
    near, far = np.array([1.0, 1.1, 1.2]), np.array([1.0, 20.0, 30.0])
    assert not spans_decades([near, near])
    assert spans_decades([near, far])
    for log in (False, True):
        chart = distribution_chart([("a", 1, near)], label="times", text=str, log=log)
        assert ("logarithmic" in chart) == log


CURVE = DepthCurve(
    run="runs/r",
    accuracy=(0.8, 0.9, 0.9),
    halt_prob=(0.8, 0.9, 0.9),
    images=300,
    points=(("a · no halting", 2.0, 0.9), ("a · halting at 0.9", 1.5, 0.9)),
    steps=2,
    halting=(point(0.9, 0.9, 1.5), point(2.0, 0.9, 2.0)),
)


def test_the_title_says_which_images_a_curve_is_of() -> None:
    part = replace(CURVE, total=10_000)
    assert savings_figure(part, {}).title == "a: what a threshold buys, on 300 of the 10,000 test images"
    assert depth_figure(part, {}).title == "a, on 300 of the 10,000 test images"
    assert depth_figure(replace(CURVE, total=300), {}).title == "a, on 300 test images"
    assert depth_figure(replace(CURVE, points=()), {}).title == "r, on 300 test images"


def test_the_trained_depth_is_marked() -> None:
    assert "trained to 2" in depth_figure(replace(CURVE, trained_depth=2), {}).chart
    assert "trained to" not in depth_figure(replace(CURVE, trained_depth=7), {}).chart, "deeper than the chart"
