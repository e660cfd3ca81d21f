"""Opening and running TensorRT plans: what a side-car refuses (real builds, no GPU), and on a GPU, parity everywhere."""

from __future__ import annotations

import ctypes
import gc
import json
import random
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from processes import PATIENCE
from small_models import clear_threshold

import vitrm.runtime
from vitrm import checkpoint as checkpoints
from vitrm import data
from vitrm.errors import UserError
from vitrm.export import export
from vitrm.export.tensorrt.build import build_engine
from vitrm.export.tensorrt.options import PlanOptions
from vitrm.runtime.artifact.plan_sidecar import read_sidecar, rebuild, sidecar_path, write_sidecar
from vitrm.runtime.backends.eager import EagerSession
from vitrm.runtime.backends.tensorrt.api import installed
from vitrm.runtime.backends.tensorrt.check_machine import check_here
from vitrm.runtime.backends.tensorrt.cuda import Cuda, CudaError, Stream, address_of
from vitrm.runtime.backends.tensorrt.executor import ExecutorPool
from vitrm.runtime.backends.tensorrt.plan import choose_profile
from vitrm.runtime.backends.tensorrt.session import TensorRTBase, TensorRTSession, check_steps_used
from vitrm.runtime.backends.tensorrt.stepwise import TensorRTStepwiseSession, prefix, runs_of, swaps
from vitrm.runtime.bench import cli
from vitrm.runtime.halting.store_threshold import store_threshold
from vitrm.runtime.session import Session
from vitrm.runtime.system.gpus import Gpu, Gpus, find_gpus
from vitrm.system import strict_json

GPUS = find_gpus()


without_gpu = pytest.mark.skipif(bool(GPUS.found), reason="this is about machines without a GPU")
ADA = Gpus((Gpu("NVIDIA GeForce RTX 4090", "sm89", 24 << 30),), "13.0")
PROFILES = ((1, 4, 8),)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return data.load("digits", "test").floats(slice(0, 23))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, loop: Path) -> Path:
    """A real plan, for sm89, of the loop."""
    path = tmp_path_factory.mktemp("plans") / "engine.plan"
    options = PlanOptions(gpus=("sm89",), profiles=PROFILES, flavour="rtx")
    return build_engine(loop, path, options, source="runs/mine").path


@pytest.fixture
def plan(built: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    for file in (built, sidecar_path(built)):
        shutil.copy(file, tmp_path / file.name)
    return tmp_path / built.name


def alter(plan: Path, **changes: object) -> None:
    """Other values in the side-car's engine section, and the digest that goes with them."""
    path = sidecar_path(plan)
    values = json.loads(path.read_text())
    del values["sha256"]
    values["engine"] |= changes
    path.write_text(json.dumps({**values, "sha256": strict_json.digest(values)}))


# The side-car -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.rtx
def test_a_plan_for_this_machine_is_accepted(plan: Path) -> None:
    sidecar = read_sidecar(plan)
    assert sidecar.metadata.graph == "loop"
    assert check_here(sidecar, plan, ADA).flavour == "rtx"


REBUILT = "vitrm-export runs/mine --steps 4 --graph loop -o .*engine.plan --batch 1,4,8 --gpu"


@pytest.mark.slow
@pytest.mark.rtx
@pytest.mark.parametrize(
    ("changes", "gpu", "message"),
    [
        ({}, Gpu("NVIDIA A10", "sm86", 1), rf"needs an NVIDIA GPU of sm89, .*; here: an NVIDIA A10 \(sm86\): .*{REBUILT} sm86$"),
        ({"version": "1.6.0.1"}, ADA.found[0], rf"RTX 1\.6\.0\.1, Linux .*; here: TensorRT for RTX 1\..*{REBUILT} sm89$"),
        ({"system": "Windows AMD64"}, ADA.found[0], rf"Windows AMD64; here: Linux .*{REBUILT} sm89$"),
        ({"flavour": "full"}, ADA.found[0], r'needs .* TensorRT 1.*; here: no TensorRT: .*pip install "vitrm\[tensorrt\]"'),
        ({}, Gpu("NVIDIA H100", "sm90", 1), r"H100 \(sm90\); .* builds for sm75, .* alone: use TensorRT"),
        ({"version": "1.6", "system": "Linux riscv64"}, Gpu("NVIDIA A10", "sm86", 1), r"here: an NVIDIA A10 .*, Linux .*, Tens"),
    ],
)  # fmt: skip
def test_a_plan_for_another_machine_is_refused_unopened(plan: Path, changes: dict, gpu: Gpu, message: str) -> None:
    if changes.get("flavour") == "full" and "full" in installed():
        pytest.skip("TensorRT is installed")
    alter(plan, **changes)
    with pytest.raises(UserError, match=message):
        check_here(read_sidecar(plan), plan, Gpus((gpu,), "13.0"))


@pytest.mark.slow
@pytest.mark.rtx
def test_compatible_plans_go_further(plan: Path) -> None:
    sidecar = read_sidecar(plan)
    version = sidecar.engine.version
    newer = replace(sidecar, engine=replace(sidecar.engine, version="1.0.0", flags=["version_compatible"]))
    assert check_here(newer, plan, ADA).version == version
    older = replace(sidecar, engine=replace(sidecar.engine, version="1.99.0", flags=["version_compatible"]))
    with pytest.raises(UserError, match=r"--version-compatible --gpu sm89$"):
        check_here(older, plan, ADA)


@pytest.mark.slow
@pytest.mark.rtx
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: sidecar_path(p).unlink(), r"has no side-car engine\.plan\.json"),
        (lambda p: sidecar_path(p).write_text("{"), "side-car: .* is not valid JSON"),
        (lambda p: sidecar_path(p).write_text("{}"), "its engine section is NoneType"),
        (lambda p: alter(p, flavour="tiny"), "values of other kinds"),
        (lambda p: alter(p, profiles=[[1, 2]]), "values of other kinds"),
        (lambda p: alter(p, profiles=[[1, 2, 1 << 40]]), "values of other kinds"),
        (lambda p: alter(p, version="²"), "values of other kinds"),
        (lambda p: alter(p, gpu_name=7), "values of other kinds"),
        (lambda p: alter(p, flags=["output=/etc/passwd"]), "values of other kinds"),
        (lambda p: alter(p, color="red"), "color"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), r"bytes, its side-car says \d+: it is not whole, .*vitrm-export"),
        (lambda p: p.write_bytes(b"x" + p.read_bytes()[1:]), r"SHA-256 .*was changed after it was built, so it is not opened"),
        (lambda p: p.unlink(), "does not exist"),
    ],
)  # fmt: skip
def test_damaged_plans_are_refused_unopened(plan: Path, damage: object, message: str) -> None:
    damage(plan)  # type: ignore[operator]
    with pytest.raises(UserError, match=message) as caught:
        vitrm.runtime.open(plan)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.rtx
def test_the_rebuild_command_is_one_that_parses(plan: Path) -> None:
    from vitrm.export.cli import parser

    sidecar = read_sidecar(plan)
    words = rebuild(sidecar, plan, "sm86").split()
    args = parser().parse_args(words[1:])
    assert (args.run, args.steps, args.graph, args.output) == ("runs/mine", 4, "loop", plan)
    assert args.batch == [(1, 4, 8)]
    assert args.gpu == [("sm86",)]
    halting = replace(sidecar, metadata=replace(sidecar.metadata, precision="int8", halt_threshold=0.9))
    args = parser().parse_args(rebuild(halting, plan.with_suffix(".onnx")).split()[1:])
    assert (args.precision, args.target, args.halt_threshold) == ("int8", "cpu", 0.9)
    assert args.glimpses is None
    looking = {**sidecar.metadata.model, "glimpses": "mirror"}
    looking = replace(sidecar, metadata=replace(sidecar.metadata, model=looking))
    assert parser().parse_args(rebuild(looking, plan).split()[1:]).glimpses == "mirror"


@pytest.mark.slow
@pytest.mark.rtx
def test_a_threshold_goes_into_the_sidecar(plan: Path) -> None:
    before = plan.read_bytes()
    metadata = store_threshold(plan, 0.8, 5, {"why": "a test"})
    assert read_sidecar(plan).metadata == metadata
    assert (metadata.halt_threshold, metadata.steps) == (0.8, 5)
    assert plan.read_bytes() == before


# Without a GPU ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.rtx
@without_gpu
def test_the_gpu_that_is_missing_is_named(plan: Path, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([str(plan)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert f"error: {plan} needs an NVIDIA GPU of sm89, TensorRT for RTX" in err
    assert "here: no GPU (" in err
    assert "export for this one: vitrm-export runs/mine --steps 4 --graph loop -o" in err
    code = cli.main([str(artifact), str(plan), "--limit", "8", "--batch", "1", "--seconds", "0.05", "--no-eager"])
    out, err = capsys.readouterr()
    assert code == 2  # one of the two could not be measured
    assert "tiny.onnx" in out
    assert "engine.plan could not be measured" in err


@pytest.mark.slow
@pytest.mark.rtx
@without_gpu
def test_the_file_that_a_plan_was_built_from_is_what_runs_here(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, copy = read_sidecar(plan), tmp_path / "mine.plan"
    copy.write_bytes(plan.read_bytes())
    write_sidecar(replace(found, engine=replace(found.engine, source="mine.onnx")), sidecar_path(copy))
    assert cli.main([str(copy)]) == 2
    assert "or here the file it was built from, mine.onnx" in capsys.readouterr().err


@without_gpu
@pytest.mark.slow
@pytest.mark.rtx
def test_tensorrt_itself_is_asked_last(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a machine whose driver is too old for this TensorRT: the driver lists a GPU, TensorRT finds none.
    monkeypatch.setattr("vitrm.runtime.backends.tensorrt.plan.find_gpus", lambda: ADA)
    with pytest.raises(CudaError, match="CUDA failed while choosing GPU 0: "):
        TensorRTSession(plan)
    monkeypatch.setattr(Cuda, "use", lambda self: None)  # as where CUDA serves it and TensorRT does not
    with pytest.raises(
        UserError, match=r"TensorRT for RTX .* could not open .*engine\.plan: .*; build it again: vitrm-export"
    ):
        TensorRTSession(plan)


@without_gpu
def test_cuda_says_what_it_was_doing() -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    cuda = Cuda()
    with pytest.raises(CudaError, match=r"CUDA failed while choosing GPU 0: .+ \(\d+\)"):
        cuda.allocate(16)
    with pytest.raises(CudaError, match="CUDA failed while allocating 16 bytes of pinned memory"):
        cuda.pinned([4], np.float32)
    with pytest.raises(CudaError, match="CUDA failed while copying"):
        cuda.copy_all([(4096, 8192, 16), (12288, 16384, 16)], Stream(4096, lambda handle: None))
    assert not cuda.batches_copies  # the bindings took the call, and without a driver it is tried one by one


class RecordingRuntime:
    """Stands in for cuda.bindings.runtime: it proves which thread asks for which GPU, and that before anything else."""

    def __init__(self) -> None:
        self.calls: dict[int, list[str]] = {}
        self.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __getattr__(self, name: str) -> object:
        def call(*arguments: object) -> tuple[int, int]:
            said = f"cudaSetDevice {arguments[0]}" if name == "cudaSetDevice" else name
            self.calls.setdefault(threading.get_ident(), []).append(said)
            return (0,) if name == "cudaSetDevice" else (0, 4096)  # type: ignore[return-value]

        return call


def test_every_thread_chooses_the_gpu_itself() -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    cuda, runtime = Cuda(1), RecordingRuntime()
    cuda._api = runtime
    with ThreadPoolExecutor(2) as pool:
        barrier = threading.Barrier(2)

        def work(_: int) -> list[object]:
            barrier.wait(PATIENCE)
            return [cuda.allocate(16), cuda.stream()]

        kept = list(pool.map(work, range(2)))
    assert len(runtime.calls) == 2
    for calls in runtime.calls.values():
        assert calls == ["cudaSetDevice 1", "cudaMalloc", "cudaSetDevice 1", "cudaStreamCreateWithFlags"]
    assert len(kept) == 2


def test_nothing_is_collected_while_a_graph_is_captured() -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    cuda = Cuda()
    cuda._api = RecordingRuntime()
    stream = Stream(4096, lambda handle: None)
    seen = []
    assert gc.isenabled()
    cuda.capture(stream, lambda: seen.append(gc.isenabled()))
    with pytest.raises(CudaError, match="could not capture"):
        cuda.capture(stream, lambda: seen.append(gc.isenabled()) or 1 / 0)  # type: ignore[func-returns-value]
    assert seen == [False, False]
    assert gc.isenabled()


def test_an_address_is_read_as_the_bindings_want_it(recwarn: pytest.WarningsRecorder) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    assert address_of(runtime.cudaStream_t(4096)) == 4096
    assert address_of(4096) == 4096
    assert not recwarn.list


@pytest.mark.slow
@pytest.mark.rtx
def test_a_plan_is_opened_on_the_gpu_that_is_named(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = Gpus((Gpu("NVIDIA A10", "sm86", 1), *ADA.found), "13.0")
    monkeypatch.setattr("vitrm.runtime.backends.tensorrt.plan.find_gpus", lambda: two)
    assert check_here(read_sidecar(plan), plan, two, 1).flavour == "rtx"
    with pytest.raises(UserError, match=r"here: an NVIDIA A10 \(sm86\)"):
        vitrm.runtime.open(plan, device="cuda:0")
    with pytest.raises(UserError, match="device cuda:2 was asked for, but there are 2 GPUs"):
        vitrm.runtime.open(plan, device="cuda:2")
    if not GPUS.found:
        with pytest.raises(CudaError, match="CUDA failed while choosing GPU 1"):  # it fits, and is not there
            vitrm.runtime.open(plan, device="cuda:1")


@pytest.mark.slow
@pytest.mark.rtx
def test_the_runtime_of_plans_needs_no_torch(plan: Path) -> None:
    script = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "import vitrm.runtime, vitrm.runtime.backends.tensorrt.stepwise, vitrm.runtime.backends.tensorrt.session\n"
        f"try: vitrm.runtime.open({str(plan)!r})\n"
        "except vitrm.runtime.artifact.plan_sidecar.UserError as error: print(error)\n"
        "assert not any(m.split('.')[0] in ('onnx', 'onnxruntime') for m in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    if not GPUS.found:
        assert "needs an NVIDIA GPU of sm89" in done.stdout


def test_a_driver_is_asked_without_packages() -> None:
    if GPUS.found:
        assert all(gpu.sm.startswith("sm") and gpu.memory_bytes > 1 << 28 for gpu in GPUS.found)
        return
    assert GPUS.problem
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        assert "no NVIDIA driver" in GPUS.problem


# What a batch runs on -----------------------------------------------------------------------------


def test_a_batch_finds_its_profile() -> None:
    profiles = [[1, 1, 1], [4, 8, 64], [2, 4, 16]]
    assert choose_profile(profiles, 1) == (0, 1)
    assert choose_profile(profiles, 2) == (2, 2)
    assert choose_profile(profiles, 8) == (2, 8)  # the tighter of two
    assert choose_profile(profiles, 17) == (1, 17)
    assert choose_profile([[8, 8, 8]], 3) == (0, 8)
    with pytest.raises(ValueError, match="no profile takes 65"):
        choose_profile(profiles, 65)


def test_a_batch_is_cut_into_runs_and_padded() -> None:
    session = TensorRTBase()
    session.profiles, session.largest, session.notes = [[2, 4, 8]], 8, ("a note",)
    pieces = session._pieces(17)
    assert [(p.start, p.stop, padded) for p, padded in pieces] == [(0, 8, 8), (8, 16, 8), (16, 17, 2)]
    assert session.notes_at(8) == ("a note",)
    assert session.notes_at(17)[1] == "built for at most 8 images: a batch of 17 is 3 runs"
    assert "costs as much" in session.notes_at(1)[1]


def test_lanes_are_kept_for_the_sizes_used_last() -> None:
    class Executor:
        device_bytes = 10

        def __init__(self, batch: int) -> None:
            self.batch = batch
            made.append(batch)

    made: list[int] = []
    executors: ExecutorPool[Executor] = ExecutorPool(Executor, keep=2)
    for batch in (1, 2, 1, 1):
        with executors.borrow(batch):
            pass
    assert made == [1, 2]
    with executors.borrow(1) as first, executors.borrow(1) as second:  # two threads at once
        assert first is not second
    assert made == [1, 2, 1]
    for _ in range(2):  # as many as were in use at once are kept
        with executors.borrow(1), executors.borrow(1), executors.borrow(2):
            pass
    assert made == [1, 2, 1]
    with executors.borrow(3):
        pass
    assert made == [1, 2, 1, 3]
    with executors.borrow(2):  # those of 2 went, unused for longest
        assert made == [1, 2, 1, 3, 2]
    with pytest.raises(ValueError, match="broken"), executors.borrow(3):
        raise ValueError("broken")
    before = len(made)
    with executors.borrow(3):  # what failed is not used again
        assert len(made) == before + 1


def test_swaps_bring_the_active_samples_to_the_front() -> None:
    generator = random.Random(0)
    for _ in range(200):
        count = generator.randint(1, 12)
        slots = np.array(generator.sample(range(count), count))
        rows = np.array(sorted(generator.sample(range(count), generator.randint(1, count))))
        order, held = slots.copy(), slots.copy()
        pairs = swaps(order, rows)
        for a, b, length in runs_of(pairs):  # what the executor does with the slots' contents
            assert length <= count // 2
            held[a : a + length], held[b : b + length] = held[b : b + length].copy(), held[a : a + length].copy()
        np.testing.assert_array_equal(held, order)
        assert set(held[: len(rows)]) == set(rows)
        assert len(pairs) <= min(len(rows), count - len(rows))


def test_a_step_runs_on_few_sizes() -> None:
    assert [prefix(n, 100, [[1, 8, 128]]) for n in (1, 2, 3, 5, 64, 65, 100)] == [1, 2, 4, 8, 64, 100, 100]
    assert prefix(1, 8, [[4, 8, 8]]) == 4


def test_one_iteration_too_many_is_noticed() -> None:
    check_steps_used(np.array([1, 6, 3]), 6, fixed=False, name="a")
    check_steps_used(np.array([6, 6]), 6, fixed=True, name="a")
    for used, fixed in (([7], False), ([0], False), ([5, 6], True), ([7], True)):
        with pytest.raises(UserError, match=r"a took .* steps, expected .*6: this TensorRT counts"):
            check_steps_used(np.array(used), 6, fixed=fixed, name="a")


# On a GPU -----------------------------------------------------------------------------------------

LIMITS = {"fp32": 1e-3, "fp16": 3e-2, "int8": 0.1}  # of the largest logit


@pytest.fixture(scope="module")
def plans(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Every graph and precision, for the GPU here."""
    folder = tmp_path_factory.mktemp("gpu")
    checkpoint = checkpoints.load(str(run))
    engine = PlanOptions(profiles=((1, 1, 1), (2, 4, 8)))
    made = {}
    for graph in ("unrolled", "loop", "stepwise"):
        for precision in LIMITS:
            name = f"{graph}-{precision}" + ("" if graph == "stepwise" else ".plan")
            exported = export(checkpoint, folder / name, steps=4, graph=graph, precision=precision, plan=engine)
            assert exported.plan_verified
            made[graph, precision] = exported.path
    return made


def agree(session: Session, run: Path, images: np.ndarray, precision: str, **settings: object) -> None:
    """The session's answers are eager's, within the precision's limit."""
    eager = EagerSession(checkpoints.load(str(run)), steps=4, threads=1)
    expected, found = eager.infer(images, **settings), session.infer(images, **settings)  # type: ignore[arg-type]
    limit = LIMITS[precision]
    assert np.abs(found.logits - expected.logits).max() <= limit * max(1, np.abs(expected.logits).max())
    assert found.halt_prob is not None
    assert expected.halt_prob is not None
    assert np.abs(found.halt_prob - expected.halt_prob).max() <= max(limit, 1e-3)
    np.testing.assert_array_equal(found.steps_used, expected.steps_used)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", list(LIMITS))
@pytest.mark.parametrize("graph", ["unrolled", "loop", "stepwise"])
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_agrees_with_eager_at_every_depth(plans, run, images, graph, precision, cuda_graphs) -> None:
    kind = TensorRTStepwiseSession if graph == "stepwise" else TensorRTSession
    session = kind(plans[graph, precision], cuda_graphs=cuda_graphs)
    assert "cuda" in session.backend
    for batch in (1, 2, 5, 8, 23):  # 23: in three runs
        agree(session, run, images[:batch], precision)
        agree(session, run, images[:batch], precision)  # and as a graph
        if session.takes_depth:
            for steps in (1, 2, 6):
                agree(session, run, images[:batch], precision, steps=steps)
    assert session.device_bytes
    times = session.device_times(images[:8], 5)
    assert times is not None
    assert (times > 0).all()
    if graph == "unrolled" and cuda_graphs:
        assert session.graph_problem(8) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["loop", "stepwise"])
def test_halts_where_eager_does(plans, run, images, graph) -> None:
    session = vitrm.runtime.open(plans[graph, "fp32"])
    eager = EagerSession(checkpoints.load(str(run)), steps=4, threads=1)
    _, halts = eager.trajectory(images, 4)
    threshold = clear_threshold(halts)
    agree(session, run, images, "fp32", halt_threshold=threshold)
    used = session.infer(images, halt_threshold=threshold).steps_used
    assert used is not None
    assert used.max() <= 4


@pytest.mark.gpu
def test_a_kept_state_goes_on(plans, run, images) -> None:
    session = vitrm.runtime.open(plans["stepwise", "fp32"])
    assert isinstance(session, TensorRTStepwiseSession)
    first, second = session.start(images[:5]), session.start(images[5:10])
    eager = EagerSession(checkpoints.load(str(run)), threads=1)
    logits, _ = eager.trajectory(images[:10], 6)
    for threshold in (None, 0.3, 0.6, None, 0.8):
        first.step(threshold)
        second.step()
    for state, some in ((first, logits[:, :5]), (second, logits[:, 5:])):
        expected = some[state.steps_used - 1, np.arange(5)]
        np.testing.assert_allclose(state.logits, expected, atol=1e-3 * np.abs(expected).max())
    with pytest.raises(UserError, match="takes at most 8 images in one state"):
        session.start(images[:9])


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["unrolled", "loop", "stepwise"])
def test_threads_and_views_do_not_disturb_each_other(plans, images, graph) -> None:
    session = vitrm.runtime.open(plans[graph, "fp16"])
    views = [session.at(steps=s) for s in (1, 2, 4)] if session.takes_depth else [session] * 3
    expected = [[view.infer(images[:b]).logits for b in (1, 3, 8)] for view in views]

    def work(seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(40):
            view, batch = generator.randrange(3), generator.randrange(3)
            found = views[view].infer(images[: (1, 3, 8)[batch]]).logits
            np.testing.assert_array_equal(found, expected[view][batch])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


@pytest.mark.gpu
def test_a_plan_without_weights_takes_them_from_beside_it(plans, artifact, run, images, tmp_path) -> None:
    options = PlanOptions(profiles=((1, 4, 8),), strip_weights=True)
    built = build_engine(artifact, tmp_path / "thin.plan", options)
    whole = build_engine(artifact, tmp_path / "whole.plan", replace(options, strip_weights=False))
    assert built.bytes < whole.bytes
    thin = vitrm.runtime.open(built.path)
    np.testing.assert_allclose(
        thin.infer(images).logits, vitrm.runtime.open(whole.path).infer(images).logits, atol=1e-3
    )
    (tmp_path / "thin.plan.onnx").unlink()
    with pytest.raises(UserError, match=r"holds no weights and .*thin\.plan\.onnx is not there"):
        vitrm.runtime.open(built.path)
