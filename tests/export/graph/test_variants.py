"""The block's other forms (cross mixing, an MLP over tokens, a whitened tokenizer, glimpses), by every road that the paper's takes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest
import torch
from int8_by_hand import simulated
from small_models import skip_if_float16_is_cut

import vitrm.runtime
from vitrm import checkpoint as checkpoints
from vitrm.calib.calibration import calibrate
from vitrm.calib.sites import ROLES
from vitrm.data import load
from vitrm.export import export
from vitrm.export.tensorrt.build import build_engine
from vitrm.export.tensorrt.options import PlanOptions
from vitrm.runtime.backends.onnxruntime.session import cuts_float16
from vitrm.training.cli import main

pytestmark = pytest.mark.slow

STEPS = 3
GRAPHS = ("unrolled", "loop", "stepwise")
VARIANTS = {
    "cross": {"mixing": "cross", "n": 2},
    "mlp": {"token_mixer": "mlp", "recursions": 2, "n": 1},
    "cross, mlp, whitened": {
        "mixing": "cross",
        "token_mixer": "mlp",
        "tokenizer": "whitened",
        "stage_widths": (8, 8, 8),
        "n": 1,
    },
    "joint, glimpses": {"glimpses": "mirror", "n": 1},
    "cross, whitened, glimpses": {
        "glimpses": "shift",
        "mixing": "cross",
        "tokenizer": "whitened",
        "stage_widths": (8, 8, 8),
        "n": 1,
    },
}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def checkpoint(request, tmp_path_factory):
    """Trained, for seconds: int8's noise in a random model of this kind goes beyond what verification lets through."""
    out = tmp_path_factory.mktemp("runs") / "variant"
    settings = {**request.param, "epochs": 8, "batch_size": 64}
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", _word(value))]
    fixed = ["--data", "digits", "--model", "tiny", "--recipe", "fast", "--device", "cpu", "--threads", "1"]
    assert main([*fixed, *flags, "--out", str(out)]) == 0
    return checkpoints.load(out)


def _word(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.fixture(scope="module")
def calibration(checkpoint):
    return calibrate(checkpoint, STEPS, images=load("digits", "train").take(slice(0, 70)))


@pytest.fixture(scope="module")
def made(checkpoint, calibration, tmp_path_factory):
    """Every layout at every precision; each has been verified against eager, or it would not be there."""
    folder, files = tmp_path_factory.mktemp("variants"), {}
    for precision, target in (("fp32", None), ("fp16", None), ("int8", "cpu"), ("int8", "tensorrt")):
        if target == "tensorrt" and cuts_float16(onnxruntime.__version__):
            continue  # these numbers are beyond what an export lets pass
        for graph in GRAPHS:
            name = f"{graph}-{precision}-{target}" + ("" if graph == "stepwise" else ".onnx")
            int8 = {"target": target, "calibration": calibration} if target else {}
            found = export(checkpoint, folder / name, steps=STEPS, graph=graph, precision=precision, **int8)
            files[graph, precision, target] = found.path
    return files


@pytest.fixture(scope="module")
def images():
    return load("digits", "validation").floats(slice(0, 40))


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_layout_equals_eager(made, checkpoint, images, graph):
    model = checkpoint.build()
    with torch.no_grad():
        logits, halts = (t.numpy() for t in model.trajectory(torch.from_numpy(images), STEPS))
    session = vitrm.runtime.open(made[graph, "fp32", None])
    np.testing.assert_allclose(session.infer(images).logits, logits[-1], atol=1e-4)
    half = vitrm.runtime.open(made[graph, "fp16", None]).infer(images)
    assert np.abs(half.logits - logits[-1]).max() < 0.02 * np.abs(logits[-1]).max()
    if graph == "unrolled":
        return
    # Between two samples' chances of the first step, so that rounding decides nothing.
    ordered = np.sort(halts[0])
    gap = int(np.argmax(np.diff(ordered[10:30]))) + 10
    threshold = float((ordered[gap] + ordered[gap + 1]) / 2)
    halting = session.infer(images, halt_threshold=threshold)
    halted = halts > threshold
    clear = (np.abs(halts - threshold) > 1e-5).all(0)
    expected = np.where(halted.any(0), halted.argmax(0), STEPS - 1) + 1
    np.testing.assert_array_equal(halting.steps_used[clear], expected[clear])
    np.testing.assert_allclose(halting.logits[clear], logits[expected - 1, np.arange(40)][clear], atol=1e-4)


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_int8_rounds_where_it_should(made, checkpoint, calibration, images, graph, target):
    skip_if_float16_is_cut(target)
    expected = simulated(checkpoint, calibration, images, target, shared=graph != "unrolled")
    with torch.no_grad():
        exact = checkpoint.build()(torch.from_numpy(images), STEPS).logits.numpy()
    found = vitrm.runtime.open(made[graph, "int8", target]).infer(images).logits
    rounding = np.abs(expected - exact).max(1)
    assert rounding.max() > 1e-2, "int8 must leave a trace"
    difference = np.abs(found - expected).max(1)
    # Around its matmuls int8 for TensorRT is float16, which rounds too, as far as fp16 files may differ.
    limit = 0.15 * rounding.mean() if target == "cpu" else rounding.mean() + 0.02 * np.abs(exact).max()
    assert np.median(difference) < limit


def test_every_linear_layer_of_the_block_is_calibrated_in_each_role(checkpoint, calibration):
    layers = {f"block.{n}" for n, m in checkpoint.build().block.named_modules() if isinstance(m, torch.nn.Linear)}
    met = {site.layer for site in calibration.ranges if not site.of_tokenizer}
    assert met == layers
    assert {site.role for site in calibration.ranges} <= set(ROLES)


@pytest.mark.rtx
def test_tensorrt_builds_them(made, tmp_path):
    options = PlanOptions(gpus=("sm89",), profiles=((1, 4, 8),), flavour="rtx")
    sources = [
        made[graph, precision, target]
        for graph in GRAPHS
        for precision, target in (("fp32", None), ("fp16", None), ("int8", "tensorrt"))
    ]
    with ThreadPoolExecutor(2) as pool:  # the builds are processes of their own
        built = list(
            pool.map(lambda s: build_engine(s, tmp_path / f"{s.stem}{'' if s.is_dir() else '.plan'}", options), sources)
        )
    assert all(plan.path.exists() for plan in built)
