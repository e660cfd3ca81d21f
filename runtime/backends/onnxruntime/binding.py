"""One graph in ONNX Runtime, with its tensors where they are needed.

On a CPU, arrays go in and come out.  On a GPU that would copy every tensor to the host after each run and back before
the next; there inputs and outputs are bound instead (ONNX Runtime's IOBinding), and what the caller wants to `keep`
stays in the device's memory, as an OrtValue that the next run takes as it is.

Binding works on the CPU provider too, where it changes nothing but the way (measured: as fast as plain runs, within
2 % at batch 1 to 32, so plain runs are what a CPU gets).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrm.errors import UserError, first_line
from vitrm.runtime.artifact.interface import Signature
from vitrm.runtime.backends.onnxruntime.providers import Running

BoundTensor = Any  # a numpy array, or an OrtValue on the device

_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}
_BOUND = ("cuda", "tensorrt")  # providers whose memory ONNX Runtime's Python calls "cuda"


class BoundGraph:
    """An InferenceSession and the place of its tensors; thread-safe, like it."""

    def __init__(self, session: Any, running: Running, where: str, *, bound: bool | None = None) -> None:
        """`where` names it in a message; `bound` None: where the provider's memory is not the host's."""
        self.session = session
        self.where = where
        self.bound = running.provider in _BOUND if bound is None else bound
        self._memory, self._index = ("cuda", running.index) if running.provider in _BOUND else ("cpu", 0)
        self._inputs = {i.name: i for i in session.get_inputs()}
        self._outputs = [o.name for o in session.get_outputs()]

    @property
    def inputs(self) -> set[str]:
        return set(self._inputs)

    @property
    def outputs(self) -> set[str]:
        return set(self._outputs)

    def rank(self, name: str) -> int:
        """The number of axes of an input."""
        return len(self._inputs[name].shape)

    @property
    def tensors(self) -> dict[str, Signature]:
        """Type and shape of every input and output; an axis without a fixed length has another value than a number."""
        found = (*self.session.get_inputs(), *self.session.get_outputs())
        return {t.name: (_TYPES.get(t.type, t.type), tuple(t.shape)) for t in found}

    def run(
        self, outputs: Sequence[str], feeds: Mapping[str, BoundTensor], *, keep: Collection[str] = ()
    ) -> dict[str, BoundTensor]:
        """Runs the graph: `outputs` by name, as arrays of their own; those in `keep` on the device where it has its memory.

        Raises `UserError` with ONNX Runtime's reason when it fails.
        """
        try:
            if not self.bound:
                return dict(zip(outputs, self.session.run(list(outputs), dict(feeds)), strict=True))
            binding = self.session.io_binding()
            for name, value in feeds.items():
                if isinstance(value, np.ndarray):
                    binding.bind_cpu_input(name, value)  # copies it to the device now
                else:
                    binding.bind_ortvalue_input(name, value)
            for name in outputs:
                kept = name in keep
                binding.bind_output(name, self._memory if kept else "cpu", self._index if kept else 0)
            binding.synchronize_inputs()  # the copies above need not be on the stream that computes
            self.session.run_with_iobinding(binding)
            made = dict(zip(outputs, binding.get_outputs(), strict=True))
            return {name: value if name in keep else value.numpy() for name, value in made.items()}
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            batch = next((len(v) for v in feeds.values() if isinstance(v, np.ndarray) and v.ndim), None)
            of = "" if batch is None else f" on a batch of {batch}"
            raise UserError(f"{self.where} failed{of}: {first_line(error)}") from error


def on_host(tensor: BoundTensor) -> NDArray[Any]:
    """The tensor as an array in the host's memory, writable."""
    array: NDArray[Any] = tensor if isinstance(tensor, np.ndarray) else tensor.numpy()
    return array if array.flags.writeable else array.copy()
