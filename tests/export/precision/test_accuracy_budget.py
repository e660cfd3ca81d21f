"""--max-drop: the fewest sites in floating point that keep the accuracy, judged on the artifact itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from small_models import STEPS, make_checkpoint, skip_if_float16_is_cut

import vitrm.runtime
from vitrm import checkpoint as checkpoints
from vitrm.calib.calibration import calibrate
from vitrm.calib.methods import Range
from vitrm.calib.sites import Site
from vitrm.data import load
from vitrm.errors import UserError
from vitrm.export import cli, export
from vitrm.export.precision.accuracy_budget import keep_within
from vitrm.runtime.bench.accuracy import predict

pytestmark = pytest.mark.slow

BAD = "answer", "block.1.ffn.down"
ALLOWED = 12.0  # points: more than int8 costs this model of random layers, less than the bad site does


@pytest.mark.parametrize("needed", [0, 1, 2, 3, 5, 8, 13])
def test_the_fewest_that_hold(needed):
    """Each of the first `needed` units costs a point; the search must find their number."""
    units = [((Site(1, "latents", f"block.0.{i}"),), 1.0 / (i + 1)) for i in range(13)]
    labels = np.zeros(100, np.int64)

    def answers(floats):
        left = sum(sites[0] not in floats for sites, _ in units[:needed])
        return np.r_[np.ones(left, np.int64), np.zeros(100 - left, np.int64)]

    def ranked():
        assert needed, "sites are measured only where something is lost"
        return units

    found = keep_within(0.5, labels, labels, answers, ranked)
    assert len(found.kept) == needed
    assert found.drop == 0
    assert found.first == pytest.approx(1 - needed / 100)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model that mostly answers right, so that there is something to lose."""
    folder = tmp_path_factory.mktemp("runs") / "fitted"
    checkpoints.save(folder, make_checkpoint("tiny"))
    return folder


@pytest.fixture(scope="module")
def bad_calibration(run):
    """One layer's input is clipped to next to nothing, at every step."""
    made = calibrate(checkpoints.load(run), STEPS)
    ranges = {s: Range(r.low / 300, r.high / 300) if s[1:] == BAD else r for s, r in made.ranges.items()}
    return replace(made, ranges=ranges)


@pytest.mark.parametrize(("graph", "target"), [("unrolled", "cpu"), ("loop", "tensorrt"), ("stepwise", "cpu")])
def test_the_layer_that_costs_accuracy_is_kept_and_no_other(run, bad_calibration, tmp_path, graph, target):
    skip_if_float16_is_cut(target)
    path = tmp_path / ("a" if graph == "stepwise" else "a.onnx")
    checkpoint, validation = checkpoints.load(run), load("digits", "validation")
    made = export(
        checkpoint,
        path,
        steps=STEPS,
        graph=graph,
        precision="int8",
        target=target,
        calibration=bad_calibration,
        max_drop=ALLOWED,
        # A random model comes near the limit of verification: the worst of a few images is better than that of 64.
        images=load("digits", "validation").floats(slice(0, 12)),
        sensitivity_file=tmp_path / "s.json",
    )
    budget = made.budget
    assert budget is not None
    assert budget.images == len(validation)
    assert 100 * (budget.exact - budget.first) > 20, "the clipped site must hurt"
    assert budget.drop <= ALLOWED
    everywhere = [str(Site(step, *BAD)) for step in range(1, STEPS + 1)]
    kept = made.metadata.kept_float
    # Unrolled, some steps may do.
    assert kept
    assert set(kept) <= set(everywhere) if graph == "unrolled" else kept == everywhere
    session = vitrm.runtime.open(path)
    assert session.metadata.kept_float == kept
    answers = predict(session, validation.pixels).top1
    assert (answers == validation.labels).mean() == pytest.approx(budget.final)
    # Its weight is there in floating point; of the others only int8 is.
    file = path / "step.onnx" if graph == "stepwise" else path
    stored = {i.name for i in onnx.load(file).graph.initializer if i.name.endswith(".weight.T")}
    assert stored & {f"block.{i}.ffn.{p}.weight.T" for i in range(2) for p in ("up", "down")} == {f"{BAD[1]}.weight.T"}
    assert (tmp_path / "s.png").exists()


def test_on_the_command_line(run, tmp_path, capsys):
    out = ["-o", str(tmp_path / "a.onnx")]
    assert cli.main([str(run), "--int8", "--steps", "2", "--max-drop", "3", "--estimator", "entropy", *out]) == 0
    said = capsys.readouterr().out
    assert "points, top-1 agreement" in said
    assert "(entropy)" in said
    assert cli.main([str(run), "--max-drop", "3", *out]) == 2
    assert "--max-drop is for int8" in capsys.readouterr().err
    assert cli.main([str(run), "--int8", "--max-drop", "-1", *out]) == 2
    assert "expected 0 to 100" in capsys.readouterr().err


def test_without_validation_images_nothing_is_promised(run, tmp_path):
    elsewhere = replace(checkpoints.load(run), data={"name": "cifar10"})
    with pytest.raises(UserError, match="judged on validation images"):
        export(elsewhere, tmp_path / "a.onnx", precision="int8", max_drop=1, data_dir=tmp_path)
    assert not list(tmp_path.iterdir())
