"""Workers: cores that share a batch learn what one computation of it learns, in whatever order they are ready."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time

import pytest
import torch
from small_learners import make_batch, make_learner
from small_models import small

from vitrm import checkpoint
from vitrm.config import preset
from vitrm.training.parallel.compilation import compile_learner
from vitrm.training.parallel.cpu_workers import LEAST, Workers, worthwhile
from vitrm.training.parallel.device import workers_for
from vitrm.training.teachers.distillation import Teacher

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
CONV = preset("tiny", dim=16, heads=2, layers=2, latents=2, n=1, tokenizer="conv", conv_norm=True)
RECIPES = {
    "joint": {},
    "free steps": {"free_steps": 2},
    "sequential": {"supervision": "sequential", "n_sup": 3, "halt_threshold": 1.0},
    "unclipped": {"clip_norm": 0.0},
}


def learn(config, workers, updates=1, **changes):
    learner = make_learner(config, workers=workers, **changes)
    free = changes.get("free_steps", 0)
    return learner, [learner.train_step(make_batch(), 1e-3, free) for _ in range(updates)]


def assert_same(a, b, tolerance=1e-3):
    """Losses, gradients of the last update (by their norm, as rounding decides single ones) and batch norm's statistics.

    Not the weights: AdamW's first steps are of one size, even where a gradient is nothing but rounding.
    """
    (one, of_one), (two, of_two) = a, b
    for x, y in zip(of_one, of_two, strict=True):
        assert len(x.losses) == len(y.losses)
        torch.testing.assert_close(torch.stack(x.losses), torch.stack(y.losses), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(x.halt, y.halt, atol=1e-4, rtol=1e-4)
        assert int(x.correct) == int(y.correct)
        assert x.updates == y.updates
    for (name, parameter), other in zip(one.model.named_parameters(), two.model.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            scale = max(float(parameter.grad.norm()), 1e-4 * parameter.numel() ** 0.5)
            difference = float((parameter.grad - other.grad).norm())
            assert difference < tolerance * scale, name
    for model, other in ((one.model, two.model), (one.ema.model, two.ema.model)):
        for (name, buffer), its in zip(model.named_buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(
                its, buffer, atol=tolerance / 50, rtol=tolerance / 5, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("changes", RECIPES.values(), ids=RECIPES.keys())
def test_three_workers_of_unequal_parts_learn_what_one_computation_does(changes):
    # Sequential steps each begin where the update before has led, with its rounding.
    tolerance = 0.05 if changes.get("n_sup") else 1e-3
    assert_same(learn(CONV, None, **changes), learn(CONV, Workers(3), **changes), tolerance)


@pytest.mark.slow
def test_a_baseline_and_a_distilled_model_too():
    assert_same(learn(preset("resnet18"), None), learn(preset("resnet18"), Workers(2)))
    airbench = small("airbench")  # its batch norms have no scale, and one convolution no gradient
    assert_same(learn(airbench, None), learn(airbench, Workers(2)))
    teacher = Teacher(checkpoint.load("nano-cifar10"), torch.device("cpu"), steps=1)
    changes = {"teacher": teacher, "distill_weight": 0.5}
    assert_same(learn(CONV, None, **changes), learn(CONV, Workers(2), **changes))


def test_in_bfloat16_the_replicas_matrices_alone_are_cast():
    learner, found = learn(CONV, Workers(2), bf16=True)
    kinds = {name: p.dtype for name, p in learner.replicas[0].model.named_parameters()}
    assert kinds["block.0.q.weight"] == kinds["tokenizer.convs.0.weight"] == torch.bfloat16
    assert kinds["block.0.norm1.weight"] == kinds["pos"] == torch.float32
    assert {p.dtype for p in learner.model.parameters()} == {torch.float32}
    _, expected = learn(CONV, None, bf16=True)
    torch.testing.assert_close(torch.stack(found[0].losses), torch.stack(expected[0].losses), atol=0.02, rtol=0.02)
    learner.replicas[1].refresh()
    assert torch.equal(learner.replicas[1].model.block[0].q.weight, learner.model.block[0].q.weight.bfloat16())


def test_the_result_does_not_depend_on_who_is_ready_first():
    runs = []
    for slow in (0, 2):
        learner = make_learner(CONV, workers=Workers(3))
        tokens = learner.functions[slow].tokens

        def slowly(images, tokens=tokens):
            time.sleep(0.05)
            return tokens(images)

        learner.functions[slow].tokens = slowly
        for _ in range(2):
            learner.train_step(make_batch(), 1e-3)
        runs.append(learner.model.state_dict())
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


def test_an_error_in_one_worker_ends_the_others_and_the_next_batch_works():
    workers = Workers(3)

    def work(worker):
        if worker == 1:
            raise ZeroDivisionError("in worker 1")
        return workers.all_gather(torch.tensor(worker))

    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="in worker 1"):
            workers.map(work)
    assert workers.map(lambda worker: [int(v) for v in workers.all_gather(torch.tensor(worker))]) == [[0, 1, 2]] * 3


def test_gathering_again_and_again_mixes_nothing_up():
    workers = Workers(3)

    def work(worker):
        return [[int(v) for v in workers.all_gather(torch.tensor(100 * i + worker))] for i in range(200)]

    assert workers.map(work) == [[[100 * i, 100 * i + 1, 100 * i + 2] for i in range(200)]] * 3


def test_a_worker_has_its_own_threads_and_the_caller_keeps_his():
    before = torch.get_num_threads()
    names = Workers(2, 1).map(lambda _: (threading.current_thread().name, torch.get_num_threads()))
    assert {threads for _, threads in names} == {1}
    assert all(name.startswith("worker") for name, _ in names)
    assert torch.get_num_threads() == before


def test_when_workers_are_worth_it():
    assert [worthwhile(threads, 64) for threads in (1, 2, 4, 32)] == [1, 2, 4, 64 // LEAST]
    model, cpu = make_learner(CONV).model, torch.device("cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        workers = workers_for(model, cpu, 64, 1)
        assert workers is not None
        assert workers.count == 2
        assert workers_for(model, cpu, 64, 2) is None
        assert workers_for(model, cpu, LEAST, 1) is None
        assert workers_for(model, torch.device("cuda"), 64, 1) is None
        assert workers_for(make_learner(preset("tiny", dropout=0.1)).model, cpu, 64, 1) is None
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
@pytest.mark.skipif(TORCH < (2, 10), reason="torch 2.9 does not compile in two threads at once")
def test_compiled_workers_learn_the_same():
    model = dataclasses.replace(CONV, layers=1)
    eager, compiled = make_learner(model), make_learner(model, workers=Workers(2))
    said: list[str] = []
    assert compile_learner(compiled, 32, 8, said.append)
    assert not said
    for _ in range(2):
        a, b = eager.train_step(make_batch(), 1e-3), compiled.train_step(make_batch(), 1e-3)
        torch.testing.assert_close(torch.stack(a.losses), torch.stack(b.losses), atol=1e-4, rtol=1e-4)
