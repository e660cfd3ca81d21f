"""The bench as a library: rows, references, data, and what happens when something is missing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_models import STEPS, clear_threshold, make_checkpoint, with_props

from vitrm import checkpoint as checkpoints
from vitrm import data
from vitrm.errors import UserError
from vitrm.runtime.backends.eager import EagerSession
from vitrm.runtime.backends.onnxruntime.session import OnnxRuntimeSession
from vitrm.runtime.bench import depths
from vitrm.runtime.bench.accuracy import in_top5
from vitrm.runtime.bench.images import load_sample
from vitrm.runtime.bench.reference import find_reference
from vitrm.runtime.bench.rows import BenchResult, BenchRow
from vitrm.runtime.bench.run import bench
from vitrm.runtime.session import open_session

pytestmark = pytest.mark.slow

QUICK = {"seconds": 0.05, "threads": 1}


@pytest.fixture(scope="module")
def result(artifact: Path, rough: Path) -> BenchResult:
    return bench([artifact, rough], batches=(1, 4), depths=True, **QUICK)


def row(result: BenchResult, name: str, batch: int = 1) -> BenchRow:
    return next(r for r in result.rows if r.name == name and r.batch == batch)


def test_rows_are_eager_then_artifacts_at_each_batch(result: BenchResult) -> None:
    found = [(r.kind, r.name, r.batch) for r in result.rows]
    names = [("eager", "eager PyTorch"), ("artifact", "tiny.onnx"), ("artifact", "rough.onnx")]
    assert found == [(kind, name, batch) for batch in (1, 4) for kind, name in names]
    assert all(r.ok for r in result.rows)
    assert result.failed == ()


def test_an_exact_artifact_agrees(result: BenchResult, artifact: Path, run: Path) -> None:
    exact = row(result, "tiny.onnx")
    assert exact.agreement == 1
    assert exact.flips is not None
    assert (exact.flips.gained, exact.flips.lost) == (0, 0)
    assert exact.halt_agreement == 1
    assert exact.max_logit_difference is not None
    assert 0 < exact.max_logit_difference < 2e-3
    assert exact.accuracy == row(result, "eager PyTorch").accuracy
    assert exact.mean_steps_used == STEPS
    assert (exact.steps, exact.graph, exact.precision) == (STEPS, "unrolled", "fp32")
    assert exact.bytes == artifact.stat().st_size
    assert exact.weights_sha256 == checkpoints.load(str(run)).weights_id


def test_a_rough_artifact_does_not_and_the_counts_add_up(result: BenchResult) -> None:
    rough, eager = row(result, "rough.onnx"), row(result, "eager PyTorch")
    assert rough.agreement is not None
    assert rough.accuracy is not None
    assert eager.accuracy is not None
    assert rough.flips is not None
    assert rough.images is not None
    assert 0.5 < rough.agreement < 1
    assert rough.images == eager.images == len(data.load("digits", "test"))
    gain = (rough.accuracy - eager.accuracy) * rough.images
    assert round(gain) == rough.flips.gained - rough.flips.lost
    assert rough.flips.gained + rough.flips.lost <= round((1 - rough.agreement) * rough.images)
    assert rough.accuracy_interval is not None
    assert rough.accuracy_interval[0] < rough.accuracy < rough.accuracy_interval[1]


def test_accuracy_is_that_of_the_model(result: BenchResult, run: Path) -> None:
    import torch

    test = data.load("digits", "test")
    with torch.inference_mode():
        answers = checkpoints.load(str(run)).build()(torch.from_numpy(test.floats()), STEPS).logits.argmax(1).numpy()
    assert row(result, "eager PyTorch").accuracy == pytest.approx((answers == test.labels).mean())
    assert (answers == test.labels).mean() > 0.6  # the fixture is a model that knows something


def test_latency_is_measured_in_the_same_rounds(result: BenchResult) -> None:
    for r in result.rows:
        assert r.latency_ms is not None
        t = r.latency_ms
        assert 0 < t.min <= t.p50 <= t.p90 <= t.p99 <= t.max
        assert t.n >= result.rounds
        assert r.images_per_s == pytest.approx(r.batch / t.mean * 1000)
        if r.kind == "artifact":
            assert r.speedup is not None
            assert r.speedup_range is not None
            assert r.speedup_range[0] <= r.speedup <= r.speedup_range[1]
        else:
            assert r.speedup is None
    # A batch of four takes longer than one image.
    one, four = row(result, "tiny.onnx", 1).latency_ms, row(result, "tiny.onnx", 4).latency_ms
    assert one is not None
    assert four is not None
    assert four.min > one.min


def test_json_has_the_promised_keys(result: BenchResult) -> None:
    read = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert {"format", "rows", "notes", "data", "machine", "versions", "threads", "device", "warm_up", "rounds"} <= set(
        read
    )
    exact = next(r for r in read["rows"] if r["name"] == "tiny.onnx")
    assert exact["latency_ms"]["p50"] > 0
    assert exact["latency_ms"]["n"] >= 10
    assert 0 <= exact["accuracy"] <= 1
    assert exact["agreement"] == 1
    assert exact["flips"] == {"gained": 0, "lost": 0}
    assert exact["status"] == "ok"
    assert {"bytes", "device", "threads", "batch", "steps", "precision", "backend", "speedup"} <= set(exact)
    assert {"python", "vitrm", "onnxruntime", "torch"} <= set(read["versions"])
    assert read["data"] == [{"name": "digits", "split": "test", "images": 359, "total": 359, "labelled": True}]
    assert "evidence" not in read
    assert [one["name"] for one in read["by_class"]] == ["tiny.onnx", "rough.onnx"]
    (images,) = {len(r["classes"]) for r in read["by_class"]}
    assert images == len(read["by_class"][0]["confusion"]) == 10


def test_results_by_class_are_those_of_the_answers(result: BenchResult) -> None:
    assert result.evidence is not None
    (case,) = (c for c in result.evidence.cases if c.name == "rough.onnx")
    assert case.sample.labels is not None
    found = next(one.result for one in result.by_class if one.name == "rough.onnx")
    answers = case.predictions.top1
    for label in range(10):
        of_class = case.sample.labels == label
        assert found.images[label] == of_class.sum()
        assert found.recall[label] == pytest.approx((answers[of_class] == label).mean())
    assert row(result, "rough.onnx").balanced_accuracy == pytest.approx(found.recall.mean())
    assert row(result, "rough.onnx").accuracy == pytest.approx(found.accuracy)
    assert row(result, "rough.onnx").top5_accuracy is None, "of ten classes five say nothing"
    likeliest = np.sort(np.argsort(case.predictions.logits, 1)[:, -5:], 1)
    among = in_top5(case.predictions, case.sample.labels)
    assert among.tolist() == [label in five for label, five in zip(case.sample.labels, likeliest, strict=True)]


def test_depth_curve(result: BenchResult) -> None:
    assert result.evidence is not None
    (curve,) = result.evidence.depth_curves
    assert len(curve.accuracy) == 16
    assert curve.images == 359
    eager = row(result, "eager PyTorch")
    assert curve.accuracy[STEPS - 1] == pytest.approx(eager.accuracy)
    assert ("tiny.onnx", float(STEPS), pytest.approx(eager.accuracy)) in curve.points
    assert all(0 <= h <= 1 for h in curve.halt_prob)
    (halting,) = result.evidence.halting_curves
    assert halting.accuracy == curve.accuracy[:STEPS]
    assert halting.halting[-1].accuracy == pytest.approx(eager.accuracy)
    assert not curve.halting


def test_thresholds_are_told_of_more_images_than_depths_are(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a second here: in 20, two batches of 100 images can take 16 steps, and all can take 4."""
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    answer = EagerSession.trajectory

    def timed(session: EagerSession, images: Any, steps: int) -> Any:
        clock.now += steps
        return answer(session, images, steps)

    monkeypatch.setattr(EagerSession, "trajectory", timed)
    monkeypatch.setattr(depths, "time", clock)
    session = EagerSession(checkpoints.load(str(run)), steps=STEPS, threads=1)
    sample, said = load_sample(session.metadata, "tiny"), list[float]()
    deep, halting = depths.depth_curves(
        session, sample, 16, artifacts={}, steps=STEPS, seconds=20, progress=said.append
    )
    assert halting is not None
    assert (deep.images, halting.images) == (200, 359)
    assert said == sorted(said)
    assert said[-1] == 1


def test_halting_artifact_has_an_eager_row_that_halts(halting: Path) -> None:
    found = bench([halting], batches=(1,), limit=50, **QUICK)
    eager, own = found.rows
    assert own.agreement == 1
    assert own.mean_steps_used == eager.mean_steps_used
    assert own.mean_steps_used is not None
    assert 1 < own.mean_steps_used < 4
    assert own.images == 50
    assert found.data[0]["total"] == 359


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loop", "stepwise"])
def test_one_file_is_measured_at_several_depths_and_thresholds(
    request: pytest.FixtureRequest, artifact: Path, kind: str
) -> None:
    path = request.getfixturevalue(kind)
    session = open_session(path, threads=1)
    images = data.load("digits", "test").floats()
    early = clear_threshold([session.infer(images, steps=steps).halt_prob for steps in range(1, 6)])
    result = bench([path, artifact], steps=(1, 3, 5), halt_thresholds=(early, 1.0), batches=(1,), **QUICK)
    rows = [r for r in result.rows if r.kind == "artifact" and r.graph == kind]
    assert [(r.steps, r.halt_threshold) for r in rows] == [(1, 1.0), (3, early), (3, 1.0), (5, early), (5, 1.0)]
    assert len({r.name for r in rows}) == 5
    eager = {(r.steps, r.halt_threshold): r for r in result.rows if r.kind == "eager"}
    for r in rows:
        assert r.agreement == r.steps_used_agreement == 1
        assert r.max_logit_difference is not None
        assert r.max_logit_difference < 2e-3
        assert r.mean_steps_used == pytest.approx(eager[r.steps, r.halt_threshold].mean_steps_used)
    deepest = rows[-2]
    assert deepest.mean_steps_used is not None
    assert 1 < deepest.mean_steps_used < 5, "no sample halts early, so nothing is shown"
    assert any("has its 3 steps built in" in note for note in result.notes)
    assert row(result, "tiny.onnx").steps == STEPS


def test_other_depths_of_one_run_have_their_own_eager_rows(artifact: Path, halting: Path) -> None:
    found = bench([artifact, halting], batches=(1,), limit=20, **QUICK)
    assert [r.name for r in found.rows] == [
        "eager PyTorch · 3 steps · no halting",
        "tiny.onnx",
        "eager PyTorch · 4 steps · halting at 0.9",
        "halting.onnx",
    ]
    assert [r.agreement for r in found.rows] == [None, 1, None, 1]


def test_models_of_two_kinds_each_have_their_own_reference(artifact: Path, vit: Path) -> None:
    found = bench([artifact, vit], batches=(2,), limit=20, **QUICK)
    assert [r.name for r in found.rows] == ["eager PyTorch · run", "tiny.onnx", "eager PyTorch · vit-run", "vit.onnx"]
    assert [r.agreement for r in found.rows] == [None, 1, None, 1]
    assert [r.steps for r in found.rows] == [STEPS, STEPS, None, None]


def test_a_failed_artifact_is_a_row_and_the_rest_goes_on(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.onnx").write_bytes(artifact.read_bytes()[:1000])
    found = bench([tmp_path / "cut.onnx", artifact], batches=(1, 2), limit=10, **QUICK)
    assert [r.name for r in found.failed] == ["cut.onnx"]
    assert "truncated" in row(found, "cut.onnx").status
    assert row(found, "cut.onnx", 2).status == row(found, "cut.onnx").status
    assert row(found, "tiny.onnx").ok
    assert row(found, "tiny.onnx").latency_ms is not None


def test_what_fails_once_it_is_open_is_a_row(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: object, images: np.ndarray, runs: int) -> None:
        raise RuntimeError("CUDA error: the launch timed out")  # as torch says it

    def broken(self: EagerSession, images: np.ndarray, steps: int) -> None:
        raise RuntimeError("CUDA error: the device is lost")

    monkeypatch.setattr(EagerSession, "device_times", lost)
    monkeypatch.setattr(EagerSession, "trajectory", broken)
    found = bench([artifact], batches=(1, 2), limit=10, depths=True, **QUICK)
    for batch in (1, 2):
        eager = row(found, "eager PyTorch", batch)
        assert eager.status == "RuntimeError: CUDA error: the launch timed out"
        assert eager.latency_ms is None
        own = row(found, "tiny.onnx", batch)
        assert own.ok
        assert own.latency_ms is not None
        assert own.speedup is None
    assert "no accuracy by depth of eager PyTorch: RuntimeError: CUDA error: the device is lost" in found.notes


def test_an_artifact_that_fails_otherwise_is_a_bug_on_a_cpu_and_a_row_on_a_gpu(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object, images: np.ndarray, runs: int) -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(OnnxRuntimeSession, "device_times", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        bench([artifact], batches=(1,), limit=10, **QUICK)
    monkeypatch.setattr(
        OnnxRuntimeSession, "device_kind", property(lambda self: "cuda", lambda self, kind: None), raising=False
    )
    found = bench([artifact], batches=(1,), limit=10, eager=False, power=False, **QUICK)
    assert [r.status for r in found.rows] == ["RuntimeError: an illegal memory access"]
    assert [r.name for r in found.failed] == ["tiny.onnx"]


def test_nothing_to_measure(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a.onnx does not exist.*; .*b.onnx does not exist"):
        bench([tmp_path / "a.onnx", tmp_path / "b.onnx"])
    with pytest.raises(UserError, match="no artifact"):
        bench([])


def test_a_run_is_measured_where_no_artifact_opens(run: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.onnx").write_bytes(b"cut")
    settings = {"run": str(run), "batches": (1, 2), "steps": (2, 3), "limit": 20}
    found = bench([tmp_path / "cut.onnx"], **settings, **QUICK)
    names = [f"eager PyTorch · {depth} steps" for depth in (2, 3)]
    assert [(r.name, r.batch) for r in found.rows] == [(n, b) for b in (1, 2) for n in (*names, "cut.onnx")]
    for name, depth in zip(names, (2, 3), strict=True):
        eager = row(found, name)
        assert eager.ok
        assert (eager.steps, eager.images) == (depth, 20)
        assert eager.accuracy is not None
        assert eager.latency_ms is not None
    assert [r.name for r in found.failed] == ["cut.onnx"]
    assert "cut.onnx" in row(found, "cut.onnx").status
    assert [r.name for r in bench([], **settings, **QUICK).rows] == names * 2


def test_a_baseline_is_measured_without_an_artifact(vit_run: Path) -> None:
    (eager,) = bench([], run=str(vit_run), batches=(2,), limit=10, **QUICK).rows
    assert (eager.ok, eager.steps, eager.images) == (True, None, 10)


def test_nothing_at_all_runs_on_a_gpu_that_is_missing(run: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this is about machines without a GPU")
    with pytest.raises(UserError, match=r"gone\.plan does not exist.*; device cuda was asked for"):
        bench(["gone.plan"], run=str(run), device="cuda", **QUICK)


def test_run_of_another_kind_or_other_weights_is_refused(
    artifact: Path, run: Path, vit_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"vit-run is a vit, the artifact a vitrm.*exported from run"):
        bench([artifact], run=str(vit_run), **QUICK)
    checkpoints.save(tmp_path / "retrained", make_checkpoint("tiny", seed=1))
    with pytest.raises(UserError, match=r"retrained has other weights"):
        bench([artifact], run=str(tmp_path / "retrained"), **QUICK)
    same_weights = shutil.copytree(run, tmp_path / "other-n")
    config = json.loads((same_weights / "config.json").read_text())
    config["model"]["n"] = 5
    del config["sha256"]
    (same_weights / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"other settings \(n 5, the artifact 2\)"):
        bench([artifact], run=str(same_weights), **QUICK)
    with pytest.raises(UserError, match="no run folder"):
        bench([artifact], run="nowhere", **QUICK)
    assert bench([artifact], run=str(run), batches=(1,), limit=5, **QUICK).rows[1].agreement == 1


def test_reference_is_found_from_elsewhere(
    artifact: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    alone = shutil.copy(artifact, tmp_path / "alone.onnx")
    found = bench([alone], batches=(1,), limit=5, **QUICK)
    assert [r.name for r in found.rows] == ["alone.onnx"]
    assert found.rows[0].agreement is None
    assert any("--run" in note and "no agreement" in note for note in found.notes)
    assert bench([artifact], batches=(1,), limit=5, **QUICK).rows[1].agreement == 1  # its run lies beside it
    shutil.copytree(run, tmp_path / "runs" / "run")
    assert bench([alone], batches=(1,), limit=5, **QUICK).rows[1].agreement == 1  # under ./runs
    inside = shutil.copy(artifact, tmp_path / "runs" / "run" / "inside.onnx")
    monkeypatch.chdir("/")
    assert bench([inside], batches=(1,), limit=5, **QUICK).rows[1].agreement == 1  # inside its run folder


def test_reference_looks_as_its_artifact_does(artifact: Path, run: Path) -> None:
    """An export chooses glimpses, and an artifact of an earlier version does not know that there are any."""
    metadata = open_session(artifact).metadata
    looking = replace(metadata, model={**metadata.model, "glimpses": "shift"})
    assert find_reference(looking, artifact, str(run)).model.glimpses == "shift"
    earlier = replace(metadata, model={k: v for k, v in metadata.model.items() if k != "glimpses"})
    assert find_reference(earlier, artifact, str(run)).model.glimpses == "none"
    deeper = replace(metadata, model={**metadata.model, "n": metadata.model["n"] + 1})
    with pytest.raises(UserError, match="has other settings \\(n "):
        find_reference(deeper, artifact, str(run))


def test_a_run_called_what_no_folder_can_be_called_is_not_found(artifact: Path) -> None:
    metadata = replace(open_session(artifact).metadata, run="é" * 300, weights_sha256="0" * 64)
    with pytest.raises(UserError, match="no eager model to compare"):
        find_reference(metadata, artifact)


def test_retrained_run_of_the_same_name_is_not_compared_with(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints.save(tmp_path / "run", make_checkpoint("tiny", seed=1))
    alone = shutil.copy(artifact, tmp_path / "alone.onnx")
    found = bench([alone], batches=(1,), limit=5, **QUICK)
    assert [r.kind for r in found.rows] == ["artifact"]
    assert any("run has other weights" in note for note in found.notes)


def test_depths_that_were_never_trained_are_named(loop: Path, tmp_path: Path) -> None:
    trained = with_props(loop, tmp_path / "two.onnx", trained_depth="2")
    own = bench([trained], **QUICK, limit=4, batches=[1], eager=False)
    assert "two.onnx was trained to 2 steps: 4 is deeper, and may answer worse" in own.notes
    asked = bench([trained], **QUICK, limit=4, batches=[1], eager=False, steps=(1, 2, 3, 5))
    assert "two.onnx was trained to 2 steps: 3, 5 are deeper, and may answer worse" in asked.notes
    assert not any("trained to" in note for note in bench([loop], **QUICK, limit=4, batches=[1], eager=False).notes)


def test_without_the_data_set_agreement_is_on_photographs(artifact: Path, tmp_path: Path) -> None:
    # Under its folder, so that the run is found beside it.
    foreign = with_props(artifact, artifact.with_name("foreign.onnx"), data='{"name": "cifar10"}')
    found = bench([foreign], batches=(1,), data_dir=tmp_path, **QUICK)
    own = row(found, "foreign.onnx")
    assert own.accuracy is None
    assert own.flips is None
    assert own.agreement == 1
    assert own.images == 256
    assert any("no accuracy: cifar10 is not in" in n and "--data-dir" in n for n in found.notes)
    assert found.data[0]["labelled"] is False
    with pytest.raises(UserError, match="cifar10 is not in"):
        bench([foreign], data="cifar10", data_dir=tmp_path, **QUICK)


def test_data_with_other_classes_is_refused(artifact: Path, tmp_path: Path) -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / name / f"{i}.png")
    with pytest.raises(
        UserError, match=r"classes that .*tiny.onnx was not trained on \(cat, dog\): expected some of its 10 \(0, 1, "
    ):
        bench([artifact], data=str(tmp_path), **QUICK)


def test_same_file_names_are_told_apart(artifact: Path, tmp_path: Path) -> None:
    other = shutil.copy(artifact, tmp_path / "tiny.onnx")
    found = bench([artifact, other, artifact], batches=(1,), limit=5, eager=False, **QUICK)
    assert [r.name for r in found.rows] == [str(artifact), str(other)]
    assert all(r.agreement is None and r.latency_ms for r in found.rows)
    assert "torch" not in found.versions


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batches": ()}, "batch sizes"),
        ({"batches": (0,)}, "batch sizes"),
        ({"seconds": 0}, "seconds"),
        ({"limit": 0}, "limit"),
    ],
)
def test_refuses_impossible_settings(artifact: Path, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench([artifact], **settings)
