"""Choosing a halting threshold: the sweep, the choice, what is written, and calibration figures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from small_models import with_props

import vitrm.runtime
from vitrm.errors import UserError
from vitrm.runtime.bench import cli
from vitrm.runtime.bench.images import Sample, load_sample
from vitrm.runtime.bench.run import bench
from vitrm.runtime.halting import choose as halting
from vitrm.runtime.halting.choose import Trajectory, at_threshold, choose, reliability, run_every_step
from vitrm.runtime.halting.store_threshold import store_threshold

pytestmark = pytest.mark.slow

DEPTH = 4
# Of the images a choice reads the name alone.
DIGITS = Sample(
    pixels=np.zeros((1, 3, 1, 1), np.uint8),
    labels=None,
    index=np.zeros(1, np.int64),
    classes=(),
    name="digits",
    split="validation",
    total=1,
)


@pytest.fixture(scope="module")
def validation(loop):
    return load_sample(vitrm.runtime.open(loop).metadata, "loop", split="validation")


@pytest.fixture(scope="module")
def trajectory(stepwise, validation) -> Trajectory:
    return run_every_step(vitrm.runtime.open(stepwise), validation, DEPTH)


@pytest.fixture
def copies(loop, stepwise, tmp_path) -> dict[str, Path]:
    """Artifacts that a test may change."""
    shutil.copy(loop, tmp_path / "loop.onnx")
    shutil.copytree(stepwise, tmp_path / "stepwise")
    return {"loop": tmp_path / "loop.onnx", "stepwise": tmp_path / "stepwise"}


def test_a_sweep_predicts_what_the_artifact_does(loop, stepwise, validation, trajectory):
    again = run_every_step(vitrm.runtime.open(loop), validation, DEPTH)
    np.testing.assert_array_equal(again.right, trajectory.right)
    np.testing.assert_allclose(again.halt_prob, trajectory.halt_prob, atol=1e-5)
    for quantile in (0.2, 0.6, 0.95):
        threshold = float(np.quantile(trajectory.halt_prob, quantile))
        point = at_threshold(trajectory, threshold)
        result = vitrm.runtime.open(stepwise).infer(
            validation.pixels.astype(np.float32) / np.float32(255), steps=DEPTH, halt_threshold=threshold
        )
        assert point.mean_steps == pytest.approx(result.steps_used.mean(), abs=0.02)
        assert point.accuracy == pytest.approx((result.logits.argmax(1) == validation.labels).mean(), abs=0.008)
    assert at_threshold(trajectory, 1.0).mean_steps == DEPTH
    assert at_threshold(trajectory, -1.0).mean_steps == 1


def repeated(right: list[list[int]], sure: list[list[float]], times: int) -> Trajectory:
    """The answers to a few images, `times` over."""
    return Trajectory(np.tile(np.array(right, bool), times), np.tile(np.array(sure, np.float32), times))


def test_the_cheapest_within_the_budget_is_chosen():
    # Four images, three steps: the first two are right and sure at once, the third needs three steps and says so, the last is never right.
    right = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    sure = [[0.9, 0.8, 0.6, 0.1], [0.9, 0.9, 0.4, 0.1], [0.9, 0.9, 0.9, 0.1]]
    trajectory = repeated(right, sure, 50)
    choice = choose("a", DIGITS, trajectory, 0.02)
    assert choice.images == 200
    assert choice.full.accuracy == choice.chosen.accuracy == 0.75
    assert choice.chosen.mean_steps == (1 + 1 + 3 + 3) / 4
    assert 0.6 <= choice.chosen.threshold < 0.8
    assert (choice.chosen.lost, choice.chosen.gained) == (0, 0)
    assert 0.014 < choice.drop_bound < 0.016, "nothing lost on 200 images is no promise of nothing lost"
    assert (at_threshold(trajectory, 0.0).lost, at_threshold(trajectory, 0.0).gained) == (50, 0)
    assert choose("a", DIGITS, trajectory, 0.25).chosen.mean_steps == 2, "an estimate at the limit is not enough"
    generous = choose("a", DIGITS, trajectory, 0.31).chosen
    assert (generous.accuracy, generous.mean_steps, generous.threshold) == (0.5, 1.0, 0.09), (
        "all at once, with the highest threshold for that"
    )
    assert choice.by_depth == (0.5, 0.5, 0.75)
    # A head that is sure of wrong answers leaves nothing to choose but never to halt.
    never = choose("a", DIGITS, repeated([[0, 0], [1, 1]], [[0.9999, 0.9999]] * 2, 100), 0.02)
    assert (never.chosen.threshold, never.drop_bound) == (1.0, 0.0)


def test_a_threshold_behind_one_that_fails_is_not_chosen():
    # Halting at 0.7 loses a tenth, halting at 0.5 wins it back with other images: by luck or not, nobody asked in that order.
    right = [[1] * 8 + [0, 1], [1] * 8 + [1, 0]]
    sure = [[0.1] * 8 + [0.8, 0.6], [0.1] * 10]
    trajectory = repeated(right, sure, 100)
    assert at_threshold(trajectory, 0.5).lost == at_threshold(trajectory, 0.5).gained == 100
    choice = choose("a", DIGITS, trajectory, 0.05)
    assert choice.chosen.threshold >= 0.8


@pytest.mark.parametrize(("images", "budget"), [(24, 0.15), (44, 0.1), (143, 0.05), (1000, 0.005)])
def test_the_promise_holds_in_2000_draws(images, budget):
    """Every threshold of 0.5 and below exceeds the budget, by next to nothing; there are ten of them to be lucky with."""
    rng = np.random.default_rng((images, 18))
    thresholds = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9]
    broken = halts = 0
    for _ in range(2000):
        sure, coin = rng.random(images).astype(np.float32), rng.random(images)
        # Of those above 0.5 enough are lost to make 1.02 budgets; of the others 4 % are lost and 4 % gained.
        lost = coin < np.where(sure > 0.5, 2 * 1.02 * budget, 0.04)
        gained = (sure <= 0.5) & (coin > 0.96)
        right = np.stack([~lost, ~gained])
        choice = choose("a", DIGITS, Trajectory(right, np.stack([sure, sure])), budget, thresholds)
        broken += choice.chosen.threshold <= 0.5
        halts += choice.chosen.threshold < 1
    assert broken <= 0.05 * 2000
    assert halts > 0.2 * 2000, "and it does choose"


def test_a_set_too_small_for_the_budget_is_refused_with_the_number_it_takes():
    nothing_lost = repeated([[1], [1]], [[0.9], [0.9]], 44)
    message = (
        "44 validation images of digits are too few .* at most 0.3 points .* takes 998 of them, even if not one answer changes; "
        "on 44 --max-drop 6.6 is the least that can be shown"
    )
    with pytest.raises(UserError, match=message):
        choose("a", DIGITS, nothing_lost, 0.003)
    assert choose("a", DIGITS, nothing_lost, 0.066).chosen.mean_steps == 1
    with pytest.raises(
        UserError, match=r"4 validation images .* even if not one answer changes; on 4 --max-drop 52\.8 is"
    ):
        choose("a", DIGITS, repeated([[1], [1]], [[0.9], [0.9]], 4), 0.1)
    with pytest.raises(UserError, match="0 points cannot be shown on any number of images"):
        choose("a", DIGITS, nothing_lost, 0.0)


def test_too_few_images_are_refused_before_they_are_run(copies, capsys, monkeypatch):
    before = {p: p.read_bytes() for p in copies["stepwise"].iterdir()}
    monkeypatch.setattr("vitrm.runtime.bench.cases.run_every_step", lambda *a, **k: pytest.fail("ran"))
    assert cli.main([str(copies["stepwise"]), "--halting", "--no-eager"]) == 2
    assert "143 validation images of digits are too few" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in copies["stepwise"].iterdir()} == before
    assert cli.main([str(copies["stepwise"]), "--halting", "--max-drop", "0", "--no-eager"]) == 2
    assert "above 0" in capsys.readouterr().err


def test_calibration_error_by_hand():
    stated = np.array([0.05, 0.05, 0.95, 0.95, 0.95, 1.0], np.float32)
    found = reliability(stated, np.array([0, 1, 1, 1, 0, 1], bool))
    assert sum(found.count) == 6
    assert (found.count[0], found.count[14]) == (2, 4)
    expected = 2 / 6 * abs(0.05 - 0.5) + 4 / 6 * abs((3 * 0.95 + 1) / 4 - 0.75)
    assert found.ece == pytest.approx(expected, abs=1e-6)
    generator = np.random.default_rng(0)
    chances = generator.random(40_000).astype(np.float32)
    assert reliability(chances, generator.random(40_000) < chances).ece < 0.01
    assert reliability(chances, generator.random(40_000) < chances / 2).ece > 0.2


@pytest.mark.parametrize("kind", ["loop", "stepwise"])
def test_the_choice_becomes_the_default(copies, kind, capsys, tmp_path):
    path = copies[kind]
    before = vitrm.runtime.open(path).metadata
    images = load_sample(before, "a").pixels.astype(np.float32) / np.float32(255)
    out = tmp_path / "out.json"
    arguments = ["--halting", "--max-drop", "5", "--seconds", "0.05", "--batch", "1", "--threads", "1", "--no-eager"]
    assert cli.main([str(path), *arguments, "--json", str(out), "--report", str(tmp_path / "out.html")]) == 0
    assert "halting:" in capsys.readouterr().out
    found = json.loads(out.read_text())
    (choice,) = found["halting"]
    threshold = choice["chosen"]["threshold"]
    assert 0 < threshold < 1
    assert choice["chosen"]["accuracy"] >= choice["full"]["accuracy"] - 0.05
    never, halts = found["rows"]
    assert (never["halt_threshold"], halts["halt_threshold"]) == (1.0, threshold)
    assert never["mean_steps_used"] > halts["mean_steps_used"]
    assert halts["halt_ece"] is not None
    # The runtime takes it from now on, and the graph is what it was.
    session = vitrm.runtime.open(path)
    assert session.metadata.halt_threshold == threshold
    assert session.metadata.halting["split"] == "validation"
    assert session.metadata.weights_sha256 == before.weights_sha256
    assert session.infer(images).steps_used.mean() == pytest.approx(halts["mean_steps_used"], abs=0.01)
    page = (tmp_path / "out.html").read_text()
    assert "is halt_prob true?" in page
    assert f"chosen: {threshold:g}" in page
    for file in [path] if kind == "loop" else path.iterdir():
        onnx.checker.check_model(str(file))


def test_only_what_can_take_a_threshold_gets_one(artifact, copies, tmp_path):
    with pytest.raises(UserError, match=r"no loop or stepwise artifact to choose a threshold for"):
        bench([artifact], max_drop=0.05, eager=False)
    with pytest.raises(UserError, match=r"name no thresholds and at most one depth"):
        bench([copies["loop"]], max_drop=0.003, halt_thresholds=(0.5,))
    sample = load_sample(vitrm.runtime.open(artifact).metadata, "a", split="validation")
    with pytest.raises(UserError, match=r"depth and threshold built in: .*--graph stepwise"):
        run_every_step(vitrm.runtime.open(artifact), sample, 3)


def test_a_failed_write_leaves_the_artifact_as_it_was(copies, monkeypatch):
    from vitrm.runtime.halting import store_threshold as stored_threshold

    files = {p: p.read_bytes() for p in copies["stepwise"].iterdir()}
    rewrite = stored_threshold._rewrite

    def fail_at_the_last(source, *rest):
        if source.name == "heads.onnx":
            raise OSError(28, "No space left on device")
        return rewrite(source, *rest)

    monkeypatch.setattr(stored_threshold, "_rewrite", fail_at_the_last)
    with pytest.raises(UserError, match="no space left"):
        stored_threshold.store_threshold(copies["stepwise"], 0.5, 3, {})
    assert {p: p.read_bytes() for p in copies["stepwise"].iterdir()} == files
    assert {p.name for p in copies["stepwise"].parent.iterdir()} == {"loop.onnx", "stepwise"}


def test_other_files_in_the_folder_stay_and_depth_goes_with_the_threshold(copies):
    (copies["stepwise"] / "labels").mkdir()
    (copies["stepwise"] / "labels" / "names.txt").write_text("zero one two")
    for path in copies.values():
        store_threshold(path, 0.5, 2, {})
        metadata = vitrm.runtime.open(path).metadata
        assert (metadata.halt_threshold, metadata.steps) == (0.5, 2)
    assert (copies["stepwise"] / "labels" / "names.txt").read_text() == "zero one two"


def test_one_artifact_that_cannot_be_tuned_is_a_row_and_the_rest_goes_on(copies, tmp_path):
    elsewhere = with_props(copies["loop"], tmp_path / "cifar.onnx", data='{"name": "cifar10"}')
    result = bench(
        [elsewhere, copies["loop"]],
        max_drop=0.05,
        eager=False,
        data_dir=tmp_path,
        batches=(1,),
        seconds=0.05,
        threads=1,
    )
    assert [r.status == "ok" for r in result.rows] == [True, True, False]
    assert "labelled images" in result.failed[0].status
    assert [c.name for c in result.halting] == ["loop.onnx"]
    assert vitrm.runtime.open(elsewhere).metadata.halting == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-drop", "1"], "add --halting"),
        (["--halting", "--steps", "1,2"], "at most one of --steps"),
        (["--halting", "--halt-threshold", "0.5"], "leave out --halt-threshold"),
    ],
)
def test_contradicting_flags_are_named(loop, capsys, arguments, message):
    assert cli.main([str(loop), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_thresholds_are_those_of_the_graph():
    assert all(0 < t < 1 for t in halting.THRESHOLDS)
    assert list(halting.THRESHOLDS) == sorted(set(halting.THRESHOLDS))
