"""Figures of the page: their captions and whiskers say what was measured, and no more."""

from __future__ import annotations

from vitrm.runtime.bench.accuracy import wilson
from vitrm.runtime.bench.report.figures import corruption_figures, corruption_overview, halting_figures, savings_figure
from vitrm.runtime.bench.robustness.corruptions import SEVERITIES
from vitrm.runtime.bench.robustness.measure import Figures, Robustness, UnderCorruption
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


def test_other_images_than_those_above_are_said() -> None:
    curve = DepthCurve(
        run="r",
        accuracy=(0.8, 0.9),
        halt_prob=(0.8, 0.9),
        images=300,
        points=(("a.onnx", 1.5, 0.9),),
        steps=2,
        halting=(point(0.9, 0.9, 1.5), point(2.0, 0.9, 2.0)),
    )
    said = "on 300 test images (the figures above: 10,000); a ring"
    assert said in savings_figure(curve, {}, {"a.onnx": 10_000, "b.onnx": 5}).caption
    assert "on 300 test images; a ring" in savings_figure(curve, {}, {"a.onnx": 300}).caption


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


def test_lines_that_coincide_are_said() -> None:
    for lost, coincide in ((0.004, True), (0.006, False)):
        found = in_fog(
            Figures(accuracy=0.8, full_accuracy=0.8 + lost, lost=lost, mean_steps_used=2.0, mean_halt_prob=0.9)
        )
        figure = corruption_figures([found], {})[-1][-1]
        assert figure.legend[0].name == "right at full depth"
        assert figure.legend[0].dashed
        assert ("coincide" in figure.caption) == coincide


def test_an_artifacts_charts_of_corruptions_are_a_row() -> None:
    halting = Figures(accuracy=0.8, full_accuracy=0.8, lost=0.0, mean_steps_used=2.0, mean_halt_prob=0.9)
    plain = Figures(accuracy=0.8)
    found = [in_fog(halting, "a.onnx"), in_fog(plain, "b.onnx"), in_fog(halting, "c.onnx"), in_fog(plain, "d.onnx")]
    titles = [[figure.title for figure in row] for row in corruption_figures(found, {})]
    assert titles == [
        ["b.onnx", "d.onnx"],
        ["a.onnx", "a.onnx: does halt_prob notice?"],
        ["c.onnx", "c.onnx: does halt_prob notice?"],
    ]
    overview = corruption_overview(found, {})
    assert overview is not None
    assert [series.name for series in overview.legend] == ["a.onnx", "b.onnx", "c.onnx", "d.onnx"]
    assert corruption_overview(found[:1], {}) is None
