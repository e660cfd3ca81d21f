"""--peers: what other tools make of the same file, measured by the same bench, their own files untouched by us."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from small_models import clear_threshold

from vitrm import checkpoint as checkpoints
from vitrm.errors import UserError
from vitrm.export import export
from vitrm.runtime.backends.openvino import OpenVinoSession, has_bf16
from vitrm.runtime.bench import cli
from vitrm.runtime.bench.run import bench
from vitrm.runtime.session import open_session
from vitrm.runtime.system import machine

pytestmark = pytest.mark.slow

pytest.importorskip("openvino", reason="needs OpenVINO: pip install openvino")

LIMIT = 60


@pytest.fixture(scope="module")
def quantized(run, folder) -> Path:
    """The run's int8 file for TensorRT, which OpenVINO takes too."""
    settings = {"steps": 2, "precision": "int8", "target": "tensorrt"}
    return export(checkpoints.load(str(run)), folder / "q.onnx", **settings).path


@pytest.fixture(scope="module")
def measured(artifact, loop, quantized):
    before = {path: path.read_bytes() for path in (artifact, loop, quantized)}
    beside = set(artifact.parent.iterdir())
    found = bench([artifact, loop, quantized], peers=True, limit=LIMIT, batches=[1], seconds=0.05, threads=1)
    assert {path: path.read_bytes() for path in before} == before, "the artifacts are left alone"
    assert set(artifact.parent.iterdir()) == beside
    return found


def test_every_tool_has_its_row_beside_ours(measured, artifact, loop, quantized):
    rows = {r.name: r for r in measured.rows if r.kind == "peer"}
    tools = ["in OpenVINO", "by NNCF in OpenVINO", "by quantize_static", "by ORTQuantizer"]
    if has_bf16():
        tools.append("in OpenVINO, bfloat16")
    expected = {f"{path.name} {tool}" for path in (artifact, loop) for tool in tools}
    assert set(rows) == expected | {f"{quantized.name} in OpenVINO"}
    assert rows[f"{quantized.name} in OpenVINO"].precision == "int8"
    # NNCF does not take a Loop at all; whatever fails says which tool it was.
    failed = {name: row.status for name, row in rows.items() if not row.ok}
    assert all("failed:" in status for status in failed.values())
    assert set(failed) <= {f"{loop.name} by NNCF in OpenVINO", f"{loop.name} by ORTQuantizer"}
    assert rows[f"{artifact.name} in OpenVINO"].agreement == 1
    assert rows[f"{artifact.name} in OpenVINO"].max_logit_difference < 1e-3
    for row in rows.values():
        if row.ok:
            assert row.latency_ms is not None
            assert row.images == LIMIT
            assert row.agreement is not None


def test_a_row_says_what_its_quantizer_touched(measured, artifact, loop):
    """The unrolled graph's twelve linear layers and more become int8; inside the loop's body none does."""
    notes = {r.name: r.notes for r in measured.rows}

    def count(name: str) -> int:
        (note,) = (n for n in notes[name] if "int8 weight tensors" in n)
        return 0 if "none" in note else int(note.rpartition(" ")[2])

    for tool in ("quantize_static", "ORTQuantizer", "NNCF in OpenVINO"):
        assert count(f"{artifact.name} by {tool}") >= 12
    assert count(f"{loop.name} by quantize_static") < 12


def test_rows_say_whose_sums_this_cpu_saturates(measured, artifact, quantized):
    notes = {r.name: " ".join(r.notes) for r in measured.rows}
    here = machine.saturates_integer_sums()
    for tool in ("ORTQuantizer", "NNCF in OpenVINO"):
        assert ("saturate" in notes[f"{artifact.name} by {tool}"]) == here
    assert "saturate" not in notes[f"{quantized.name} in OpenVINO"]


def test_openvino_takes_depth_and_threshold(loop):
    ours, theirs = open_session(loop), OpenVinoSession(Path(loop), threads=1)
    images = np.random.default_rng(0).random((9, 3, 32, 32), np.float32)
    assert theirs.metadata == ours.metadata
    threshold = clear_threshold([ours.infer(images, steps=steps).halt_prob for steps in (1, 2, 3, 4)])
    for settings in ({"steps": 3}, {"steps": 4, "halt_threshold": threshold}):
        a, b = ours.infer(images, **settings), theirs.infer(images, **settings)
        np.testing.assert_array_equal(a.steps_used, b.steps_used)
        np.testing.assert_allclose(a.logits, b.logits, atol=1e-3)


def test_what_openvino_cannot_open(artifact, tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"a\.onnx .* is not a whole ONNX file"):
        OpenVinoSession(tmp_path / "a.onnx")
    model = onnx.load(artifact)
    model.graph.node[0].op_type = "Unheard"
    onnx.save(model, tmp_path / "b.onnx")
    with pytest.raises(UserError, match=r"OpenVINO .* cannot run .*b\.onnx"):
        OpenVinoSession(tmp_path / "b.onnx")


def test_on_the_command_line(quantized, capsys):
    assert (
        cli.main([str(quantized), "--peers", "--no-eager", "--limit", "20", "--batch", "1", "--seconds", "0.02"]) == 0
    )
    assert "in OpenVINO" in capsys.readouterr().out
