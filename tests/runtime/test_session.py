"""Opening artifacts and running them: what fits, what is refused and how."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import WITHOUT_TORCH
from small_models import STEPS, with_props
from torch._dynamo.utils import counters

import vitrm.runtime
from vitrm import checkpoint as checkpoints
from vitrm import data
from vitrm.config import preset, to_dict
from vitrm.errors import UserError
from vitrm.exact_float32 import exact_float32
from vitrm.preprocessing import Preprocessing
from vitrm.runtime.artifact.metadata import Metadata
from vitrm.runtime.backends.eager import EagerSession

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return data.load("digits", "test").floats(slice(0, 33))


def test_agrees_with_eager(artifact: Path, run: Path, images: np.ndarray) -> None:
    session = vitrm.runtime.open(artifact, threads=1)
    model = checkpoints.load(str(run)).build()
    for batch in (1, 2, 33):
        result = session.infer(images[:batch])
        with torch.inference_mode():
            expected = model(torch.from_numpy(images[:batch]), STEPS)
        np.testing.assert_allclose(result.logits, expected.logits.numpy(), atol=2e-3)  # of logits around 10
        assert (result.logits.argmax(1) == expected.logits.numpy().argmax(1)).all()
        np.testing.assert_allclose(result.halt_prob, expected.halt_prob.numpy(), atol=1e-4)
        assert result.logits.dtype == np.float32
        assert result.logits.shape == (batch, 10)
        assert result.steps_used is not None
        assert result.steps_used.tolist() == [STEPS] * batch
        assert result.steps_used.dtype == np.int64


def test_describes_itself(artifact: Path) -> None:
    session = vitrm.runtime.open(artifact, threads=1)
    assert session.metadata.steps == STEPS
    assert session.metadata.graph == "unrolled"
    assert session.metadata.image_size == 32
    assert session.backend == "onnxruntime-cpu"
    assert session.device
    assert session.size_bytes == artifact.stat().st_size
    assert session.threads == 1
    assert session.path == artifact
    assert session.notes == ()


def test_baseline_has_logits_only(vit: Path, images: np.ndarray) -> None:
    session = vitrm.runtime.open(vit, threads=1)
    result = session.infer(images)
    assert result.logits.shape == (33, 10)
    assert result.halt_prob is None
    assert result.steps_used is None
    with pytest.raises(UserError, match="no steps to choose"):
        session.infer(images, steps=3)


def test_fp16_on_a_cpu_says_so(artifact: Path, tmp_path: Path) -> None:
    half = with_props(artifact, tmp_path / "half.onnx", precision='"fp16"')
    (note,) = vitrm.runtime.open(half, threads=1).notes
    assert "computed in float32" in note


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((2, 3, 16, 16), np.float32), r"shape \[2, 3, 16, 16\], expected float32 \[batch, 3, 32, 32\]"),
        (np.zeros((2, 32, 32, 3), np.float32), "move the channels to axis 1"),
        (np.zeros((3, 32, 32), np.float32), r"add a batch axis: images\[None\]"),
        (np.zeros((32, 32, 3), np.float32), r"images\.transpose\(2, 0, 1\)\[None\]"),
        (np.zeros((0, 3, 32, 32), np.float32), "batch is empty"),
        (np.zeros((1, 3, 32, 32), np.uint8), r"uint8, expected float32.*/ 255"),
        (np.zeros((1, 3, 32, 32), np.float64), "float64, expected float32"),
        (np.full((1, 3, 32, 32), np.nan, np.float32), "NaN or infinity"),
        (np.full((1, 3, 32, 32), np.inf, np.float32), "NaN or infinity"),
        (np.full((1, 3, 32, 32), 200, np.float32), "range from 200 to 200.*divide by 255"),
        (np.full((1, 3, 32, 32), -1, np.float32), "range from -1 to -1"),
        ([[1.0]], "are a list, .*: pass a numpy array"),
        ("photo.jpg", r"are a str, .*predict\(\['photo.jpg'\]\) classifies files"),
        (Image.new("RGB", (32, 32)), r"are a Image, .*predict classifies files, and vitrm\.data\.decoding\.fit"),
    ],
)
def test_refuses_wrong_images(artifact: Path, wrong: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        vitrm.runtime.open(artifact, threads=1).infer(wrong)


def test_refuses_a_depth_that_is_built_in_otherwise(artifact: Path, images: np.ndarray) -> None:
    session = vitrm.runtime.open(artifact, threads=1)
    assert not session.takes_depth
    same = session.infer(images, steps=STEPS, halt_threshold=1.5)  # from 1 on, every threshold means never
    np.testing.assert_array_equal(same.logits, session.infer(images).logits)
    with pytest.raises(UserError, match=r"3 steps built in.*asked for 4.*--steps 4"):
        session.infer(images, steps=4)
    with pytest.raises(UserError, match=r"threshold built in.*never halts.*asked for 0.5"):
        session.infer(images, halt_threshold=0.5)
    for steps in (0, -1, 2.5, True):
        with pytest.raises(UserError, match="steps is"):
            session.infer(images, steps=steps)  # type: ignore[arg-type]


def test_eager_takes_any_depth(run: Path, images: np.ndarray) -> None:
    checkpoint = checkpoints.load(str(run))
    session = EagerSession(checkpoint, steps=2, threads=1)
    assert session.takes_depth
    one, two, five = (session.infer(images, steps=n) for n in (1, 2, 5))
    np.testing.assert_array_equal(session.infer(images).logits, two.logits)
    assert five.steps_used is not None
    assert five.steps_used.tolist() == [5] * 33
    assert np.abs(one.logits - five.logits).max() > 0.1
    halting = session.infer(images, steps=16, halt_threshold=0.5)
    assert halting.steps_used is not None
    assert halting.steps_used.min() < 16
    logits, halt_prob = session.trajectory(images, 5)
    assert logits.shape == (5, 33, 10)
    assert halt_prob.shape == (5, 33)
    np.testing.assert_allclose(logits[1], two.logits, atol=1e-5)


def test_eager_in_bfloat16_is_near(run: Path, images: np.ndarray) -> None:
    checkpoint = checkpoints.load(str(run))
    exact = EagerSession(checkpoint, steps=STEPS, threads=1)
    half = EagerSession(checkpoint, steps=STEPS, threads=1, precision="bf16")
    assert half.metadata.precision == "bf16"
    assert half.size_bytes * 2 == exact.size_bytes
    expected, found = exact.infer(images), half.infer(images)
    assert found.logits.dtype == np.float32
    difference = np.abs(found.logits - expected.logits).max() / np.abs(expected.logits).max()
    assert 1e-3 < difference < 0.2  # bfloat16 has 8 bits: it must show, and not more
    assert found.steps_used is not None
    assert found.steps_used.tolist() == [STEPS] * len(images)


def test_eager_says_the_same_when_compiled(vit_run: Path, images: np.ndarray) -> None:
    checkpoint = checkpoints.load(str(vit_run))  # the smallest model: compiling takes most of the time
    compiled = EagerSession(checkpoint, threads=1, compile=True)
    assert compiled.backend == "torch.compile-cpu"
    result = compiled.infer(images[:2])
    expected = EagerSession(checkpoint, threads=1).infer(images[:2])
    np.testing.assert_allclose(result.logits, expected.logits, atol=1e-4)


def test_every_batch_size_and_depth_is_compiled(run: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    # Inductor takes its time; what gives up silently after 8 batch sizes is Dynamo, which stands before it.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    checkpoint = checkpoints.load(str(run))
    sessions = [EagerSession(checkpoint, steps=1, threads=1, compile=True) for _ in range(2)]
    before = counters["stats"]["unique_graphs"]
    for batch in range(1, 6):  # and two sessions of two depths: more than Dynamo compiles of one function
        for session in sessions:
            for steps in (1, 2):
                session.infer(images[:batch], steps=steps)
                session.infer(images[-batch:], steps=steps)
            assert session.compiled_graphs(batch) == 1
    assert session.compiled_graphs(6) is None
    assert counters["stats"]["unique_graphs"] - before == 5 * len(sessions) * 2
    halting = sessions[0].infer(images[:4], steps=6, halt_threshold=0.5)
    expected = EagerSession(checkpoint, threads=1).infer(images[:4], steps=6, halt_threshold=0.5)
    np.testing.assert_array_equal(halting.steps_used, expected.steps_used)


def test_what_is_not_compiled_is_no_row_of_the_compiler(
    run: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    session = EagerSession(checkpoints.load(str(run)), threads=1, compile=True)
    with pytest.raises(UserError, match="compiled nothing at batch 2"):
        session.infer(images[:2])


def test_code_that_changes_in_the_midst_is_noticed(
    run: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    session = EagerSession(checkpoints.load(str(run)), threads=1, compile=True)
    session.infer(images[:2])
    session.model.double().float()  # Dynamo guards the parameters
    session.model.train()
    with pytest.raises(UserError, match="compiled again in the midst of batch 2"):
        session.infer(images[:2])


def test_float32_is_not_tf32(run: Path, images: np.ndarray) -> None:
    seen: list[tuple[bool, bool]] = []
    before = torch.backends.cudnn.allow_tf32
    assert before, "PyTorch's default has changed: is the switch still needed?"
    with exact_float32():
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        with pytest.raises(ValueError, match="inner"), exact_float32():
            raise ValueError("inner")
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before
    # An eager session computes in there wherever it is: a CPU does not mind.
    session = EagerSession(checkpoints.load(str(run)), threads=1)
    session.model.register_forward_hook(lambda *_: seen.append((torch.backends.cudnn.allow_tf32, False)))
    session.infer(images[:2])
    assert seen == [(False, False)] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_eager_on_a_gpu_says_what_a_cpu_says(run: Path, images: np.ndarray) -> None:
    checkpoint = checkpoints.load(str(run))
    expected = EagerSession(checkpoint, steps=STEPS, threads=1).infer(images).logits
    largest = np.abs(expected).max()
    for limit, how in (
        (1e-4, {}),
        (1e-4, {"cuda_graph": True}),
        (0.2, {"precision": "bf16"}),
        (0.2, {"precision": "autocast-bf16"}),
        (0.05, {"precision": "autocast-fp16"}),
        (0.2, {"precision": "bf16", "cuda_graph": True}),
    ):
        session = EagerSession(checkpoint, steps=STEPS, device="cuda", threads=1, **how)
        found = session.infer(images).logits
        assert np.abs(found - expected).max() < limit * largest, how
        times = session.device_times(images, 3)
        assert times is not None
        assert (times > 0).all()


def test_cuda_where_there_is_none_is_an_error(artifact: Path, run: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(UserError, match=r"device cuda was asked for.*--device cpu"):
        vitrm.runtime.open(artifact, device="cuda")
    with pytest.raises(UserError, match="device cuda was asked for"):
        EagerSession(checkpoints.load(str(run)), device="cuda")
    assert vitrm.runtime.open(artifact, device="auto", threads=1).backend == "onnxruntime-cpu"


@pytest.mark.parametrize(("device", "threads"), [("gpu", None), ("cpu", 0), ("cpu", 1.5)])
def test_refuses_unknown_settings(artifact: Path, device: str, threads: int | None) -> None:
    with pytest.raises(UserError, match=r"expected (cpu, cuda, cuda:N or auto|a whole number)"):
        vitrm.runtime.open(artifact, device=device, threads=threads)


def test_refuses_what_is_no_artifact(artifact: Path, run: Path, tmp_path: Path) -> None:
    whole = artifact.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "text.onnx").write_text("not a model")
    (tmp_path / "engine.plan").write_bytes(b"ftrt")
    (tmp_path / "weights.pt").write_bytes(b"PK")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    for name, message in [
        ("missing.onnx", "does not exist"),
        ("cut.onnx", "may be truncated"),
        ("empty.onnx", "empty.onnx"),
        ("text.onnx", "not a whole ONNX file"),
        ("engine.plan", "no side-car engine.plan.json"),
        ("weights.pt", "export the run with vitrm-export"),
        ("notes.txt", "not an artifact this version knows"),
        ("photo.jpg", "is a picture: vitrm-predict ARTIFACT"),
        (".", "is a folder"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            vitrm.runtime.open(tmp_path / name)
        assert "\n" not in str(caught.value), name
    with pytest.raises(UserError, match=f"run folder.*vitrm-export {run}"):
        vitrm.runtime.open(run)


def test_refuses_metadata_that_is_not_ours(artifact: Path, tmp_path: Path) -> None:
    bare = with_props(artifact, tmp_path / "bare.onnx", **dict.fromkeys([*Metadata.__dataclass_fields__, "sha256"]))
    for source, message in [
        (bare, "not written by vitrm-export"),
        (with_props(artifact, tmp_path / "a.onnx", format="99"), "metadata format 99"),
        (with_props(artifact, tmp_path / "b.onnx", steps=None), "lacks"),
        (with_props(artifact, tmp_path / "c.onnx", steps="{"), "damaged vitrm metadata"),
        (with_props(artifact, tmp_path / "d.onnx", color='"red"'), "unknown"),
        (with_props(artifact, tmp_path / "e.onnx", model='{"kind": "vitrm"}'), "model is .*expected a config"),
        (with_props(artifact, tmp_path / "f.onnx", graph='"spiral"'), "graph is 'spiral', expected one of unrolled"),
    ]:
        with pytest.raises(UserError, match=message):
            vitrm.runtime.open(source)


def test_refuses_a_graph_that_contradicts_its_metadata(vit: Path, tmp_path: Path) -> None:
    # A baseline that claims to be recursive has no halt_prob to give.
    wrong = with_props(vit, tmp_path / "wrong.onnx", graph='"unrolled"')
    with pytest.raises(UserError, match=r"halt_prob.*export it again"):
        vitrm.runtime.open(wrong)


def test_refuses_shapes_that_contradict_the_metadata(artifact: Path, stepwise: Path, tmp_path: Path) -> None:
    model = vitrm.runtime.open(artifact, threads=1).metadata.model
    one = with_props(artifact, tmp_path / "one.onnx", classes='["cat"]')
    with pytest.raises(UserError, match="1 class names for a model of 10 classes"):
        vitrm.runtime.open(one)
    classes = {"classes": json.dumps(["cat", "dog"]), "model": json.dumps({**model, "classes": 2})}
    two = with_props(artifact, tmp_path / "two.onnx", **classes)
    with pytest.raises(
        UserError, match=r"logits is float32 \[batch, 10\] in the graph, and float32 \[batch, 2\] after"
    ):
        vitrm.runtime.open(two)
    sides = {"model": json.dumps({**model, "image_size": 64})}
    sides["preprocessing"] = json.dumps(Preprocessing.square(64).to_dict())
    large = with_props(artifact, tmp_path / "large.onnx", **sides)
    with pytest.raises(
        UserError, match=r"pixel_values is float32 \[batch, 3, 32, 32\] in the graph.*3, 64, 64\] after"
    ):
        vitrm.runtime.open(large)
    (tmp_path / "parts").mkdir()
    for part in ("embed", "step", "heads"):
        with_props(stepwise / f"{part}.onnx", tmp_path / "parts" / f"{part}.onnx", **classes)
    with pytest.raises(UserError, match=r"heads\.onnx: logits is float32 \[batch, 10\]"):
        vitrm.runtime.open(tmp_path / "parts")


def test_opens_and_runs_without_torch(artifact: Path) -> None:
    script = WITHOUT_TORCH + (
        "import numpy, vitrm.runtime\n"
        f"session = vitrm.runtime.open({str(artifact)!r}, threads=1)\n"
        "result = session.infer(numpy.zeros((2, 3, 32, 32), 'float32'))\n"
        "assert result.logits.shape == (2, 10)\n"
        "assert not any(m.split('.')[0] in ('torch', 'torchvision', 'onnx') for m in sys.modules)\n"
        "print('ran')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "ran\n", done.stderr


def test_import_needs_only_numpy_and_the_standard_library() -> None:
    script = (
        "import sys, vitrm.runtime; vitrm.runtime.Session; vitrm.runtime.Metadata\n"
        "heavy = {'torch', 'torchvision', 'onnxruntime', 'onnx', 'sklearn', 'matplotlib', 'rich', 'PIL'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_missing_onnxruntime_names_the_extra(artifact: Path, tmp_path: Path) -> None:
    # An environment without the wheel: neither its package nor its record can be found.
    script = (
        "import importlib.metadata as m, sys\n"
        "sys.modules['onnxruntime'] = None\n"
        "find = m.version\n"
        "def version(name):\n"
        "    if name.startswith('onnxruntime'): raise m.PackageNotFoundError(name)\n"
        "    return find(name)\n"
        "m.version = version\n"
        "from vitrm.runtime.bench.cli import main\n"
        f"sys.exit(main([{str(artifact)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert 'pip install "vitrm[cpu]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_both_onnxruntime_wheels_are_explained(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "onnxruntime_gpu-1.22.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.22.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"onnxruntime .* and onnxruntime-gpu 1.22.0 are both installed.*uninstall"):
        vitrm.runtime.open(artifact)


def test_halting_is_part_of_the_graph(halting: Path, run: Path, images: np.ndarray) -> None:
    session = vitrm.runtime.open(halting, threads=1)
    own = session.metadata
    eager = EagerSession(checkpoints.load(str(run)), steps=own.steps, halt_threshold=own.halt_threshold, threads=1)
    ours, theirs = session.infer(images), eager.infer(images)
    assert ours.steps_used is not None
    assert theirs.steps_used is not None
    assert len(set(ours.steps_used.tolist())) > 1
    # Samples on the threshold itself are decided by rounding.
    clear = (np.abs(eager.trajectory(images, own.steps)[1] - own.halt_threshold) > 1e-4).all(0)
    assert clear.sum() > 30
    assert ours.steps_used[clear].tolist() == theirs.steps_used[clear].tolist()
    np.testing.assert_allclose(ours.logits[clear], theirs.logits[clear], atol=2e-3)


def test_metadata_of_eager_is_the_checkpoints(run: Path) -> None:
    session = EagerSession(checkpoints.load(str(run)), threads=1)
    assert session.metadata.model == to_dict(preset("tiny"))
    assert session.metadata.classes == [str(i) for i in range(10)]
    assert session.size_bytes > 0


def test_a_stepwise_folder_must_be_whole_and_of_one_export(stepwise: Path, artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stepwise"
    shutil.copytree(stepwise, folder)
    with_props(folder / "heads.onnx", folder / "heads.onnx", weights_sha256='"other"')
    with pytest.raises(UserError, match=r"heads\.onnx and .*step\.onnx are not of one export"):
        vitrm.runtime.open(folder)
    shutil.copy(stepwise / "embed.onnx", folder / "heads.onnx")
    with pytest.raises(UserError, match=r"stepwise: heads: inputs .* are not those of a vitrm heads graph"):
        vitrm.runtime.open(folder)
    shutil.copy(artifact, folder / "heads.onnx")
    with pytest.raises(UserError, match="are not of one export"):
        vitrm.runtime.open(folder)
    (folder / "heads.onnx").write_bytes((stepwise / "heads.onnx").read_bytes()[:-50])
    with pytest.raises(UserError, match="may be truncated"):
        vitrm.runtime.open(folder)
    (folder / "heads.onnx").unlink()
    with pytest.raises(UserError, match=r"lacks heads\.onnx: copy the whole folder"):
        vitrm.runtime.open(folder)
