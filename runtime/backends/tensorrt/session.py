"""TensorRT plans, on the GPU they were built for.  Needs TensorRT and CUDA's bindings, never torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrm.errors import UserError
from vitrm.model_limits import MAX_STEPS
from vitrm.runtime.artifact.graph_names import HALT_PROB, HALT_THRESHOLD, LOGITS, PIXELS, STEPS, STEPS_USED
from vitrm.runtime.artifact.plan_sidecar import Sidecar, weights_path
from vitrm.runtime.backends.tensorrt.executor import ExecutorPool, PlanExecutor
from vitrm.runtime.backends.tensorrt.plan import Plan, choose_profile
from vitrm.runtime.session import Result, Session

_ANSWERS = (LOGITS, HALT_PROB, STEPS_USED)


class TensorRTBase:
    """Base of the sessions for plans of one file and of three."""

    largest: int  # images of one run
    profiles: list[list[int]]
    notes: tuple[str, ...]

    def notes_at(self, batch: int) -> tuple[str, ...]:
        pieces = self._pieces(batch)
        if len(pieces) > 1:
            return (*self.notes, f"built for at most {self.largest} images: a batch of {batch} is {len(pieces)} runs")
        if pieces[0][1] > batch:
            return (*self.notes, f"built for at least {pieces[0][1]} images: a batch of {batch} costs as much")
        return self.notes

    def _pieces(self, count: int) -> list[tuple[slice, int]]:
        """The images of each run, and how many it is run with: at most as many as a profile takes, at least as few."""
        pieces = []
        for start in range(0, count, self.largest):
            stop = min(count, start + self.largest)
            pieces.append((slice(start, stop), choose_profile(self.profiles, stop - start)[1]))
        return pieces


class TensorRTSession(TensorRTBase, Session):
    """A .plan or .engine file."""

    def __init__(
        self, path: Path, *, device: str = "cuda", threads: int | None = None, cuda_graphs: bool = True
    ) -> None:
        """Opens `path`; see `vitrm.runtime.open`.  `cuda_graphs` False never captures."""
        plan = Plan(path, device=device)
        self.plan, self.path = plan, path
        self.metadata = plan.sidecar.metadata
        self.largest, self.profiles = plan.largest, plan.profiles
        self.threads = threads or 1
        self.backend, self.device_kind, self.device = describe_device(plan)
        self.device_index = plan.cuda.index
        weights = weights_path(path)
        self.size_bytes = path.stat().st_size + (weights.stat().st_size if plan.stripped else 0)
        inputs = {t.name for t in plan.tensors.values() if t.is_input}
        outputs = {t.name for t in plan.tensors.values() if not t.is_input}
        self._takes_depth = STEPS in inputs
        needed = set(_ANSWERS) if self.metadata.recursive else {LOGITS}
        if PIXELS not in inputs or not needed <= outputs or inputs - {PIXELS, STEPS, HALT_THRESHOLD}:
            raise UserError(
                f"{path}: inputs {sorted(inputs)} and outputs {sorted(outputs)} are not those of a vitrm "
                f"{self.metadata.graph} graph ({PIXELS} → {', '.join(sorted(needed))}): build it again"
            )
        self.executors = ExecutorPool(lambda batch: PlanExecutor(plan, batch, cuda_graphs))
        self.notes = notes_on_plan(plan.sidecar, self.device)

    @property
    def takes_depth(self) -> bool:
        return self._takes_depth

    @property
    def device_bytes(self) -> int:
        return self.plan.sidecar.engine.bytes + self.executors.device_bytes

    def graph_problem(self, batch: int) -> str:
        """Says why runs of `batch` images are not one CUDA graph; empty where they are."""
        with self.executors.borrow(self._pieces(batch)[0][1]) as executor:
            return executor.why_no_graph

    def device_times(self, images: NDArray[np.float32], runs: int) -> NDArray[np.float64] | None:
        pieces = self._pieces(len(images))
        if len(pieces) > 1:
            return None
        with self.executors.borrow(pieces[0][1]) as executor:
            self._fill(executor, images, self.metadata.steps, self.metadata.halt_threshold)
            executor.run()
            return executor.device_times(runs)

    def _runner(self, images: NDArray[np.float32], steps: int, halt_threshold: float) -> Callable[[], Result]:
        pieces = self._pieces(len(images))

        def run() -> Result:
            found = [self._run(images[part], padded, steps, halt_threshold) for part, padded in pieces]
            return found[0] if len(found) == 1 else concatenate(found)

        return run

    def _run(self, images: NDArray[np.float32], padded: int, steps: int, halt_threshold: float) -> Result:
        with self.executors.borrow(padded) as executor:
            self._fill(executor, images, steps, halt_threshold)
            executor.run()
            answers = [
                executor.outputs[name].host.array[: len(images)].copy() if name in executor.outputs else None
                for name in _ANSWERS
            ]
        logits, halt_prob, steps_used = answers
        assert logits is not None
        if steps_used is not None:
            check_steps_used(steps_used, steps, fixed=not self._takes_depth and halt_threshold >= 1, name=self.name)
        return Result(logits, halt_prob, steps_used)

    def _fill(self, executor: PlanExecutor, images: NDArray[np.float32], steps: int, halt_threshold: float) -> None:
        pixels = executor.inputs[PIXELS].host.array
        pixels[: len(images)] = images
        pixels[len(images) :] = images[-1]
        if self._takes_depth:
            executor.inputs[STEPS].host.array[...] = steps
            executor.inputs[HALT_THRESHOLD].host.array[...] = halt_threshold


def check_steps_used(steps_used: NDArray[np.int64], steps: int, *, fixed: bool, name: str) -> None:
    """Raises `UserError` where a plan took other steps than its limit allows, as TensorRT's loops are reported to do
    (onnx-tensorrt#891); `fixed`: it must have taken them all.
    """
    steps = max(1, min(steps, MAX_STEPS))
    low, high = int(steps_used.min()), int(steps_used.max())
    if low < (steps if fixed else 1) or high > steps:
        expected = str(steps) if fixed else f"1 to {steps}"
        raise UserError(
            f"{name} took {low} to {high} steps, expected {expected}: this TensorRT counts the loop's iterations wrongly; use "
            "--graph unrolled or stepwise"
        )


def concatenate(results: list[Result]) -> Result:
    """One result for the images of all `results`, in their order."""

    def join(name: str) -> Any:
        parts = [getattr(r, name) for r in results]
        return None if parts[0] is None else np.concatenate(parts)

    return Result(join("logits"), join("halt_prob"), join("steps_used"))


def describe_device(plan: Plan) -> tuple[str, str, str]:
    """Returns backend, kind of device, and the GPU in words."""
    return f"tensorrt{'-rtx' if plan.api.flavour == 'rtx' else ''}-cuda", "cuda", plan.gpu.name


def notes_on_plan(sidecar: Sidecar, gpu: str) -> tuple[str, ...]:
    """Returns remarks for readers of a plan's figures on this GPU."""
    engine, notes = sidecar.engine, list(sidecar.notes)
    if engine.gpu_name and engine.gpu_name != gpu:
        notes.append(f"built on an {engine.gpu_name}, so its kernels were chosen for that one")
    return tuple(notes)
