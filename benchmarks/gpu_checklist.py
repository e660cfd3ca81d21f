"""What only a GPU can show: what to run, what must come out, and what it means where it does not.

python benchmarks/gpu_checklist.py                 the list
python benchmarks/gpu_checklist.py --run           runs what fits this machine, one after the other, and ticks it off
python benchmarks/gpu_checklist.py --run --only plan
python benchmarks/gpu_checklist.py --markdown      docs/deploy/gpu-checklist.md
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from vitrm.errors import UserError, run_command
from vitrm.runtime.system.gpus import find_gpus

ROOT = Path(__file__).resolve().parents[1]
_INTRODUCTION = """\
# The first minute on a GPU

No line of the GPU path has run on a GPU yet. What can be shown without one is in the tests; what is left is here. On a machine
with a GPU, `python benchmarks/gpu_checklist.py --run` runs these commands one after the other and ticks off those that end well; what
else must be seen is for a reader. This file is what `python benchmarks/gpu_checklist.py --markdown` prints.

<!-- no block of this page is run: each needs a GPU; benchmarks/gpu_checklist.py --run runs them -->

<!-- not measured: "12.8" -->
"""


@dataclass(frozen=True)
class Check:
    """One thing to see."""

    name: str
    command: str  # of a shell, in the repository's root
    expected: str
    otherwise: str  # what it means if not, and where to look
    minutes: float  # about, at most
    gpus: int = 1


PYTEST = "python -m pytest -q -n 0"
CHECKS = (
    Check(
        "doctor",
        "vitrm-export --doctor",
        "GPU with its driver; torch on CUDA; `cuda-bindings … runs plans on 1 GPU`; one TensorRT that builds and runs for it",
        "install what its lines name, before anything else",
        1,
    ),
    Check(
        "eager in float32",
        f"{PYTEST} tests/runtime/test_session.py -k on_a_gpu",
        "eager, CUDA graph and autocast agree with the CPU; float32 within 1e-4, so that no TF32 is in it",
        "`vitrm/exact_float32.py`: another switch decides in this PyTorch",
        2,
    ),
    Check(
        "augmentation",
        f"{PYTEST} tests/vitrm/training/augmentation/test_rand_augment.py",
        "pixels equal the CPU's; no synchronization with `torch.cuda.set_sync_debug_mode('error')`",
        "the operation that is named waits for the GPU, or rounds otherwise there",
        2,
    ),
    Check(
        "plan: builds",
        "vitrm-export --steps 6 --fp16 -o runs/gpu-checklist/unrolled.plan",
        "a plan, verified on this GPU; ERROR lines of kernels that were left out are warnings",
        "`PLAN.log` beside it; a message that means wrong results belongs into `export/tensorrt/child.py`",
        5,
    ),
    Check(
        "plan: runs",
        f"{PYTEST} -m gpu tests/runtime/backends/tensorrt",
        "every graph and precision, any batch, threads, halting and kept states answer as PyTorch does; `steps_used` equal",
        "the stand-in of the tests and CUDA disagree: the order of calls in `runtime/backends/tensorrt/executor.py`, `stepwise.py`",
        10,
    ),
    Check(
        "plan: CUDA graphs",
        "python -c \"import vitrm.runtime; s = vitrm.runtime.open('runs/gpu-checklist/unrolled.plan'); "
        "print(repr(s.graph_problem(1))); assert s.graph_problem(1) == ''\"",
        "an empty reason for the unrolled plan; a loop's may name why it is not one graph",
        "`PlanExecutor.why_no_graph`",
        1,
    ),
    Check(
        "plan: memory",
        "python -c \"import vitrm.runtime, numpy as np; s = vitrm.runtime.open('runs/gpu-checklist/unrolled.plan'); "
        "s.infer(np.zeros((1, 3, s.metadata.image_size, s.metadata.image_size), np.float32)); print(s.device_bytes); "
        "import subprocess; print(subprocess.run(['nvidia-smi'], capture_output=True, text=True).stdout)\"",
        "`device_bytes` near what nvidia-smi shows for the process, less CUDA's own, some hundred MB",
        "`Plan.scratch_bytes`, and what a stepwise executor shares between its contexts",
        1,
    ),
    Check(
        "plan: second start (TensorRT for RTX)",
        'for i in 1 2; do python -c "import time, vitrm.runtime, numpy as np; t = time.time(); '
        "s = vitrm.runtime.open('runs/gpu-checklist/unrolled.plan'); "
        's.infer(np.zeros((1, 3, s.metadata.image_size, s.metadata.image_size), np.float32)); print(time.time() - t)"; done',
        "with TensorRT for RTX the second start is shorter by what was compiled (`~/.cache/vitrm/*.kernels`)",
        "`runtime/backends/tensorrt/compiled_kernels.py`: `deserialize` refused, or nothing was written",
        2,
    ),
    Check(
        "bench",
        "vitrm-bench runs/gpu-checklist/unrolled.plan --device cuda --compile --bf16 --batch 1,2,4,8,16,32 --limit 1000 "
        "--json runs/gpu-checklist/bench.json",
        "every row ok or with its reason; `compiled_graphs` is 1 in each row of torch.compile; watts where NVML is",
        "a row that says `compiled nothing` or `compiled again`: `runtime/backends/eager.py`",
        10,
    ),
    Check(
        "second GPU",
        "vitrm-bench --run nano-cifar10 --device cuda:1 --batch 1 --limit 100 --json runs/gpu-checklist/second.json",
        "the row names the second GPU, and its power is that board's (`power_scope`, nvidia-smi)",
        "`runtime/system/gpus.py`, `power.py`: matched by UUID",
        2,
        gpus=2,
    ),
    Check(
        "record",
        "python benchmarks/gpu.py --minutes 9",
        "rows in `benchmarks/records/gpu-*.json`; the same command goes on; repeat it until `--dry-run` says 0 to measure",
        "a row's status says what ended it; the worker's own words are in `runs/gpu-bench/*/worker.log`",
        10,
    ),
    Check(
        "training",
        "rm -rf runs/gpu-checklist/run && vitrm-train --data digits --model nano --epochs 2 --out runs/gpu-checklist/run",
        "it says that it compiles, and no word that compiling does not work; an accuracy near the CPU's; images per second in "
        "`metrics.jsonl` beside those of the same command with `--no-compile` and with `--device cpu`",
        "the reason that it names: no Triton, no C compiler (Jetson); else `vitrm/training/parallel/compilation.py`. Slower than "
        "`--no-compile` once it has started: make it the default no more (`Execution.compiles`)",
        5,
    ),
    Check(
        "training: waits",
        'rm -rf runs/gpu-checklist/waits && python -c "import torch; torch.cuda.set_sync_debug_mode(1); import sys; from vitrm.training.cli import main; '
        "sys.exit(main('--data digits --model tiny --recipe paper --epochs 1 --no-compile --out runs/gpu-checklist/waits'.split()))\"",
        "warnings of synchronizing operations name evaluation, saving and progress alone, never `supervision.py` or `augmentation/`",
        "the line that is named waits; fake tensors do not show what PyTorch's own kernels do",
        5,
    ),
    Check(
        "training: kernels of a batch",
        'rm -rf runs/gpu-checklist/kernels && python -c "from torch.profiler import profile, ProfilerActivity as A; from vitrm.training.cli import main; '
        "p = profile(activities=[A.CUDA]); p.start(); "
        "main('--data digits --model paper --recipe paper --epochs 1 --limit-train 1280 --no-compile "
        "--out runs/gpu-checklist/kernels'.split()); p.stop(); print(p.key_averages().table(sort_by='cuda_time_total', row_limit=12)); print(sum(e.count for e in p.key_averages()))\"",
        "a tenth of the number in the last line near what `tests/vitrm/training/test_supervision.py` counts, beside evaluation's; flash attention among them",
        "`tests/fake_cuda.py` counts an operation wrongly",
        5,
    ),
    Check(
        "training: an update as one graph",
        "rm -rf runs/gpu-checklist/graphs && TORCHINDUCTOR_CUDAGRAPHS=1 vitrm-train --data digits --model nano --epochs 2 --out runs/gpu-checklist/graphs",
        "losses in `metrics.jsonl` equal to those of the check *training*, and more images per second: then `mode=reduce-overhead` in "
        "`compile_learner` is worth having",
        "an output `has been overwritten by a subsequent run`: the state of a step must be cloned between updates, and "
        "`torch.compiler.cudagraph_mark_step_begin()` called in `Learner.train_step`",
        5,
    ),
    Check(
        "stepwise: regrouping",
        "vitrm-export --graph stepwise --plan --steps 6 --fp16 --batch 1,512,1024 -o runs/gpu-checklist/stepwise && vitrm-bench "
        "runs/gpu-checklist/stepwise --device cuda --batch 1024 --halt-threshold 0.9 --limit 2048 --no-eager",
        "steps with few samples left take less time than the first, copies included",
        "`StepwiseExecutor.swap` copies slot by slot, 3 copies a tensor and run of slots: one `cudaMemcpyBatchAsync` (CUDA 12.8 on) or "
        "a gather kernel instead; no regrouping where the prefix stays the same",
        10,
    ),
    Check(
        "plan sizes",
        "python benchmarks/sizes/plan_sizes.py",
        "a record for full TensorRT too: bytes at 1, 6 and 16 steps",
        "it names what is missing",
        10,
    ),
)


def main(argv: list[str] | None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--run", action="store_true", help="run the commands that fit this machine")
    p.add_argument("--only", default="", help="checks whose name contains this")
    p.add_argument("--markdown", action="store_true", help="print docs/deploy/gpu-checklist.md")
    args = p.parse_args(argv)
    chosen = [check for check in CHECKS if args.only in check.name]
    if args.markdown:
        print(markdown(), end="")
        return 0
    if not args.run:
        for check in chosen:
            print(
                f"[ ] {check.name}\n    run   {check.command}\n    see   {check.expected}\n    else  {check.otherwise}"
            )
        return 0
    gpus = find_gpus()
    if not gpus.found:
        raise UserError(f"{gpus.problem}, so there is nothing to run: without --run the list is printed")
    (ROOT / "runs" / "gpu-checklist").mkdir(parents=True, exist_ok=True)
    return max([run(check, len(gpus.found)) for check in chosen], default=0)


def run(check: Check, gpus: int) -> int:
    """Runs a check and prints its line; returns 1 where it failed."""
    if gpus < check.gpus:
        print(f"[-] {check.name}: needs {check.gpus} GPUs, here is {gpus}", flush=True)
        return 0
    began = time.monotonic()
    paths = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    environment = os.environ | {"PATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(
            check.command,
            shell=True,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60 * check.minutes,
            check=False,
        )
        said, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        said, code = str(error), 124
    print(
        f"[{' ' if code else 'x'}] {check.name} ({time.monotonic() - began:.0f} s, exit {code}); see: {check.expected}"
    )
    print("".join(f"      {line}\n" for line in said.splitlines()[-30:]), end="", flush=True)
    if code:
        print(f"      else: {check.otherwise}", flush=True)
    return int(code != 0)


def markdown() -> str:
    """The document."""
    parts = [
        f"\n- [ ] **{check.name}**{f' (needs {check.gpus} GPUs)' if check.gpus > 1 else ''}: {check.expected}\n\n"
        f"      {check.command}\n\n  If not: {check.otherwise}.\n"
        for check in CHECKS
    ]
    return _INTRODUCTION + "".join(parts)


if __name__ == "__main__":
    sys.exit(run_command(main))
