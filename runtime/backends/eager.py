"""The eager PyTorch model as one more backend, and `torch.compile` of it.

This is what an artifact is compared with, so it has the same checks and the same `Result`.  The only
module of the runtime that needs torch; it is imported when a comparison asks for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from vitrm.checkpoint import Checkpoint
from vitrm.config import to_dict
from vitrm.errors import UserError
from vitrm.model import ViTRM
from vitrm.model_size import NEVER
from vitrm.runtime.artifact.metadata import Metadata
from vitrm.runtime.session import Result, Session
from vitrm.runtime.system import machine


class EagerSession(Session):
    """A checkpoint's model in PyTorch, float32 or bfloat16."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        steps: int = 1,
        halt_threshold: float = NEVER,
        device: str = "cpu",
        threads: int | None = None,
        compile: bool | str = False,
        bf16: bool = False,
    ) -> None:
        """`steps` and `halt_threshold` are the defaults of `infer`; `device` is "cpu", "cuda" or "auto".

        `compile` True or one of torch.compile's modes compiles it; `bf16` gives weights and activations that type, as what
        a user without an export would try.
        """
        has_cuda = torch.cuda.is_available()
        if device == "cuda" and not has_cuda:
            raise UserError(
                f"device cuda was asked for, but torch {torch.__version__} sees no CUDA device: use --device cpu"
            )
        self.device_kind = "cuda" if device == "cuda" or (device == "auto" and has_cuda) else "cpu"
        self.device = torch.cuda.get_device_name() if self.device_kind == "cuda" else machine.cpu_name()
        self.backend = f"{'torch.compile' if compile else 'pytorch'}-{self.device_kind}"
        self.threads = threads or machine.physical_cores()
        self.path = None
        self.size_bytes = sum(t.numel() * (2 if bf16 else t.element_size()) for t in checkpoint.weights.values())
        model = checkpoint.build()
        self._dtype = torch.bfloat16 if bf16 else torch.float32
        self.model = model.to(self.device_kind, self._dtype)
        self.metadata = Metadata(
            model=to_dict(checkpoint.model),
            classes=list(checkpoint.data.get("classes", [])),
            data=checkpoint.data,
            graph="loop" if model.recursive else "single",
            steps=steps if model.recursive else 1,
            halt_threshold=halt_threshold,
            trained_depth=checkpoint.trained_depth if model.recursive else None,
            precision="bf16" if bf16 else "fp32",
            weights_sha256=checkpoint.weights_id,
            run=checkpoint.source,
        )
        self.prefers_one_batch = bool(compile)
        self._forward: Callable[..., object] = self.model
        if compile:
            # It looks for a CUDA toolkit even when it compiles for a CPU, and reports what it did not find.
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
            # A graph for each batch size: those with a symbolic size are slower.
            mode = compile if isinstance(compile, str) else None
            self._forward = torch.compile(self.model, dynamic=False, mode=mode)

    @property
    def takes_depth(self) -> bool:
        return self.metadata.recursive

    def _runner(self, images: NDArray[np.float32], steps: int, halt_threshold: float) -> Callable[[], Result]:
        depth: tuple[int | float, ...] = ()
        if self.metadata.recursive:
            depth = (steps, halt_threshold)
        forward, kind, dtype = self._forward, self.device_kind, self._dtype

        def run() -> Result:
            if (
                torch.get_num_threads() != self.threads
            ):  # a setting of the whole process, so another may have changed it
                torch.set_num_threads(self.threads)
            with torch.inference_mode():
                output = forward(torch.from_numpy(images).to(kind).to(dtype), *depth)
                if isinstance(output, torch.Tensor):
                    return Result(output.float().cpu().numpy(), None, None)
                logits, halt_prob, steps_used = (t.cpu() for t in output)  # type: ignore[attr-defined]
            return Result(logits.float().numpy(), halt_prob.float().numpy(), steps_used.numpy())

        return run

    def device_times(self, images: NDArray[np.float32], runs: int) -> NDArray[np.float64] | None:
        if self.device_kind != "cuda":
            return None
        pixels = torch.from_numpy(images).to("cuda", self._dtype)
        depth = (self.metadata.steps, self.metadata.halt_threshold) if self.metadata.recursive else ()
        taken = []
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.inference_mode():
            for _ in range(runs):
                start.record()
                self._forward(pixels, *depth)
                stop.record()
                stop.synchronize()
                taken.append(start.elapsed_time(stop))
        return np.asarray(taken, np.float64)

    def trajectory(self, images: NDArray[np.float32], steps: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The answers after every step: logits [steps, B, classes] and halt_prob [steps, B].

        Raises `UserError` for a baseline, which has no steps.
        """
        if not isinstance(self.model, ViTRM):
            raise UserError(f"{self.name} is a {self.metadata.model['kind']}: it has no steps")
        self._check_images(images)
        with torch.inference_mode():
            logits, halt_prob = self.model.trajectory(torch.from_numpy(images).to(self.device_kind, self._dtype), steps)
        return logits.float().cpu().numpy(), halt_prob.float().cpu().numpy()
