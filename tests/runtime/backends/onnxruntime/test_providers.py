"""ONNX Runtime's providers: an asked-for one that cannot be had is an error, and bound runs say what plain ones do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import vitrm.runtime
from vitrm import data
from vitrm.errors import UserError
from vitrm.runtime.backends.onnxruntime.binding import on_host
from vitrm.runtime.backends.onnxruntime.providers import PROVIDERS, load_onnxruntime
from vitrm.runtime.backends.onnxruntime.session import OnnxRuntimeSession
from vitrm.runtime.backends.onnxruntime.stepwise import StepwiseSession
from vitrm.runtime.bench import cli

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return data.load("digits", "test").floats(slice(0, 33))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("made", ["artifact", "stepwise"])
def test_a_provider_that_cannot_be_had_is_an_error(
    provider: str, made: str, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    path = request.getfixturevalue(made)
    if PROVIDERS[provider] in load_onnxruntime().get_available_providers():
        pytest.skip(f"this onnxruntime has {provider}")
    with pytest.raises(UserError, match=r"was asked for.*pip install .*--device cpu") as caught:
        vitrm.runtime.open(path, device="cuda", provider=provider)
    assert ("device cuda" if provider == "cuda" else f"provider {provider}") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # whatever ONNX Runtime itself has to say


def test_a_provider_is_a_gpus(artifact: Path) -> None:
    with pytest.raises(UserError, match=r"provider tensorrt is for a GPU.*'cpu'"):
        vitrm.runtime.open(artifact, provider="tensorrt")
    with pytest.raises(UserError, match="expected one of cuda, tensorrt, tensorrt-rtx"):
        vitrm.runtime.open(artifact, device="cuda", provider="rocm")


def test_bench_with_a_provider_asks_for_a_gpu(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if PROVIDERS["tensorrt"] in load_onnxruntime().get_available_providers():
        pytest.skip("this onnxruntime has tensorrt")
    assert cli.main([str(artifact), "--provider", "tensorrt"]) == 2
    assert "provider tensorrt was asked for" in capsys.readouterr().err


@pytest.mark.parametrize("made", ["artifact", "loop"])
def test_a_bound_session_says_the_same(made: str, images: np.ndarray, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(made)
    plain, bound = (OnnxRuntimeSession(path, threads=1, bound=b) for b in (False, True))
    for batch in (1, 2, 33):
        run = bound.prepare(images[:batch])
        first, expected = run(), plain.infer(images[:batch])
        kept = first.logits.copy()
        again = run()
        for result in (first, again):
            np.testing.assert_array_equal(result.logits, expected.logits)
            np.testing.assert_array_equal(result.halt_prob, expected.halt_prob)
            np.testing.assert_array_equal(result.steps_used, expected.steps_used)
        bound.infer(images[::-1][:batch])
        np.testing.assert_array_equal(first.logits, kept)  # a result is the caller's: no later run writes into it


@pytest.mark.parametrize("threshold", [2.0, 0.9, 0.85])
def test_a_bound_stepwise_session_says_the_same(stepwise: Path, images: np.ndarray, threshold: float) -> None:
    plain, bound = (StepwiseSession(stepwise, threads=1, bound=b) for b in (False, True))
    expected, found = (s.infer(images, steps=5, halt_threshold=threshold) for s in (plain, bound))
    np.testing.assert_array_equal(found.logits, expected.logits)
    np.testing.assert_array_equal(found.halt_prob, expected.halt_prob)
    assert found.steps_used is not None
    assert expected.steps_used is not None
    assert found.steps_used.tolist() == expected.steps_used.tolist()
    assert (len(set(found.steps_used.tolist())) > 1) == (threshold < 1)


@pytest.mark.parametrize("bound", [False, True])
def test_samples_that_left_come_back(stepwise: Path, images: np.ndarray, bound: bool) -> None:
    """A sample keeps the state it left with: it goes on as if it had been alone."""
    session = StepwiseSession(stepwise, threads=1, bound=bound)
    state = session.start(images)
    active = [state.step(t) for t in (None, 0.9, 0.9, 0.85, 0.9, 2.0, 0.85)]
    assert len(set(active)) > 2
    taken = state.steps_used
    for i in (0, 7, 32):
        alone = session.infer(images[i : i + 1], steps=int(taken[i]), halt_threshold=2.0)
        np.testing.assert_allclose(state.logits[i], alone.logits[0], atol=1e-4)


def test_a_bound_state_stays_where_it_is_computed(stepwise: Path, images: np.ndarray) -> None:
    session = StepwiseSession(stepwise, threads=1, bound=True)
    state = session.start(images)
    state.step()
    assert all(type(v).__name__ == "OrtValue" for v in (*state._state.values(), *state._embedded.values()))
    assert on_host(state._state["y"]).shape[0] == len(images)
    embedded = list(state._embedded.values())
    state.step(2.0)
    assert all(a is b for a, b in zip(state._embedded.values(), embedded, strict=True))  # nobody left: nothing copied


@pytest.mark.parametrize("bound", [False, True])
def test_a_failed_step_leaves_the_state_as_it_was(stepwise: Path, images: np.ndarray, bound: bool) -> None:
    session = StepwiseSession(stepwise, threads=1, bound=bound)
    state = session.start(images[:2])
    state.step()
    before = state.result
    good = state._embedded
    state._embedded = {n: np.zeros((2, 1, 1), np.float32) for n in good}
    with pytest.raises(UserError, match=r"step\.onnx failed"):
        state.step()
    np.testing.assert_array_equal(state.logits, before.logits)
    state._embedded = good
    state.step()
    expected = session.infer(images[:2], steps=2, halt_threshold=2.0)
    np.testing.assert_array_equal(state.logits, expected.logits)


def test_on_a_gpu_every_graph_says_what_the_cpu_says(
    artifact: Path, loop: Path, stepwise: Path, images: np.ndarray
) -> None:
    if PROVIDERS["cuda"] not in load_onnxruntime().get_available_providers():
        pytest.skip("needs onnxruntime-gpu: pip install 'vitrm[gpu]'")
    try:
        vitrm.runtime.open(artifact, device="cuda")
    except UserError as error:
        pytest.skip(f"needs a GPU: {error}")
    for path in (artifact, loop, stepwise):
        expected = vitrm.runtime.open(path).infer(images)
        found = vitrm.runtime.open(path, device="cuda").infer(images)
        np.testing.assert_allclose(found.logits, expected.logits, atol=2e-3)
        np.testing.assert_array_equal(found.steps_used, expected.steps_used)
