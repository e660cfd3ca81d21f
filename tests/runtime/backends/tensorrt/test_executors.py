"""How plans are run: order, waits, bounds, padding, halting and kept states, on a stand-in whose streams work when waited for
(tests/cuda_stand_in.py); the answers are compared with ONNX Runtime's own sessions.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_stand_in import StandInPlan
from small_models import clear_threshold

import vitrm.runtime
from vitrm import data
from vitrm.runtime.artifact.graph_names import PARTS
from vitrm.runtime.backends.tensorrt import session as sessions
from vitrm.runtime.backends.tensorrt import stepwise as stepwise_sessions
from vitrm.runtime.backends.tensorrt.session import TensorRTSession
from vitrm.runtime.backends.tensorrt.stepwise import DeviceStepping, TensorRTStepwiseSession
from vitrm.runtime.session import Result

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return data.load("digits", "test").floats(slice(0, 19))


@pytest.fixture
def plans(stepwise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three "plans", whose runs are ONNX Runtime's."""
    monkeypatch.setattr(stepwise_sessions, "Plan", StandInPlan)
    for part in PARTS:
        shutil.copy(stepwise / f"{part}.onnx", tmp_path / f"{part}.plan")
    return tmp_path


@pytest.fixture
def loop_plan(loop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sessions, "Plan", StandInPlan)
    return Path(shutil.copy(loop, tmp_path / "loop.plan"))


def same(found: Result, expected: Result) -> None:
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-4)
    np.testing.assert_allclose(found.halt_prob, expected.halt_prob, atol=1e-5)
    np.testing.assert_array_equal(found.steps_used, expected.steps_used)


@pytest.mark.parametrize("graphs", [True, False])
def test_stepwise_answers_as_onnxruntime(plans: Path, stepwise: Path, images: np.ndarray, graphs: bool) -> None:
    session = TensorRTStepwiseSession(plans, cuda_graphs=graphs)
    expected = vitrm.runtime.open(stepwise, threads=1)
    early = clear_threshold([expected.infer(images, steps=1).halt_prob])
    for _ in range(2):  # the second time from graphs
        for batch in (1, 8, 19):  # 19 is three runs, the last of them padded
            for steps in (1, 2, 3):
                same(session.infer(images[:batch], steps=steps), expected.infer(images[:batch], steps=steps))
            found = session.infer(images[:batch], steps=6, halt_threshold=early)
            same(found, expected.infer(images[:batch], steps=6, halt_threshold=early))
            assert batch < 19 or len(set(found.steps_used.tolist())) > 1, "no sample halts before another"
    cuda: Any = session.plans["step"].cuda
    assert (cuda.launches > 0) == graphs


def test_a_kept_state_goes_on(plans: Path, stepwise: Path, images: np.ndarray) -> None:
    session, other = TensorRTStepwiseSession(plans), vitrm.runtime.open(stepwise, threads=1)
    early = clear_threshold([other.infer(images[:7], steps=1).halt_prob])
    states = [opened.start(images[:7]) for opened in (session, other)]
    for threshold in (2.0, early, early, 2.0, early):
        for state in states:
            state.step(halt_threshold=threshold)
        same(states[0].result, states[1].result)


def test_a_whole_run_copies_no_state(plans: Path, images: np.ndarray) -> None:
    session = TensorRTStepwiseSession(plans, cuda_graphs=False)
    cuda: Any = session.plans["step"].cuda
    counts = []
    for steps in (1, 6):
        cuda.copied.clear()
        session.infer(images[:4], steps=steps)
        counts.append(len(cuda.copied))
    assert counts == [3, 3]  # images in, logits and halt_prob out


def test_steps_take_turns_and_copy_no_state(plans: Path, images: np.ndarray) -> None:
    session = TensorRTStepwiseSession(plans)
    cuda: Any = session.plans["step"].cuda
    state = session.start(images[:8])
    for _ in range(4):
        state.step()
        cuda.copied.clear()  # the first two steps are captured
    state.step()
    assert len(cuda.copied) == 2  # logits and halt_prob out


def test_regrouping_is_one_batch_of_copies(plans: Path, stepwise: Path, images: np.ndarray) -> None:
    """One copy of each tensor for a run of samples that go on; three rounds where the halted ones may go on, too."""
    for keep, batches in ((False, 1), (True, 3)):
        session, other = TensorRTStepwiseSession(plans), vitrm.runtime.open(stepwise, threads=1)
        cuda: Any = session.plans["step"].cuda
        state, expected = DeviceStepping(session, images[:8], keep=keep), other.start(images[:8])
        moved = len(state._executor.carried.embedded) + len(state._executor.carried.state)
        for rows in (np.arange(8), np.array([1, 3, 6, 7]), np.array([3, 7])):
            cuda.batches.clear()
            found, its = (each._advance(rows) for each in (state, expected))
            np.testing.assert_allclose(found[0], its[0], atol=1e-4)
            if len(rows) == 4:  # 6 and 7 into the slots of 0 and 2
                assert cuda.batches == [2 * moved] * batches
        assert not keep or state._executor._spare is not None
        assert keep or state._executor._spare is None


def test_halting_at_random_keeps_every_state(plans: Path, stepwise: Path, images: np.ndarray) -> None:
    session, other = TensorRTStepwiseSession(plans), vitrm.runtime.open(stepwise, threads=1)
    generator = np.random.default_rng(0)
    for batch in (8, 5, 7):
        states = [opened.start(images[:batch]) for opened in (session, other)]
        for _ in range(12):
            # Any samples may go on, those that have halted longest, too.
            rows = np.sort(generator.permutation(batch)[: generator.integers(1, batch + 1)])
            found, expected = (state._advance(rows) for state in states)
            np.testing.assert_allclose(found[0], expected[0], atol=1e-4)
            np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


def test_contexts_of_an_executor_share_their_scratch(plans: Path, images: np.ndarray) -> None:
    session = TensorRTStepwiseSession(plans)
    for batch in (8, 3):
        for steps in (1, 2, 3):
            session.infer(images[:batch], steps=steps)
            session.infer(images[:batch], steps=steps, halt_threshold=0.5)
    contexts: list[Any] = [c for plan in session.plans.values() for c in plan.contexts]  # type: ignore[attr-defined]
    assert len(contexts) > 8
    blocks = {c.scratch.address: c.scratch.size for c in contexts}
    assert list(blocks.values()) == [8000, 8000]  # one for each executor, as large as its largest profile
    one = TensorRTStepwiseSession(plans)
    one.infer(images[:1], steps=2)
    assert {c.scratch.size for plan in one.plans.values() for c in plan.contexts} == {1000}  # type: ignore[attr-defined]


def test_threads_find_their_executors_again(plans: Path, loop_plan: Path, loop: Path, images: np.ndarray) -> None:
    expected = vitrm.runtime.open(loop, threads=1).infer(images[:3], steps=3)
    opened: list[Any] = [TensorRTStepwiseSession(plans), TensorRTSession(loop_plan)]
    for session in opened:
        parts = list(session.plans.values()) if hasattr(session, "plans") else [session.plan]
        made = []
        for _ in range(2):
            # Six states at once, as with six threads; more than the four that were kept.
            held = [session.executors.take(3) for _ in range(6)]
            for executor in held:
                session.executors.give_back(executor)
            with ThreadPoolExecutor(6) as pool:
                for found in pool.map(lambda _, s=session: s.infer(images[:3], steps=3), range(12)):
                    same(found, expected)
            made.append(sum(len(plan.contexts) for plan in parts))
        assert len(session.executors._all) == 6
        if session.takes_depth and len(parts) == 1:
            assert made == [6, 6]


def test_a_loop_answers_as_onnxruntime(loop_plan: Path, loop: Path, images: np.ndarray) -> None:
    session, expected = TensorRTSession(loop_plan), vitrm.runtime.open(loop, threads=1)
    early = clear_threshold([expected.infer(images, steps=1).halt_prob])
    for batch in (1, 3, 8, 19):
        for depth in ({"steps": 1}, {"steps": 5}, {"steps": 6, "halt_threshold": early}):
            same(session.infer(images[:batch], **depth), expected.infer(images[:batch], **depth))
    assert session.graph_problem(8) == ""
