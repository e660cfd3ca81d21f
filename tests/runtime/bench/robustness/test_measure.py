"""A bench on corrupted images: its figures against a direct computation, what it says of budgets, and its outputs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from html_page import Page
from small_models import clear_threshold

import vitrm.runtime
from vitrm import checkpoint as checkpoints
from vitrm.export import export
from vitrm.preprocessing import Preprocessing
from vitrm.runtime.bench import cli
from vitrm.runtime.bench.accuracy import predict
from vitrm.runtime.bench.cases import Case
from vitrm.runtime.bench.images import load_sample
from vitrm.runtime.bench.report.corruptions import alike
from vitrm.runtime.bench.report.page import render
from vitrm.runtime.bench.robustness.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from vitrm.runtime.bench.robustness.measure import BROKEN, KEPT, UNCLEAR, measure_corruptions
from vitrm.runtime.bench.robustness.table import plain_corruptions, sentences
from vitrm.runtime.bench.rows import BenchResult
from vitrm.runtime.bench.run import bench
from vitrm.runtime.halting.choose import reliability

pytestmark = pytest.mark.slow

IMAGES = 24
QUICK = {"seconds": 0.05, "threads": 1, "batches": (1,), "eager": False}


@pytest.fixture(scope="module")
def threshold(stepwise: Path) -> float:
    session = vitrm.runtime.open(stepwise)
    images = load_sample(session.metadata, "a", limit=IMAGES).pixels / np.float32(255)
    return clear_threshold(session.infer(images, steps=1).halt_prob)


@pytest.fixture(scope="module")
def result(stepwise: Path, halting: Path, vit: Path, threshold: float) -> BenchResult:
    return bench([stepwise, halting, vit], halt_thresholds=(threshold, 1.0), corruption_images=IMAGES, **QUICK)


def test_figures_are_those_of_the_artifact_on_these_images(result: BenchResult, loop: Path, threshold: float) -> None:
    session = vitrm.runtime.open(loop)
    sample = load_sample(session.metadata, "a")
    chosen = np.sort(sample.order()[:IMAGES])
    by_name = {one.name: one for one in result.corruptions}
    halts, never = by_name[f"stepwise · halting at {threshold:g}"], by_name["stepwise · no halting"]
    assert (halts.images, halts.total, halts.data) == (IMAGES, 359, "digits")
    for number in (0, 3, 12):
        lost = []
        for severity in SEVERITIES:
            pixels = corrupt(sample.pixels[chosen], CORRUPTIONS[number], severity, positions=chosen)
            images = pixels.astype(np.float32) / np.float32(255)
            own = session.infer(images, steps=4, halt_threshold=threshold)
            full = session.infer(images, steps=4, halt_threshold=2.0)
            right = own.logits.argmax(1) == sample.labels[chosen]
            right_at_last = full.logits.argmax(1) == sample.labels[chosen]
            lost.append(right_at_last.astype(float) - right)
            found = halts.corruptions[number].severities[severity - 1]
            # Another graph: an answer in the balance may differ.
            assert found.accuracy == pytest.approx(right.mean(), abs=1.01 / IMAGES)
            assert found.full_accuracy == pytest.approx(right_at_last.mean(), abs=1.01 / IMAGES)
            assert found.lost == pytest.approx(found.full_accuracy - found.accuracy)
            assert found.mean_steps_used == pytest.approx(own.steps_used.mean(), abs=0.1)
            assert found.mean_halt_prob == pytest.approx(own.halt_prob.mean(), abs=0.01)
            assert found.halt_ece == pytest.approx(reliability(own.halt_prob, right).ece, abs=0.03)
            unhalted = never.corruptions[number].severities[severity - 1]
            assert unhalted.accuracy == found.full_accuracy
            assert (unhalted.mean_steps_used, unhalted.lost, unhalted.full_accuracy) == (4, None, None)
        mean = halts.corruptions[number].mean
        assert mean.lost == pytest.approx(np.mean(lost), abs=2.01 / IMAGES)
        assert halts.corruptions[number].lost_error == pytest.approx(
            np.mean(lost, 0).std() / np.sqrt(IMAGES), abs=0.5 / IMAGES
        )
    assert halts.mean.accuracy == pytest.approx(np.mean([f.accuracy for c in halts.corruptions for f in c.severities]))
    assert 1 < halts.clean.mean_steps_used < 4
    assert any(f.lost for c in halts.corruptions for f in c.severities), "halting changes something"


def test_each_kind_of_artifact_has_the_figures_it_can_have(result: BenchResult) -> None:
    by_name = {one.name: one for one in result.corruptions}
    built_in, baseline = by_name["halting.onnx"], by_name["vit.onnx"]
    assert len(by_name) == 4
    assert built_in.clean.mean_steps_used is not None
    assert built_in.clean.halt_ece is not None
    assert built_in.clean.full_accuracy is None
    assert built_in.budget is None
    assert built_in.corruptions[0].budget is None
    assert any("its threshold is built in" in text for text, _ in sentences([built_in]))
    assert baseline.clean.halt_ece is None
    assert baseline.steps is None
    assert sentences([baseline]) == []
    # The clean figures are those of the rows, on fewer images.
    row = next(r for r in result.rows if r.name == "halting.onnx")
    assert built_in.clean.accuracy == pytest.approx(row.accuracy, abs=0.2)


def test_json_table_and_page_have_every_artifact(result: BenchResult, threshold: float) -> None:
    read = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert len(read["corruptions"]) == 4
    one = read["corruptions"][0]
    assert {"name", "data", "images", "total", "seed", "steps", "halt_threshold", "budget", "budget_from"} <= set(one)
    assert [c["name"] for c in one["corruptions"]] == [c.name for c in CORRUPTIONS]
    for condition in [one["clean"], one["mean"], *one["corruptions"][4]["severities"], one["corruptions"][4]["mean"]]:
        assert set(condition) == {
            "accuracy", "full_accuracy", "lost", "mean_steps_used", "mean_halt_prob", "halt_ece"
        }  # fmt: skip
        assert all(v is not None for v in condition.values())
    assert len(one["corruptions"][0]["severities"]) == 5
    assert one["corruptions"][0]["budget"] in (KEPT, UNCLEAR, BROKEN)
    text = plain_corruptions(result.corruptions)
    page = render(result)
    for said in (
        "none (clean)",
        "JPEG compression",
        "mean",
        f"halting at {threshold:g}, at most 4 steps",
        f"{IMAGES} of the 359 test images",
    ):
        assert said in text
        assert said in page
    assert text.count("gaussian noise") >= 4
    assert not re.search(r"\d\.\d+ %", plain_corruptions(result.corruptions)), "one of 24 images is 4 %"
    part = page[page.index("<h2>Corruptions</h2>") :]
    assert part.index("13 corruptions at 5 severities") < part.index("alting of"), "what it is, then what follows"
    assert ">severity 5</th>" in part
    assert part.count('alt="a test image, ') == 1 + len(CORRUPTIONS)
    labels = [label for label in Page(page).labels if "by severity" in label]
    groups = alike(result.corruptions)
    heads = sum(group[0].clean.mean_halt_prob is not None for group in groups)
    assert len(groups) >= 2
    assert len(labels) == 1 + len(groups) + heads, "one for all, one for each that differs, one for each halting head"
    assert all("at 5" in label for label in labels)


@pytest.fixture(scope="module")
def nano(folder: Path) -> Path:
    return export(checkpoints.load("nano-digits"), folder / "nano-digits.onnx", steps=1).path


def test_a_trained_model_gets_worse_with_severity(nano: Path) -> None:
    session = vitrm.runtime.open(nano, threads=1)
    sample = load_sample(session.metadata, "a")
    case = Case("a", "a", "artifact", session, "g", predictions=predict(session, sample.pixels[:1]))
    chosen = [c for c in CORRUPTIONS if c.name in ("impulse_noise", "fog", "contrast")]
    (found,) = measure_corruptions([case], {"g": sample}, {}, 60, [], lambda *_: None, chosen)
    assert found.clean.accuracy > 0.95
    accuracies = [found.at(severity).accuracy for severity in (0, *SEVERITIES)]
    assert all(later <= earlier + 0.03 for earlier, later in pairwise(accuracies)), accuracies
    assert accuracies[-1] < accuracies[0] - 0.2
    assert found.at(5).halt_ece > found.clean.halt_ece + 0.1, "its halting head does not notice"


class Scripted:
    """A session that is right at full depth, and wrong on the first `lost` images once it may halt."""

    takes_depth, name, path, prefers_one_batch = True, "scripted", Path("scripted"), False

    def __init__(self, metadata, labels, lost: int) -> None:
        self.metadata, self.labels, self.lost = metadata, labels, lost

    def infer(self, images, *, steps=None, halt_threshold=None):
        count = len(images)
        answers = self.labels[:count].copy()
        if halt_threshold < 1:
            answers[: self.lost] = (answers[: self.lost] + 1) % 10
        logits = np.eye(10, dtype=np.float32)[answers]
        return vitrm.runtime.session.Result(logits, np.full(count, 0.9, np.float32), np.full(count, 2))


@pytest.mark.parametrize(
    ("lost", "verdict", "says"),
    [
        (
            0,
            KEPT,
            "gave up no more than its budget of 1 points (stored in it) on these 80 images under any of 1 corruption,",
        ),
        # One of 80: 1.25 points and a standard error of 1.24.
        (1, UNCLEAR, "did not clearly give up more than its budget of 1 points"),
        (
            20,
            BROKEN,
            "gave up more than its budget of 1 points (stored in it) on these 80 images under 1 of 1 corruption, and not by chance "
            "(95 % confidence each): fog (25.00 ± 4.84 points lost,",
        ),
    ],
)
def test_a_broken_budget_is_said(loop: Path, lost: int, verdict: str, says: str) -> None:
    own = vitrm.runtime.open(loop).metadata
    sample = load_sample(own, "a", limit=80)
    session = Scripted(replace(own, halt_threshold=0.5, halting={"max_drop": 0.01}), sample.labels, lost)
    case = Case("a", "a.onnx", "artifact", session, "g", predictions=object())
    fog = next(c for c in CORRUPTIONS if c.name == "fog")
    (found,) = measure_corruptions([case], {"g": sample}, {}, 80, [], lambda *_: None, [fog])
    assert found.corruptions[0].budget == verdict
    assert found.mean.lost == pytest.approx(lost / 80)
    text, warns = sentences([found])[0]
    assert says in text
    assert warns == (verdict == BROKEN)
    trust, warns = sentences([found])[1]
    too_sure = (
        "on corrupted images halt_prob of a.onnx is too sure: it expects 90 % to be right, and 75 % are; most under fog"
    )
    assert (too_sure in trust) == warns == (lost == 20)


def test_without_corruptions_nothing_is_said_of_them() -> None:
    assert plain_corruptions([]) == ""


def test_images_without_labels_and_artifacts_that_fail_are_said(loop: Path) -> None:
    session = vitrm.runtime.open(loop)
    sample = load_sample(session.metadata, "a", limit=10)
    good = Case("a", "a.onnx", "artifact", session, "g", predictions=object())
    bare = Case("b", "b.onnx", "artifact", session, "h", predictions=object())
    broken = Case("c", "c.onnx", "artifact", Broken(), "g", predictions=object())
    notes: list[str] = []
    seen: list[float] = []
    found = measure_corruptions(
        [good, bare, broken],
        {"g": sample, "h": replace(sample, labels=None)},
        {},
        1000,
        notes,
        lambda stage, fraction: seen.append(fraction),
        CORRUPTIONS[:1],
    )
    assert [one.name for one in found] == ["a.onnx"]
    assert found[0].images == 10
    assert notes == [
        "not measured under corruptions, which needs labelled images: b.onnx",
        "c.onnx was not measured under corruptions: no more memory",
    ]
    assert seen == sorted(seen)
    assert seen[-1] == 1


class Broken(Scripted):
    def __init__(self) -> None:
        self.metadata = vitrm.runtime.session.Metadata(
            model={},
            classes=[],
            data={},
            preprocessing=Preprocessing.square(32),
            graph="loop",
            steps=2,
            halt_threshold=2.0,
            precision="fp32",
            weights_sha256="",
            run="",
        )

    def infer(self, images, **_):
        raise MemoryError("no more memory")


def test_the_command_prints_and_writes(loop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    quick = ["--seconds", "0.05", "--threads", "1", "--batch", "1", "--no-eager"]
    arguments = ["--halt-threshold", "0.5", "--corruptions", "--corruption-images", "8", "--json", str(out)]
    assert cli.main([str(loop), *quick, *arguments]) == 0
    printed = capsys.readouterr().out
    assert "Corruptions: loop.onnx, at most 4 steps, halting above 0.5" in printed
    assert "of 8 of the 359 test images of digits" in printed
    assert json.loads(out.read_text())["corruptions"][0]["images"] == 8
    assert cli.main([str(loop), *quick, "--corruption-images", "8"]) == 2
    assert "add --corruptions" in capsys.readouterr().err
