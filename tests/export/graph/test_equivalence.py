"""unrolled(S) = loop(S) = stepwise(S) = eager(S): one assembly, three shapes, every depth, threshold and batch."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vitrm.runtime
from vitrm import checkpoint as checkpoints
from vitrm.errors import UserError
from vitrm.export import export

pytestmark = pytest.mark.slow

DEPTHS = (1, 2, 3, 6, 16)
NEVER = st.sampled_from([1.0, 2.0, math.inf])
FINE = 1e-5  # closer to the threshold than this, rounding decides who halts


@pytest.fixture(scope="module")
def images(digits) -> np.ndarray:
    """257 images: the digits, and some of them again."""
    return np.concatenate([digits, digits])[:257]


@pytest.fixture(scope="module")
def trajectory(model, images):
    """Eager's heads after each of 16 steps: logits [16, 257, 10], halt_prob [16, 257]."""
    with torch.no_grad():
        return tuple(t.numpy() for t in model.trajectory(torch.from_numpy(images), max(DEPTHS)))


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory) -> Path:
    """Every shape of one model."""
    folder = tmp_path_factory.mktemp("shapes")
    checkpoint = checkpoints.load(run)
    for steps in DEPTHS:
        export(checkpoint, folder / f"unrolled{steps}.onnx", steps=steps)
    export(checkpoint, folder / "loop.onnx", graph="loop", steps=6)
    export(checkpoint, folder / "stepwise", graph="stepwise", steps=6)
    return folder


@pytest.fixture(scope="module")
def open_shape(folder):
    """Sessions by name, each opened once."""
    sessions: dict[str, vitrm.runtime.Session] = {}

    def open_shape(name: str) -> vitrm.runtime.Session:
        if name not in sessions:
            sessions[name] = vitrm.runtime.open(folder / name, threads=1)
        return sessions[name]

    return open_shape


def check(result, trajectory, rows, steps, threshold):
    """`result` is eager's after at most `steps` steps of the images `rows`."""
    all_logits, halts = (t[:steps, rows] for t in trajectory)
    halted = halts > threshold
    expected = np.where(halted.any(0), halted.argmax(0), steps - 1) + 1
    clear = ~(np.abs(halts - threshold) <= FINE).any(0)
    np.testing.assert_array_equal(result.steps_used[clear], expected[clear])
    last, columns = result.steps_used - 1, np.arange(len(rows))
    np.testing.assert_allclose(result.logits, all_logits[last, columns], atol=1e-4)
    np.testing.assert_allclose(result.halt_prob, halts[last, columns], atol=1e-4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.sampled_from(DEPTHS),
    threshold=st.one_of(st.floats(0, 1, width=32), NEVER),
    batch=st.one_of(st.sampled_from([1, 2, 257]), st.integers(1, 64)),
    seed=st.integers(0, 1000),
)
def test_loop_and_stepwise_equal_eager(open_shape, trajectory, images, steps, threshold, batch, seed):
    rows = np.random.default_rng(seed).permutation(len(images))[:batch]
    for name in ("loop.onnx", "stepwise"):
        result = open_shape(name).infer(images[rows], steps=steps, halt_threshold=threshold)
        check(result, trajectory, rows, steps, threshold)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.sampled_from(DEPTHS), batch=st.integers(1, 64), seed=st.integers(0, 1000))
def test_unrolled_equals_eager(open_shape, trajectory, images, steps, batch, seed):
    rows = np.random.default_rng(seed).permutation(len(images))[:batch]
    check(open_shape(f"unrolled{steps}.onnx").infer(images[rows]), trajectory, rows, steps, 2.0)


@pytest.mark.parametrize("name", ["loop.onnx", "stepwise"])
def test_a_sample_does_not_depend_on_its_batch_mates(open_shape, trajectory, images, name):
    halts = trajectory[1][:6]
    # One at which samples halt at as many different steps as they can, of a model that torch's version drew.
    thresholds = [float(np.quantile(halts, q)) for q in np.arange(0.05, 1, 0.05)]
    threshold = max(thresholds, key=lambda t: len(np.unique(np.where((halts > t).any(0), (halts > t).argmax(0), 5))))
    session, generator = open_shape(name), np.random.default_rng(0)
    together = session.infer(images, steps=6, halt_threshold=threshold)
    assert len(set(together.steps_used.tolist())) > 2
    clear = np.flatnonzero((np.abs(halts - threshold) > FINE).all(0))
    for i in generator.permutation(clear)[:12]:
        alone = session.infer(images[i : i + 1], steps=6, halt_threshold=threshold)
        mates = generator.permutation(len(images))[:30]
        position = int(generator.integers(len(mates)))
        mates[position] = i
        among = session.infer(images[mates], steps=6, halt_threshold=threshold)
        for result, at in ((alone, 0), (among, position)):
            assert result.steps_used[at] == together.steps_used[i]
            np.testing.assert_allclose(result.logits[at], together.logits[i], atol=1e-5)


@pytest.mark.parametrize("name", ["loop.onnx", "stepwise"])
def test_impossible_depths_and_thresholds_are_named(open_shape, images, name):
    session = open_shape(name)
    for steps in (0, -1, True, 1.5):
        with pytest.raises(UserError, match=r"steps is .*, expected a whole number of at least 1"):
            session.infer(images[:2], steps=steps)
    for threshold in (-1.0, -math.inf, math.nan):
        with pytest.raises(UserError, match=r"halt_threshold is .*, expected 0 or more"):
            session.infer(images[:2], halt_threshold=threshold)
    with pytest.raises(UserError, match="the batch is empty"):
        session.infer(images[:0])
    with pytest.raises(UserError, match="steps is 1000000, expected at most 1024"):
        session.infer(images[:2], steps=10**6)
    # The most steps allowed end with the last sample that halts.
    assert session.infer(images[:9], steps=1024, halt_threshold=0.0).steps_used.tolist() == [1] * 9


def test_a_state_is_kept_and_continued(open_shape, trajectory, images):
    session = open_shape("stepwise")
    rows = np.arange(33)
    threshold = float(np.median(trajectory[1][:6, rows].max(0)))
    state, other = session.start(images[rows]), session.start(images[40:44])
    with pytest.raises(UserError, match="no step has been taken yet"):
        _ = state.logits
    advanced = [state.step(threshold) for _ in range(6)]
    check(state.result, trajectory, rows, 6, threshold)
    assert advanced[0] == 33
    assert 0 < advanced[-1] < 33
    kept = state.result
    # The samples that halted go on where they stopped; what was read before does not change.
    for _ in range(max(DEPTHS)):
        other.step()
        before = state.steps_used
        assert state.step(2.0) == 33
        np.testing.assert_array_equal(state.steps_used, before + 1)
        if state.steps_used.max() == max(DEPTHS):
            break
    last = state.steps_used - 1
    np.testing.assert_allclose(state.logits, trajectory[0][last, rows], atol=1e-4)
    np.testing.assert_allclose(state.halt_prob, trajectory[1][last, rows], atol=1e-4)
    assert kept.steps_used.max() == 6
    np.testing.assert_allclose(other.logits, trajectory[0][other.steps_used[0] - 1, 40:44], atol=1e-4)
    assert state.step(math.nan) == 33, "NaN halts none"
    assert state.step(-math.inf) == 0, "every sample has halted"
