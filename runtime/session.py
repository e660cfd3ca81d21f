"""One interface to every backend: images in, `Result` out.

A session is an artifact opened on a device.  What all of them promise is checked here, once: the
images' shape, type and range, and whether the depth that was asked for is one the artifact can run.
"""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vitrm.errors import UserError
from vitrm.model_limits import MAX_STEPS
from vitrm.runtime.artifact.graph_names import PARTS
from vitrm.runtime.artifact.metadata import Metadata
from vitrm.runtime.system.gpus import gpu_index

if TYPE_CHECKING:
    from vitrm.runtime.predict.predictions import Prediction

# Resampling and float arithmetic overshoot [0, 1] by rounding; 0 … 255 or normalized pixels do by far more.
_RANGE_SLACK = 1e-3


@dataclass(frozen=True)
class Result:
    """A model's answers to B images."""

    logits: NDArray[np.float32]  # [B, classes]
    halt_prob: NDArray[np.float32] | None  # [B] in [0, 1]: the model's own chance of being right; None for a baseline
    steps_used: NDArray[np.int64] | None  # [B]; None for a baseline


class Session(ABC):
    """An artifact, opened on a device."""

    metadata: Metadata
    backend: str  # what runs it: "onnxruntime-cpu", "pytorch-cpu" …
    device: str  # in words: "AMD EPYC 9B14", "NVIDIA H100"
    device_kind: str  # "cpu" or "cuda"
    device_index: int = 0  # which of the GPUs, as CUDA counts them
    threads: int  # CPU threads of one inference
    path: Path | None  # the artifact's file; None for a model in memory
    size_bytes: int  # of the weights and graph as stored
    notes: tuple[str, ...] = ()  # what a reader of its figures should know
    prefers_one_batch: bool = False  # whether a batch of a new size costs it much, as a compiler does

    @property
    def name(self) -> str:
        """Name of the session in messages."""
        return str(self.path) if self.path else self.metadata.run

    def notes_at(self, batch: int) -> tuple[str, ...]:
        """Returns remarks for readers of its figures at that batch size."""
        return self.notes

    @property
    def device_bytes(self) -> int | None:
        """Memory on the GPU that it takes by now, bytes; None where nobody counts."""
        return None

    def compiled_graphs(self, batch: int) -> int | None:
        """Counts the graphs that a compiler made of it for that batch size; None where none compiles as it runs."""
        return None

    def release_memory(self) -> None:  # noqa: B027
        """Gives memory of the GPU that it keeps for later runs back to others; most keep none."""

    def device_times(self, images: NDArray[np.float32], runs: int) -> NDArray[np.float64] | None:
        """Measures the milliseconds that each of `runs` runs takes on the GPU's own clock, without copies from and to the host.

        `images` have been prepared before.  None where there is no such clock, or one batch is not one run.
        """
        return None

    @property
    @abstractmethod
    def takes_depth(self) -> bool:
        """True where `infer` can be told `steps` and `halt_threshold`; otherwise they are built in."""

    @abstractmethod
    def _runner(self, images: NDArray[np.float32], steps: int, halt_threshold: float) -> Callable[[], Result]:
        """Returns a function that runs on `images` to that depth and threshold, all of which have been checked."""

    def infer(
        self, images: NDArray[np.float32], *, steps: int | None = None, halt_threshold: float | None = None
    ) -> Result:
        """Runs on `images`, float32 [B, 3, H, W] in [0, 1].

        `steps` and `halt_threshold` replace the artifact's own where its graph takes them (a threshold of 1 or
        more never halts).  Raises `UserError` for images of another shape, type or range, and for a depth that the
        artifact cannot run.
        """
        return self.prepare(images, steps=steps, halt_threshold=halt_threshold)()

    def predict(
        self,
        paths: Iterable[str | os.PathLike[str]],
        *,
        top: int = 5,
        steps: int | None = None,
        halt_threshold: float | None = None,
        batch: int | None = None,
        rate: float | None = None,
    ) -> Iterator[Prediction]:
        """Classifies picture and video files, one after the other: see `vitrm.runtime.predict.predict`."""
        from vitrm.runtime.predict.predictions import predict

        return predict(self, paths, top=top, steps=steps, halt_threshold=halt_threshold, batch=batch, rate=rate)

    def prepare(
        self, images: NDArray[np.float32], *, steps: int | None = None, halt_threshold: float | None = None
    ) -> Callable[[], Result]:
        """Does `infer`'s checks and returns its work as a function without arguments, for measuring."""
        self._check_images(images)
        self._check_depth(steps, halt_threshold)
        return self._runner(np.ascontiguousarray(images), *self._depth(steps, halt_threshold))

    def at(self, *, steps: int | None = None, halt_threshold: float | None = None) -> Session:
        """Returns the same open artifact with another depth and threshold as what `infer` does unless told otherwise.

        Raises `UserError` for a depth that the artifact cannot run.
        """
        self._check_depth(steps, halt_threshold)
        view = copy.copy(self)
        depth, threshold = self._depth(steps, halt_threshold)
        view.metadata = replace(self.metadata, steps=depth, halt_threshold=threshold)
        return view

    def _depth(self, steps: int | None, halt_threshold: float | None) -> tuple[int, float]:
        """Returns what was asked for, and the artifact's own where nothing was."""
        own = self.metadata
        return (
            own.steps if steps is None else int(steps),
            own.halt_threshold if halt_threshold is None else float(halt_threshold),
        )

    def _check_images(self, images: NDArray[np.float32]) -> None:
        size = self.metadata.image_size
        expected = f"expected float32 [batch, 3, {size}, {size}] in [0, 1]"
        if not isinstance(images, np.ndarray):
            raise UserError(f"images are a {type(images).__name__}, {expected}: {_array_of(images)}")
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise UserError(f"images have shape {list(images.shape)}, {expected}: {_reshaped(images.shape)}")
        if images.dtype != np.float32:
            hint = "images.astype('float32') / 255" if images.dtype.kind in "iu" else "images.astype('float32')"
            raise UserError(f"images are {images.dtype}, {expected}: {hint}")
        if len(images) == 0:
            raise UserError(f"the batch is empty (shape {list(images.shape)}), expected at least one image")
        low, high = float(images.min()), float(images.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise UserError(f"images hold NaN or infinity, {expected}")
        if low < -_RANGE_SLACK or high > 1 + _RANGE_SLACK:
            raise UserError(
                f"pixels range from {low:.3g} to {high:.3g}, {expected}: divide by 255, and leave out any "
                "normalization (it is inside the model)"
            )

    def _check_depth(self, steps: int | None, halt_threshold: float | None) -> None:
        own = self.metadata
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1):
            raise UserError(f"steps is {steps!r}, expected a whole number of at least 1")
        if steps is not None and steps > MAX_STEPS:
            raise UserError(f"steps is {steps}, expected at most {MAX_STEPS}")
        if halt_threshold is not None and not float(halt_threshold) >= 0:
            raise UserError(f"halt_threshold is {halt_threshold!r}, expected 0 or more (1 or more never halts)")
        if self.takes_depth:
            return
        if not own.recursive and (steps not in (None, 1) or halt_threshold is not None):
            raise UserError(f"{self.name} is a {own.model.get('kind')}: it has no steps to choose")
        if steps is not None and steps != own.steps:
            raise UserError(
                f"{self.name} has its {own.steps} steps built in (graph {own.graph}), asked for {steps}: "
                f"export it with --steps {steps}, or with --graph loop or stepwise to choose at run time"
            )
        if halt_threshold is not None and not _same_threshold(float(halt_threshold), own.halt_threshold):
            built_in = f"{own.halt_threshold:g}" if own.halt_threshold < 1 else "none, so that it never halts,"
            raise UserError(
                f"{self.name} has its halting threshold built in ({built_in} graph {own.graph}), asked for {halt_threshold:g}: "
                "export it with that threshold, or with --graph loop or stepwise to choose at run time"
            )


def _array_of(images: object) -> str:
    """Says what makes an array of `images`, which are none."""
    if isinstance(images, (str, os.PathLike)):
        return f"predict([{str(images)[:80]!r}]) classifies files"
    if type(images).__module__.startswith("PIL."):
        return "predict classifies files, and vitrm.data.decoding.fit brings np.asarray(image) to the model's size"
    return "pass a numpy array"


def _reshaped(shape: tuple[int, ...]) -> str:
    """Says what brings images of `shape` to the right one."""
    last = len(shape) in (3, 4) and shape[-1] == 3 and shape[-3] != 3
    if len(shape) == 3:
        return (
            "move the channels in front and add a batch axis: images.transpose(2, 0, 1)[None]"
            if last
            else "add a batch axis: images[None]"
        )
    return (
        "move the channels to axis 1: images.transpose(0, 3, 1, 2)"
        if last
        else "resize or reshape; predict does it with files"
    )


def _plan_device(device: str) -> str:
    """The GPU of a plan, which runs on one whatever was asked for."""
    return device if device.startswith("cuda") else "cuda"


def _same_threshold(a: float, b: float) -> bool:
    return a == b or (a >= 1 and b >= 1)  # from 1 on, every threshold means "never"


def open_session(
    path: str | os.PathLike[str],
    *,
    device: str = "cpu",
    threads: int | None = None,
    provider: str | None = None,
    verify: bool = True,
) -> Session:
    """Opens the artifact at `path` with the backend that runs it; `vitrm.runtime.open` says what the arguments are."""
    if device not in ("cpu", "auto"):
        gpu_index(device)
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise UserError(f"threads is {threads!r}, expected a whole number of at least 1")
    if provider is not None:
        from vitrm.runtime.backends.onnxruntime.providers import check_provider

        check_provider(device, provider)
    file = Path(path)
    if file.is_dir():
        if (file / "model.safetensors").exists():
            raise UserError(f"{file} is a run folder, expected an exported file: export it with vitrm-export {file}")
        if any((file / f"{part}.onnx").exists() for part in PARTS):
            from vitrm.runtime.backends.onnxruntime.stepwise import StepwiseSession

            return StepwiseSession(file, device=device, threads=threads, provider=provider, verify=verify)
        if any((file / f"{part}.plan").exists() for part in PARTS):
            from vitrm.runtime.backends.tensorrt.stepwise import TensorRTStepwiseSession

            return TensorRTStepwiseSession(file, device=_plan_device(device), threads=threads)
        raise UserError(
            f"{file} is a folder without {', '.join(f'{p}.onnx' for p in PARTS)} (or .plan), expected an exported file (.onnx, "
            ".plan) or a stepwise folder"
        )
    if not file.exists():
        raise UserError(f"{file} does not exist: make it with vitrm-export, or check the path")
    suffix = file.suffix.lower()
    if suffix == ".onnx":
        from vitrm.runtime.backends.onnxruntime.session import OnnxRuntimeSession

        return OnnxRuntimeSession(file, device=device, threads=threads, provider=provider, verify=verify)
    if suffix in (".plan", ".engine"):
        from vitrm.runtime.backends.tensorrt.session import TensorRTSession

        return TensorRTSession(file, device=_plan_device(device), threads=threads)
    if suffix in (".safetensors", ".pt", ".pth", ".ckpt"):
        raise UserError(
            f"{file} holds weights, expected an exported file (.onnx, .plan): export the run with vitrm-export RUN"
        )
    from vitrm.data.decoding import HEIF_SUFFIXES, IMAGE_SUFFIXES

    if suffix in IMAGE_SUFFIXES | HEIF_SUFFIXES:
        raise UserError(f"{file} is a picture: vitrm-predict ARTIFACT {file} says which class is on it")
    raise UserError(
        f"{file} is not an artifact this version knows, expected an .onnx or .plan file written by vitrm-export"
    )
