"""The model repository: read with Triton's own schema, and served where a server is at hand."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format
from small_models import with_props

import vitrm.runtime
from vitrm.checkpoint import Checkpoint
from vitrm.errors import UserError
from vitrm.export import cli, export, pipeline
from vitrm.export.targets import triton
from vitrm.runtime.artifact.metadata import Metadata
from vitrm.runtime.artifact.plan_sidecar import BuildRecord, Sidecar, sidecar_path
from vitrm.system.files import sha256_of

pytestmark = pytest.mark.slow

SERVER = "VITRM_TRITONSERVER"  # the command that starts tritonserver, where one is at hand


@pytest.fixture(scope="module")
def schema():
    """Triton's ModelConfig.  Loaded by file: the package around it wants gRPC, the schema does not."""
    found = importlib.util.find_spec("tritonclient")
    if found is None:
        pytest.skip("needs Triton's client: pip install tritonclient")
    assert found.submodule_search_locations is not None
    path = Path(found.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(model) -> Checkpoint:
    data = {"name": "digits", "classes": ["zero", 'on"e', "two  pairs", *"3456789"]}
    return Checkpoint(model=model.config, data=data, weights=model.state_dict(), source="shaken")


@pytest.fixture(scope="module")
def files(tmp_path_factory, checkpoint) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {
        graph: export(checkpoint, folder / f"{graph}.onnx", steps=3, graph=graph).path for graph in ("unrolled", "loop")
    }


def metadata_of(path: Path) -> Metadata:
    return vitrm.runtime.open(path).metadata


def config_in(model: Path, schema):
    return text_format.Parse((model / triton.PBTXT_FILE).read_text(), schema.ModelConfig())


def check_against_file(config, path: Path) -> None:
    """What the configuration says of every tensor is what the ONNX file says, but for the batch axis and `reshape`."""
    graph = onnx.load(str(path)).graph
    types = {"TYPE_FP32": onnx.TensorProto.FLOAT, "TYPE_INT64": onnx.TensorProto.INT64}
    for entries, values in ((config.input, graph.input), (config.output, graph.output)):
        assert [e.name for e in entries] == [v.name for v in values]
        for entry, value in zip(entries, values, strict=True):
            tensor = value.type.tensor_type
            kind = entry.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[entry.data_type].name
            assert types[kind] == tensor.elem_type
            shape = [d.dim_value or -1 for d in tensor.shape.dim]
            dims = list(entry.reshape.shape) if entry.HasField("reshape") else list(entry.dims)
            assert shape == ([-1] if config.max_batch_size else []) + dims, entry.name
            # Triton's own rules, which the schema does not hold.
            assert entry.dims
            assert config.max_batch_size or not entry.HasField("reshape") or entry.reshape.shape


def test_an_unrolled_file_is_served_in_batches(tmp_path, files, schema):
    version = triton.add_model(tmp_path, "digits-6", files["unrolled"], metadata_of(files["unrolled"]), max_batch=48)
    assert version == tmp_path / "digits-6" / "1"
    config = config_in(tmp_path / "digits-6", schema)
    assert config.name == "digits-6"
    assert config.backend == "onnxruntime"
    assert config.max_batch_size == 48
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8, 16, 32, 48]
    assert config.input[0].format == schema.ModelInput.FORMAT_NCHW
    assert config.output[0].label_filename == "labels.txt"
    assert config.version_policy.latest.num_versions == 1
    assert [(g.count, g.kind) for g in config.instance_group] == [(1, schema.ModelInstanceGroup.KIND_AUTO)]
    labels = (tmp_path / "digits-6" / "labels.txt").read_text().splitlines()
    assert labels == ["zero", 'on"e', "two pairs", *"3456789"]
    check_against_file(config, version / "model.onnx")
    assert (version / "model.onnx").read_bytes() == files["unrolled"].read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digits-6"]


def test_a_loop_is_served_request_by_request(tmp_path, files, schema, digits):
    version = triton.add_model(tmp_path, "loop", files["loop"], metadata_of(files["loop"]))
    config = config_in(tmp_path / "loop", schema)
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert [(i.name, list(i.dims)) for i in config.input] == [
        ("pixel_values", [-1, 3, 32, 32]),
        ("steps", [1]),
        ("halt_threshold", [1]),
    ]
    check_against_file(config, version / "model.onnx")
    onnx.checker.check_model(str(version / "model.onnx"), full_check=True)
    feeds = {
        "pixel_values": digits[:5],
        "steps": np.array([2], np.int64),
        "halt_threshold": np.array([0.5], np.float32),
    }
    answers = onnxruntime.InferenceSession(str(version / "model.onnx")).run(["logits", "steps_used"], feeds)
    expected = vitrm.runtime.open(files["loop"]).infer(digits[:5], steps=2, halt_threshold=0.5)
    np.testing.assert_array_equal(answers[0], expected.logits)
    np.testing.assert_array_equal(answers[1], expected.steps_used)
    # The runtime opens the served copy as well.
    served = vitrm.runtime.open(version / "model.onnx")
    np.testing.assert_array_equal(served.infer(digits[:5], steps=2, halt_threshold=0.5).logits, expected.logits)


def test_a_plan_goes_to_the_tensorrt_backend(tmp_path, files, schema):
    """The writer does not read the plan: only the place, the side-car and the configuration are its own."""
    plan = tmp_path / "engine.plan"
    plan.write_bytes(b"not looked into")
    (tmp_path / "engine.plan.json").write_text("{}")
    metadata = metadata_of(files["unrolled"])
    version = triton.add_model(tmp_path / "models", "engine", plan, metadata, max_batch=16)
    assert sorted(p.name for p in version.iterdir()) == ["model.plan", "model.plan.json"]
    config = config_in(version.parent, schema)
    assert config.backend == "tensorrt"
    assert config.max_batch_size == 16
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU
    with pytest.raises(UserError, match=r"scalars.*serve the loop as \.onnx"):
        triton.add_model(tmp_path / "models", "loop", plan, metadata_of(files["loop"]))
    assert not (tmp_path / "models" / "loop").exists()


def engine_of(plan: Path, metadata: Metadata, **changes) -> None:
    """A side-car for a file that stands for a plan: what it says decides, the plan is not opened."""
    values = {
        "flavour": "full",
        "version": "10.3.0",
        "gpus": ["sm87"],
        "gpu_name": "Orin",
        "system": "Linux aarch64",
        "profiles": [[1, 1, 1], [2, 32, 128]],
        "flags": [],
        "workspace_mib": None,
        "source": "run",
        "sha256": sha256_of(plan),
        "bytes": plan.stat().st_size,
    }
    sidecar = Sidecar(metadata, BuildRecord(**{**values, **changes}))
    sidecar_path(plan).write_text(json.dumps(sidecar.to_dict()))


def test_a_plan_is_served_as_its_side_car_says(tmp_path, files, schema, capsys):
    plan = tmp_path / "engine.plan"
    plan.write_bytes(b"not looked into")
    metadata = metadata_of(files["unrolled"])
    engine_of(plan, metadata)
    assert cli.main([str(plan), "--triton", str(tmp_path / "models"), "--triton-name", "six"]) == 0
    assert "tritonserver --model-repository" in capsys.readouterr().out
    config = config_in(tmp_path / "models" / "six", schema)
    assert config.max_batch_size == 128
    assert list(config.instance_group[0].profile) == ["0", "1"]
    for changes, message in (
        ({"flavour": "rtx"}, "TensorRT for RTX, and Triton's tensorrt backend runs TensorRT's own"),
        ({"flags": ["strip_weights"]}, "plan without weights"),
        ({"profiles": [[8, 8, 8]]}, "takes no batch of 1"),
        ({"bytes": 3}, "its side-car says 3"),
    ):
        engine_of(plan, metadata, **changes)
        with pytest.raises(UserError, match=message):
            triton.add_file(tmp_path / "models", "other", plan)
    assert not (tmp_path / "models" / "other").exists()


def test_an_exported_file_is_added_as_it_is(tmp_path, files, capsys):
    assert cli.main([str(files["unrolled"]), "--triton", str(tmp_path)]) == 0
    assert (tmp_path / "unrolled" / "1" / "model.onnx").read_bytes() == files["unrolled"].read_bytes()
    assert cli.main([str(files["unrolled"]), "--triton", str(tmp_path), "--fp16"]) == 2
    assert "as it is: leave out" in capsys.readouterr().err


@pytest.fixture
def no_work(monkeypatch):
    """Nothing may be exported."""
    monkeypatch.setattr(pipeline, "export_onnx", lambda *_: pytest.fail("the work has begun"))


@pytest.mark.rtx
def test_a_plan_for_rtx_is_refused_before_it_is_built(tmp_path, run, capsys, no_work):
    assert cli.main([str(run), "--triton", str(tmp_path / "models"), "--gpu", "sm89", "--tensorrt", "rtx"]) == 2
    assert "Triton's tensorrt backend runs TensorRT's own" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_a_baseline_has_logits_alone(tmp_path, files, schema):
    m = metadata_of(files["unrolled"])
    single = replace(m, graph="single", target="cpu", classes=[], model={**m.model, "kind": "vit"})
    config = text_format.Parse(triton.config_text("vit", single, backend="onnxruntime"), schema.ModelConfig())
    assert [o.name for o in config.output] == ["logits"]
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_CPU
    assert triton.labels_text(single) == "".join(f"{i}\n" for i in range(10))


INJECTION = 'mine\n model_operations { op_library_filename: "/tmp/evil.so" }\n#'


def test_names_add_no_field_to_the_config(tmp_path, files, schema, capsys):
    m = metadata_of(files["unrolled"])
    clean = triton.config_text("digits", replace(m, run="mine"), backend="onnxruntime")
    expected = text_format.Parse(clean, schema.ModelConfig())
    breaks = ["\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\x00"]
    for run in (INJECTION, *(INJECTION.replace("\n", c) for c in breaks), f'"{INJECTION}', "\\\n", "modèle 猫"):
        text = triton.config_text("digits", replace(m, run=run), backend="onnxruntime")
        # Read with every idea of what a line is that a reader of the file might have.
        for read in (text, "\n".join(text.splitlines()), text.replace("\r", "\n")):
            assert text_format.Parse(read, schema.ModelConfig()) == expected
        assert triton._interface_of(text) == triton._interface_of(clean)
        assert len(text.splitlines()) == len(clean.splitlines())
    hostile = with_props(files["unrolled"], tmp_path / "a.onnx", run=json.dumps(INJECTION))
    assert cli.main([str(hostile), "--triton", str(tmp_path / "models"), "--triton-name", "digits"]) == 0
    assert config_in(tmp_path / "models" / "digits", schema) == expected
    capsys.readouterr()
    for name in (INJECTION, 'a"b', "a\\", "é", "a b", "", ".", "a\n"):
        assert cli.main([str(hostile), "--triton", str(tmp_path / "models"), "--triton-name", name]) in (0, 2)
        assert "is no model name" in capsys.readouterr().err or name == ""
    assert [p.name for p in (tmp_path / "models").iterdir() if p.name != "a"] == ["digits"]


def test_strings_are_quoted_as_protobuf_reads_them(schema):
    for text in ("a\"b\\c'd", "line\nbreak\r\t\x00\x7f", "é猫👩‍🚀", "\x85\u2028", "\\n", "\\101"):
        found = text_format.Parse(f"name: {triton._quoted(text)}", schema.ModelConfig())
        assert found.name == text


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\x1b[2J", "a\u2028b", "a\x00", "a\x85b", "\udcff"])
def test_a_class_name_is_one_line_of_the_labels(tmp_path, files, name):
    m = metadata_of(files["unrolled"])
    with pytest.raises(UserError, match=r"class 3 is .* without line breaks and control characters") as caught:
        triton.add_model(tmp_path, "a", files["unrolled"], replace(m, classes=[*"012", name, *"456789"]))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert "شکل\u200f\n" in triton.labels_text(replace(m, classes=[*"012345678", "شکل\u200f"]))


def test_a_later_export_becomes_a_version(tmp_path, files):
    metadata = metadata_of(files["unrolled"])
    triton.add_model(tmp_path, "other", files["loop"], metadata_of(files["loop"]))
    first = triton.add_model(tmp_path, "digits", files["unrolled"], metadata)
    config = first.parent / "config.pbtxt"
    config.write_text(config.read_text().replace("count: 1", "count: 4"))  # an operator's own setting
    (first.parent / "7").mkdir()
    (first.parent / "notes").mkdir()
    before = snapshot(tmp_path)
    second = triton.add_model(tmp_path, "digits", files["unrolled"], replace(metadata, steps=4, run="again"))
    assert second.name == "8"
    after = snapshot(tmp_path)
    assert {k: v for k, v in after.items() if k in before} == before
    assert set(after) - set(before) == {"digits/8/model.onnx"}


def test_two_additions_at_the_same_time_are_two_versions(tmp_path, files):
    with ThreadPoolExecutor(3) as pool:  # a loop is copied and tried out, so that they overlap
        made = list(pool.map(lambda _: triton.add_file(tmp_path, "digits", files["loop"]), range(3)))
    assert sorted(version.name for version in made) == ["1", "2", "3"]
    assert len({(version / "model.onnx").read_bytes() for version in made}) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["digits"]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("change", ["classes", "size", "graph", "batch", "foreign"])
def test_a_model_with_another_interface_is_not_touched(tmp_path, files, change):
    metadata = metadata_of(files["unrolled"])
    first = triton.add_model(tmp_path, "digits", files["unrolled"], metadata)
    path, other, batch = files["unrolled"], metadata, triton.MAX_SERVED_BATCH
    if change == "classes":
        other = replace(metadata, classes=list("abcdefghij"))
    elif change == "size":
        other = replace(metadata, model={**metadata.model, "image_size": 64})
    elif change == "graph":
        path, other = files["loop"], metadata_of(files["loop"])
    elif change == "batch":
        batch = 8
    else:
        (first.parent / "config.pbtxt").write_text('name: "digits"\n')
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=r"(other inputs, outputs, classes|did not write).*--triton-name"):
        triton.add_model(tmp_path, "digits", path, other, max_batch=batch)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["config.pbtxt", "labels.txt"])
@pytest.mark.parametrize("kind", ["fifo", "device", "huge"])
def test_what_is_no_small_file_in_a_repository_is_not_read(tmp_path, files, name, kind):
    metadata = metadata_of(files["unrolled"])
    file = triton.add_model(tmp_path, "model", files["unrolled"], metadata).parent / name
    if kind == "huge":
        os.truncate(file, 40 << 30)
    else:
        file.unlink()
        os.mkfifo(file) if kind == "fifo" else file.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"{name} (is a |has )"):
        triton.add_model(tmp_path, "model", files["unrolled"], metadata)


def test_a_write_that_fails_leaves_nothing(tmp_path, files, monkeypatch):
    metadata = metadata_of(files["unrolled"])
    triton.add_model(tmp_path, "kept", files["unrolled"], metadata)
    before = snapshot(tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy2", full)
    for name in ("kept", "new"):
        with pytest.raises(UserError, match="no space left"):
            triton.add_model(tmp_path, name, files["unrolled"], metadata)
        assert snapshot(tmp_path) == before
        assert sorted(p.name for p in tmp_path.rglob("*")) == ["1", "config.pbtxt", "kept", "labels.txt", "model.onnx"]


def test_the_command_writes_a_repository(tmp_path, run, capsys, schema):
    repository = tmp_path / "models"
    for version in ("1", "2"):
        assert cli.main([str(run), "--steps", "2", "--triton", str(repository)]) == 0
        out = capsys.readouterr().out
        assert str(repository / "shaken-2steps-fp32" / version) in out
        assert f"tritonserver --model-repository={repository}" in out
    assert config_in(repository / "shaken-2steps-fp32", schema).name == "shaken-2steps-fp32"
    assert cli.main([str(run), "--steps", "2", "--triton", str(repository), "--triton-name", "mine"]) == 0
    assert (repository / "mine" / "1" / "model.onnx").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["models"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--graph", "stepwise"], "serve --graph unrolled"),
        (["--every-step"], "leave out --every-step"),
        (["--triton-name", "a/b"], "is no model name"),
        (["-o", "a.onnx"], "leave out -o and --hf"),
        (["--hf", "folder"], "leave out -o and --hf"),
    ],
)
def test_what_cannot_be_served_is_refused_before_the_work(tmp_path, run, capsys, no_work, options, message):
    assert cli.main([str(run), "--triton", str(tmp_path / "models"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_places_that_are_none(tmp_path, run, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main([str(run), "--triton", str(tmp_path / "file")]) == 2
    assert "is a file: name a folder" in capsys.readouterr().err
    (tmp_path / "config.pbtxt").write_text("")
    assert cli.main([str(run), "--triton", str(tmp_path)]) == 2
    assert "expected a folder of models" in capsys.readouterr().err
    assert cli.main([str(run), "--triton-name", "mine"]) == 2
    assert "--triton-name is for --triton DIR" in capsys.readouterr().err


@pytest.mark.skipif(SERVER not in os.environ, reason=f"needs a server: {SERVER}='tritonserver --backend-directory …'")
def test_a_server_gives_the_same_answers(tmp_path, files, digits):
    for graph, path in files.items():
        triton.add_model(tmp_path, graph, path, metadata_of(path))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*os.environ[SERVER].split(), f"--model-repository={tmp_path}", f"--http-port={port}"]
    command += ["--http-address=127.0.0.1", "--allow-grpc=false", "--allow-metrics=false"]
    images = digits[:3]
    scalars = [("steps", "INT64", [1], [2]), ("halt_threshold", "FP32", [1], [2.0])]
    with (tmp_path.parent / "server.log").open("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for(port, server, log)
            for graph, path in files.items():
                inputs = [("pixel_values", "FP32", list(images.shape), images.ravel().tolist())]
                answer = ask(port, graph, inputs + (scalars if graph == "loop" else []))
                steps = 2 if graph == "loop" else None
                expected = vitrm.runtime.open(path).infer(images, steps=steps)
                np.testing.assert_allclose(answer["logits"], expected.logits.ravel(), atol=1e-4)
                np.testing.assert_allclose(answer["halt_prob"], expected.halt_prob, atol=1e-4)
                np.testing.assert_array_equal(answer["steps_used"], expected.steps_used)
        finally:
            server.terminate()
            server.wait(60)


def wait_for(port: int, server: subprocess.Popen, log) -> None:
    for _ in range(120):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5):
                return
        except OSError:
            if server.poll() is not None:
                log.seek(0)
                pytest.fail(f"the server ended: {log.read()[-3000:]}")
            time.sleep(0.5)
    pytest.fail("the server was not ready within a minute")


def ask(port: int, model: str, inputs: list) -> dict[str, list]:
    body = {"inputs": [dict(zip(("name", "datatype", "shape", "data"), values, strict=True)) for values in inputs]}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v2/models/{model}/infer", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as response:
        return {o["name"]: o["data"] for o in json.load(response)["outputs"]}
