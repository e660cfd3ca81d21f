"""torch.compile while training: the same learning, and a run that goes on where it does not work; how a process starts."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch
from small_learners import make_batch, make_learner

from vitrm.config import preset
from vitrm.training import cli
from vitrm.training.parallel import compilation
from vitrm.training.parallel.compilation import compile_learner
from vitrm.training.parallel.device import Execution

MODEL = preset("tiny", dim=16, heads=2, layers=1, latents=2, n=1, tokenizer="conv", conv_norm=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_a_compiled_learner_learns_what_an_eager_one_does():
    # One step, as the paper's recipe has it; several are tested in workers (test_workers.py).
    said: list[str] = []
    eager, compiled = (make_learner(MODEL, n_sup=1) for _ in range(2))
    assert compile_learner(compiled, 32, 8, said.append)
    assert not said
    for key, tensor in compiled.model.state_dict().items():
        assert torch.equal(tensor, eager.model.state_dict()[key]), f"the trial left a trace in {key}"
    for _ in range(2):
        a, b = eager.train_step(make_batch(), 1e-3), compiled.train_step(make_batch(), 1e-3)
        torch.testing.assert_close(torch.stack(a.losses), torch.stack(b.losses), atol=1e-4, rtol=1e-4)
    assert compiled.updates == 2


@pytest.mark.slow
def test_without_a_compiler_training_goes_on_uncompiled():
    from torch._inductor import config

    torch._dynamo.reset()
    said: list[str] = []
    learner = make_learner(MODEL)
    step = learner.functions[0].recur
    with config.patch({"force_disable_caches": True, "cpp.cxx": ("no-such-compiler",)}):
        assert not compile_learner(learner, 32, 7, said.append)
    assert learner.functions[0].recur == step
    assert len(said) == 1
    assert said[0].startswith("torch.compile does not work here")
    assert learner.train_step(make_batch(), 1e-3).updates == 1


@pytest.mark.parametrize(
    ("flags", "on"), [([], {"cuda": (True, False), "cpu": (False, False)}), (["--compile"], {"cuda": (True, True), "cpu": (True, True)}),
                      (["--no-compile"], {"cuda": (False, False), "cpu": (False, False)})]
)  # fmt: skip
def test_a_gpu_compiles_unless_told_otherwise(flags: list[str], on: dict[str, tuple[bool, bool]]) -> None:
    given = cli.parser().parse_args(flags)
    execution = Execution(compile=getattr(given, "compile", None))
    for name, expected in on.items():
        assert tuple(execution.compiles(torch.device(name), processes) for processes in (1, 2)) == expected


def test_no_model_is_left_uncompiled_because_there_are_many() -> None:
    # Dynamo keeps eight forms of a function's code, of all models together, and leaves the ninth as it is without a word.
    from torch._dynamo import utils

    made = []
    for _ in range(6):
        compilation._make_room(2)
        utils.counters.clear()
        layers = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)]
        for layer in layers:
            compiled = torch.compile(layer.forward, backend="eager", dynamic=False)
            for rows in (1, 2):
                compiled(torch.zeros(rows, 2)).sum().backward()
        made.append(utils.counters["stats"]["unique_graphs"])
    assert made == [4] * 6


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="large pages are asked of glibc")
@pytest.mark.parametrize("before", ["", "glibc.malloc.check=0"])
def test_the_process_starts_anew_once_with_what_glibc_and_openmp_read_first(before):
    script = (
        "import os; from vitrm.training.parallel.process_tuning import start_anew_tuned; print('start'); start_anew_tuned();"
        "print(os.environ['GLIBC_TUNABLES'], os.environ['GOMP_SPINCOUNT'])"
    )
    environment = {**os.environ, "GLIBC_TUNABLES": before, "GOMP_SPINCOUNT": "77", "PYTHONUNBUFFERED": "1"}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, text=True, capture_output=True, check=True)
    tunables = f"{before}:glibc.malloc.hugetlb=1".lstrip(":")
    assert ended.stdout.splitlines() == ["start", "start", f"{tunables} 77"]
