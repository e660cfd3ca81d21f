"""Plans that cannot be: each ends with one message, and leaves nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from processes import PATIENCE, interruptible

from vitrm import checkpoint as checkpoints
from vitrm.errors import UserError
from vitrm.export import cli, export
from vitrm.export.doctor import diagnose
from vitrm.export.tensorrt import build
from vitrm.export.tensorrt.build import build_engine
from vitrm.export.tensorrt.child import wrong_results
from vitrm.export.tensorrt.options import PlanOptions, normal_gpu
from vitrm.export.tensorrt.toolchain import toolchain
from vitrm.preprocessing import Preprocessing
from vitrm.runtime.artifact.metadata import Metadata
from vitrm.runtime.backends.tensorrt.api import installed
from vitrm.runtime.system.gpus import Gpu, Gpus

FLOAT, HALF, INT8, UINT8, INT32, INT64, BOOL = (
    getattr(TensorProto, n) for n in ("FLOAT", "FLOAT16", "INT8", "UINT8", "INT32", "INT64", "BOOL")
)
RTX = PlanOptions(gpus=("sm89",), flavour="rtx")
NO_GPU = Gpus((), None, "no NVIDIA driver is installed")


def graph(nodes, inputs, outputs, constants=None, opset=19, domains=()):
    """A model of `nodes`; inputs and outputs are {name: (type, shape)}."""
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, *v) for n, v in inputs.items()],
        [helper.make_tensor_value_info(n, *v) for n, v in outputs.items()],
        [numpy_helper.from_array(v, n) for n, v in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(made, opset_imports=opsets, ir_version=9 if opset < 23 else 10)


def quantized(scale, zero, *, dtype=FLOAT):
    """x → QuantizeLinear → DequantizeLinear → y."""
    constants = {"s": scale} | ({} if zero is None else {"z": zero})
    names = ["s"] + (["z"] if zero is not None else [])
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *names], ["q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q", *names], ["y"], name="dequantize"),
    ]
    return graph(nodes, {"x": (dtype, ["b", 8])}, {"y": (dtype, ["b", 8])}, constants)


def attention():
    """One tensor as query, key and value: the builder's SIGSEGV."""
    node = helper.make_node("Attention", ["q", "q", "q"], ["y"], name="attend")
    shape = ["b", 4, 16, 32]
    return graph([node], {"q": (FLOAT, shape)}, {"y": (FLOAT, shape)}, opset=23)


def loop(declared: bool):
    """A Loop whose carried tensor grows by itself; `declared`: the body says so."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Concat", ["c", "c"], ["grown"], axis=1),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", INT64, []),
            helper.make_tensor_value_info("go", BOOL, []),
            helper.make_tensor_value_info("c", FLOAT, ["b", 4] if declared else None),
        ],
        [
            helper.make_tensor_value_info("go_on", BOOL, []),
            helper.make_tensor_value_info("grown", FLOAT, ["b", 8] if declared else None),
        ],
    )
    constants = {"trips": np.int64(2), "true": np.bool_(True)}
    constants = {n: np.asarray(v) for n, v in constants.items()}
    node = helper.make_node("Loop", ["trips", "true", "x"], ["y"], name="recursion", body=body)
    return graph([node], {"x": (FLOAT, ["b", 4])}, {"y": (FLOAT, ["b", "n"])}, constants)


def branches():
    """An If that gives two axes or one."""
    then = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["a"])], "then", [], [helper.make_tensor_value_info("a", FLOAT, ["b", 4])]
    )
    otherwise = helper.make_graph(
        [helper.make_node("ReduceSum", ["x"], ["c"], keepdims=0)],
        "else",
        [],
        [helper.make_tensor_value_info("c", FLOAT, [])],
    )
    node = helper.make_node("If", ["p"], ["y"], name="choose", then_branch=then, else_branch=otherwise)
    return graph([node], {"x": (FLOAT, ["b", 4]), "p": (BOOL, [])}, {"y": (FLOAT, None)})


def integer_bias():
    node = helper.make_node("DequantizeLinear", ["b", "s"], ["bias"], name="bias_dequantize")
    add = helper.make_node("Add", ["x", "bias"], ["y"])
    constants = {"b": np.arange(8, dtype=np.int32), "s": np.float32(0.1)}
    return graph(
        [node, add],
        {"x": (FLOAT, ["b", 8])},
        {"y": (FLOAT, ["b", 8])},
        {n: np.asarray(v) for n, v in constants.items()},
    )


def dynamic():
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="dynamic")
    back = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])
    return graph([node, back], {"x": (FLOAT, [2, 8])}, {"y": (FLOAT, [2, 8])})


def contrib():
    node = helper.make_node("FusedGelu", ["x"], ["y"], name="gelu", domain="com.microsoft")
    return graph([node], {"x": (FLOAT, ["b", 8])}, {"y": (FLOAT, ["b", 8])}, domains=("com.microsoft",))


def array(value, dtype):
    return np.asarray(value, dtype)


@pytest.mark.rtx
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (attention(), "attend is an Attention operator, which TensorRT's builder refuses or crashes on"),
        (quantized(array(0.1, "f4"), array(0, "u1")), "quantize is uint8, which TensorRT computes otherwise"),
        (quantized(array(0.1, "f4"), None), "quantize is uint8"),  # what ONNX says where nothing is said
        (quantized(array(0.1, "f4"), array(3, "i1")), "zero point other than 0"),
        (quantized(array(0.1, "f4"), array(0, "i1"), dtype=HALF), "scale of another type than its tensor .*float16"),
        (integer_bias(), "dequantizes int32 .*leave biases in floating point"),
        (dynamic(), "dynamic is a DynamicQuantizeLinear, int8 of another runtime: .*--target tensorrt"),
        (contrib(), "gelu is a FusedGelu of com.microsoft"),
        (loop(declared=True), r"recursion carries c of shape \['b', 4\] and gives it back as \['b', 8\]"),
        (loop(declared=False), "cannot (build|parse) this graph"),
        (branches(), "choose gives 2 axes in one branch and 0 in the other"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_what_tensorrt_does_not_take_is_told(model, message, tmp_path):
    onnx.save(model, tmp_path / "a.onnx")
    (tmp_path / "a.plan").write_bytes(b"an earlier plan")
    metadata = Metadata(
        model={"image_size": 32, "classes": 10},
        classes=[],
        data={},
        preprocessing=Preprocessing.square(32),
        graph="unrolled",
        steps=1,
        halt_threshold=2.0,
        precision="fp32",
        weights_sha256="",
        run="test",
    )
    with pytest.raises(UserError, match=message) as caught:
        build_engine(tmp_path / "a.onnx", tmp_path / "a.plan", RTX, metadata=metadata)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "a.plan").read_bytes() == b"an earlier plan"
    left = {p.name for p in tmp_path.iterdir()} - {"a.onnx", "a.plan"}
    assert left <= {"a.plan.log"}  # where TensorRT had something to say
    if left:
        assert "a.plan.log" in str(caught.value)


@pytest.mark.rtx
def test_a_builder_that_crashes_is_a_message(tmp_path, monkeypatch):
    # Not found out beforehand, as the next kind of crash will not be.
    monkeypatch.setattr(build, "check_graph", lambda path: onnx.load(str(path)))
    onnx.save(attention(), tmp_path / "a.onnx")
    with pytest.raises(UserError, match=r"TensorRT for RTX .* builder crashed \(signal 11\) on this graph"):
        build_engine(tmp_path / "a.onnx", tmp_path / "a.plan", RTX, metadata=object())  # type: ignore[arg-type]
    assert {p.name for p in tmp_path.iterdir()} <= {"a.onnx", "a.plan.log"}


SKIPPED = "[myelin] Error Code 2: skipping tactic 0x3e8 due to exception an illegal memory access was encountered"


@pytest.fixture
def patched_builders(tmp_path_factory, monkeypatch):
    """Gives a function after which every builder's process runs some lines of Python before its own."""

    def patch(*lines):
        folder = tmp_path_factory.mktemp("builder")
        block = "".join(f"    {line}\n" for line in lines)
        (folder / "sitecustomize.py").write_text(
            f"import sys\nif 'vitrm.export.tensorrt.child' in sys.orig_argv:\n{block}"
        )
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))

    return patch


@pytest.fixture
def complaining_builder(patched_builders):
    """Real builders whose log gets one ERROR line more, as TensorRT's own when it tries a kernel and leaves it out."""
    patched_builders(
        "from vitrm.runtime.backends.tensorrt import api",
        "make = api.make_log",
        "def make_log(trt, told):",
        "    log = make(trt, told)",
        f"    log.log(trt.ILogger.ERROR, {SKIPPED!r})",
        "    return log",
        "api.make_log = make_log",
    )


@pytest.mark.slow
@pytest.mark.rtx
def test_an_error_line_does_not_reject_a_plan(run, tmp_path, complaining_builder, capsys):
    source = export(checkpoints.load(run), tmp_path / "a.onnx", steps=1, graph="loop").path
    assert cli.main([str(source), "-o", str(tmp_path / "a.plan"), "--gpu", "sm89"]) == 0
    assert (tmp_path / "a.plan").stat().st_size > 100_000
    out = capsys.readouterr().out
    assert f"warning  TensorRT logged an error and built the plan all the same: {SKIPPED}" in out


@pytest.mark.rtx
def test_a_plan_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    # TensorRT itself says so, in a warning; here the check that comes before it looks away.
    monkeypatch.setattr(build, "check_graph", lambda path: None)
    onnx.save(quantized(array(0.1, "f4"), array(0, "u1")), tmp_path / "a.onnx")
    with pytest.raises(UserError, match=r"built a plan that computes something else than this graph: .*UINT8.*INT8"):
        build_engine(tmp_path / "a.onnx", tmp_path / "a.plan", RTX, metadata=object())  # type: ignore[arg-type]
    assert {p.name for p in tmp_path.iterdir()} == {"a.onnx", "a.plan.log"}


@pytest.mark.parametrize(
    "text",
    [
        "- 3 weights are affected by this issue: Detected finite FP32 values which would overflow in FP16 and converted them",
        "- 1 weights are affected by this issue: Detected NaN values and converted them to FP16 NaN.",
        "One or more weights outside the range of INT32 was clamped",
    ],
)
def test_messages_that_mean_wrong_results(text):
    assert wrong_results([("WARNING", text), ("WARNING", text), ("ERROR", SKIPPED), ("WARNING", "subnormal FP16")]) == [
        text
    ]


@pytest.fixture
def halting_builder(patched_builders):
    """Builders stop themselves (SIGSTOP) with the plan written and nothing said of it: they never end on their own."""
    patched_builders(
        "import os, pathlib, signal",
        "write = pathlib.Path.write_bytes",
        "def write_and_stop(self, data):",
        "    write(self, data)",
        "    os.kill(os.getpid(), signal.SIGSTOP)",
        "pathlib.Path.write_bytes = write_and_stop",
    )


def stopped_builder_of(parent: int) -> int:
    """Waits until that process has a builder that has stopped itself."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, its_parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
                if state == "T" and int(its_parent) == parent:
                    return int(stat.parent.name)
            except (OSError, IndexError):  # it has just ended
                continue
        time.sleep(0.2)
    raise AssertionError("no builder has stopped itself")


@pytest.mark.slow
@pytest.mark.rtx
def test_a_builder_that_is_killed_is_a_message(run, tmp_path, halting_builder):
    source = export(checkpoints.load(run), tmp_path / "a.onnx", steps=1).path
    # As the kernel does when memory runs out.
    killer = threading.Thread(target=lambda: os.kill(stopped_builder_of(os.getpid()), signal.SIGKILL))
    killer.start()
    with pytest.raises(UserError, match=r"was killed \(signal 9\), probably for its memory"):
        build_engine(source, tmp_path / "a.plan", RTX)
    killer.join()
    assert {p.name for p in tmp_path.iterdir()} <= {"a.onnx", "a.plan.log"}


@pytest.mark.slow
@pytest.mark.rtx
def test_too_little_workspace_is_told(run, tmp_path):
    source = export(checkpoints.load(run), tmp_path / "a.onnx", steps=1, graph="loop").path
    with pytest.raises(UserError, match=r"give it more with --workspace.*all it said is in .*a\.plan\.log"):
        build_engine(source, tmp_path / "a.plan", PlanOptions(gpus=("sm89",), workspace_mib=1, flavour="rtx"))
    assert "ERROR" in (tmp_path / "a.plan.log").read_text()
    build_engine(source, tmp_path / "a.plan", RTX)
    assert not (tmp_path / "a.plan.log").exists()  # of an attempt that is of the past


@pytest.mark.slow
@pytest.mark.rtx
def test_a_stopped_build_leaves_nothing(run, tmp_path, halting_builder):
    source = export(checkpoints.load(run), tmp_path / "a.onnx", steps=1).path
    command = [sys.executable, "-m", "vitrm.export.cli", str(source), "-o", str(tmp_path / "a.plan"), "--gpu", "sm89"]
    with interruptible(command, stderr=subprocess.PIPE, text=True) as process:
        builder = stopped_builder_of(process.pid)
        assert len(list(tmp_path.iterdir())) == 2, "the plan is being written"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert err == "interrupted\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]
    assert not Path(f"/proc/{builder}").exists()


@pytest.mark.rtx
@pytest.mark.parametrize(
    ("options", "gpus", "message"),
    [
        (
            {"gpus": ("sm87",)},
            NO_GPU,
            r"--gpu sm87: TensorRT for RTX .* builds for sm75, sm80, sm86, sm89, .*on the machine",
        ),
        ({"gpus": ("ada",)}, NO_GPU, "GPU is 'ada', expected a compute capability such as sm89"),
        ({"hardware_compatible": True}, NO_GPU, r"--hardware-compatible: .* name every GPU .*--gpu sm75,"),
        ({"version_compatible": True}, NO_GPU, "--version-compatible: .* no lean runtime"),
        ({"timing_cache": Path("x")}, NO_GPU, "--timing-cache: .* times nothing"),
        ({"strip_weights": True}, NO_GPU, "--strip-weights: .* on a machine with a GPU alone"),
        ({"refit": True}, NO_GPU, "--refit: .* on a machine with a GPU alone"),
        ({"profiles": ((8, 1, 64),)}, NO_GPU, r"batch sizes are \[8, 1, 64\]"),
        (
            {"profiles": ((1, 8, 10**9),)},
            NO_GPU,
            r"batch sizes are \[1, 8, 1000000000\], expected .* ≤ MAX ≤ 1,048,576",
        ),
        ({"workspace_mib": 0}, NO_GPU, "workspace, in MiB, is 0, expected a whole number from 1 to 1,048,576"),
        ({"workspace_mib": 2**63}, NO_GPU, "workspace, in MiB, is 9223372036854775808"),
        (
            {},
            Gpus((Gpu("NVIDIA H100", "sm90", 1),), "13.0"),
            r"the GPU here is an NVIDIA H100 \(sm90\), and TensorRT for RTX",
        ),
    ],
)
def test_what_cannot_be_built_is_told_at_once(options, gpus, message):
    with pytest.raises(UserError, match=message):
        toolchain(PlanOptions(flavour="rtx", **options), gpus)


@pytest.mark.rtx
def test_chooses_what_to_build_for():
    rtx = PlanOptions(flavour="rtx")
    everywhere = toolchain(rtx, NO_GPU)
    assert everywhere.gpus == ["sm80", "sm86", "sm89", "sm120", "sm121"]
    assert not everywhere.runs_here
    here = toolchain(rtx, Gpus((Gpu("NVIDIA L4", "sm89", 1),), "13.0"))
    assert here.gpus == ["sm89"]
    assert here.runs_here
    assert not toolchain(
        PlanOptions(flavour="rtx", gpus=("8.6",)), Gpus((Gpu("NVIDIA L4", "sm89", 1),), "13")
    ).runs_here


@pytest.mark.skipif("full" in installed(), reason="TensorRT is installed")
def test_a_tensorrt_that_is_missing_is_named():
    with pytest.raises(UserError, match=r'TensorRT is not installed: pip install "vitrm\[tensorrt\]"'):
        toolchain(PlanOptions(flavour="full"), NO_GPU)


def test_gpus_have_many_spellings():
    assert {normal_gpu(s) for s in ("sm89", "SM_89", "8.9", "89")} == {"sm89"}
    assert normal_gpu("12.0") == normal_gpu("sm120") == "sm120"


@pytest.mark.rtx
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--int8", "--target", "cpu", "-o", "{tmp}/a.plan"], "leave out --target cpu, or name an .onnx file"),
        (["-o", "{tmp}/a.onnx", "--gpu", "sm89"], "--gpu is for a TensorRT plan: name one with -o NAME.plan"),
        (["-o", "{tmp}/a.plan", "--gpu", "sm90"], "--gpu sm90: TensorRT for RTX"),
        (["-o", "{tmp}", "--plan"], "ending in .plan or .engine"),
        (["-o", "{tmp}/a.txt", "--plan"], "ending in .plan or .engine"),
        (["-o", "{tmp}/a.onnx", "--plan", "--graph", "stepwise"], "a folder of three plans"),
        (["-o", "{tmp}", "--plan", "--graph", "stepwise"], "a folder with other things in it"),
    ],
)
def test_bad_requests_end_with_one_line_and_2(run, tmp_path, capsys, arguments, message):
    (tmp_path / "other").touch()
    assert cli.main([str(run), *(a.replace("{tmp}", str(tmp_path)) for a in arguments)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(message, err)
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


@pytest.mark.slow
@pytest.mark.rtx
def test_a_plan_from_an_earlier_export(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export(checkpoints.load(run), "sw", steps=2, graph="stepwise", precision="fp16")
    assert cli.main(["sw", "--gpu", "sm89", "--batch", "4"]) == 0
    out = capsys.readouterr().out
    assert "for sm89" in out
    assert "batch 4;" in out
    assert out.endswith("next: vitrm-bench sw-plan\n")
    assert len(list(Path("sw-plan").iterdir())) == 6
    assert cli.main(["sw", "--steps", "3"]) == 2
    assert "--steps was decided when sw was exported" in capsys.readouterr().err


def test_doctor_names_everything_without_fail(capsys):
    assert cli.main(["--doctor"]) == 0
    out = capsys.readouterr().out
    for name in ("GPU", "torch", "onnxruntime", "TensorRT", "TensorRT for RTX", "cuda-bindings", "openvino"):
        assert re.search(rf"^  {name}  ", out, re.MULTILINE), name
    found = {f.name: f for f in diagnose()}
    assert found["torch"].version
    if find_spec("tensorrt_rtx"):
        assert "builds plans for sm75, sm80, sm86, sm89" in found["TensorRT for RTX"].can


def test_doctor_works_where_nothing_is_installed():
    script = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'onnx', 'onnxruntime', 'tensorrt_rtx', 'cuda', 'openvino', 'rich'):\n"
        "            raise ImportError(f'{name} is refused')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from importlib import metadata\n"
        "def version(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = version\n"
        "from vitrm.runtime.backends.tensorrt import api as tensorrt_api\n"
        "tensorrt_api.find_spec = lambda name: None\n"
        "from vitrm.export.cli import main\n"
        "sys.exit(main(['--doctor']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("missing") == 7
