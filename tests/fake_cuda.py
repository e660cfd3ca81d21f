"""Stands in for a GPU in training: tensors that have a shape, a type and the device "cuda", and no data.

PyTorch computes with them as it would with real ones, as far as types, devices and the order of operations go.  What it
proves: nothing is on the wrong device, nothing asks for a value, and how many kernels a batch takes.  What it cannot: that
the kernels are right, or fast.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vitrm.training import upload

# No kernel: they look at a tensor, or make one that is written later.
_FREE = ("prim.device", "_unsafe_view", "profiler", "empty", "unsqueeze_", "squeeze_", "detach", "alias", "lift_fresh")
# Kernels of one operation, where it is more than one: gradients of the input, and of weight and bias.
_SEVERAL = {
    "native_layer_norm_backward": 2,
    "convolution_backward": 2,
    "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 3,
}
# A kernel of PyTorch's foreach takes so many tensors, by the number of lists, and so many blocks of 65,536 values.
_TENSORS, _BLOCKS, _BLOCK = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}, 320, 1 << 16


class Watch(TorchDispatchMode):
    """Counts the kernels that operations launch, and lists what makes the host wait for the GPU: a value that is read, a
    size that depends on values, a copy that is not queued.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: list[str] = []
        self.uploads = 0

    @property
    def launches(self) -> int:
        return self.kernels.total()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(function)
        if any(part in name for part in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item")):
            self.waits.append(name)
        output = function(*args, **kwargs)
        if "_to_copy" in name and args[0].device != output.device:
            self.uploads += 1
            if not kwargs.get("non_blocking") or output.device.type == "cpu":
                self.waits.append(f"{name} {args[0].device} → {output.device}")
        elif not function.is_view and not any(part in name for part in _FREE):
            self.kernels[name.removeprefix("aten.").partition(".")[0]] += _launches(name, args)
        return output


def _launches(name: str, args: Any) -> int:
    if "_foreach_" in name or "_fused_" in name:
        lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor) and a[0].ndim]
        if not lists:  # step counts
            return 1
        blocks = sum(math.ceil(t.numel() / _BLOCK) for t in lists[0])
        return max(math.ceil(len(lists[0]) / _TENSORS[min(len(lists), 5)]), math.ceil(blocks / _BLOCKS))
    return next((n for several, n in _SEVERAL.items() if several in name), 1)


class FusedAttention(TorchFunctionMode):
    """Attention by the kernel that a GPU takes; without one PyTorch spells it out."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            q, k, v = args
            assert q.device == k.device == v.device
            assert q.dtype == k.dtype == v.dtype
            aten = torch.ops.aten
            if q.dtype == torch.float32:
                return aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=kwargs["scale"])[0]
            return aten._scaled_dot_product_flash_attention(q, k, v, scale=kwargs["scale"])[0]
        return function(*args, **kwargs)


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it tensors on "cuda" can be made and learned from.  Skips where this PyTorch cannot do that without a driver."""
    monkeypatch.setattr(upload, "pinned", lambda tensor: tensor)
    monkeypatch.setattr(Tensor, "backward", go_backward)
    monkeypatch.setattr(torch.autograd, "grad", gradients)
    # Autocast switches itself off where there is no GPU.
    monkeypatch.setattr("torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True), FusedAttention():
        try:
            torch.zeros(1).to("cuda")
        except RuntimeError as error:  # torch 2.9 asks the driver even for a tensor without data
            pytest.skip(f"torch {torch.__version__} has no fake GPU without a driver: {str(error).splitlines()[0]}")
        yield


def moved(model: nn.Module) -> nn.Module:
    """The model with its parameters and buffers on "cuda", without data; in `fake_cuda`."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(_like(parameter), requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = _like(buffer)
    return model


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


def go_backward(loss: Tensor) -> None:
    """`loss.backward()`, node by node: PyTorch's own engine has a thread for each GPU, which asks the driver.

    Gradients that meet are added one by one, as there; a parameter's is taken as it is.
    """
    root = loss.grad_fn
    pending = _incoming(root)
    arrived: dict[Any, dict[int, Tensor]] = {root: {0: torch.ones_like(loss)}}
    ready = [root]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            gradients = arrived.pop(node, {})
            if hasattr(node, "variable"):
                if gradients:
                    own = node.variable.grad
                    node.variable.grad = gradients[0] if own is None else own + gradients[0]
                continue
            outputs: Any = (None,) * len(node.next_functions)
            if gradients:
                outputs = node(*[gradients.get(i) for i in range(len(node._input_metadata))])
            if not isinstance(outputs, tuple):
                outputs = (outputs,)
            for (after, index), gradient in zip(node.next_functions, outputs, strict=True):
                if after is None:
                    continue
                if gradient is not None:
                    gradient = _fitted(gradient, after, index)
                    met = arrived.setdefault(after, {})
                    met[index] = gradient if index not in met else met[index] + gradient
                pending[after] -= 1
                if not pending[after]:
                    ready.append(after)


def gradients(loss: Tensor, inputs: list[nn.Parameter], allow_unused: bool) -> list[Tensor | None]:
    """`torch.autograd.grad`, in the same way."""
    for parameter in inputs:
        parameter.grad = None
    go_backward(loss)
    found = [parameter.grad for parameter in inputs]
    for parameter in inputs:
        parameter.grad = None
    assert allow_unused or None not in found
    return found


def _incoming(root: Any) -> dict[Any, int]:
    """The edges that lead to each node behind `root`."""
    counts: dict[Any, int] = {root: 0}
    todo = [root]
    while todo:
        for after, _ in todo.pop().next_functions:
            if after is None:
                continue
            if after not in counts:
                counts[after] = 0
                todo.append(after)
            counts[after] += 1
    return counts


def _fitted(gradient: Tensor, node: Any, index: int) -> Tensor:
    """The gradient in the shape and type of what it is of, as the engine makes it."""
    of = node.variable if hasattr(node, "variable") else node._input_metadata[index]
    if tuple(gradient.shape) != tuple(of.shape):
        gradient = gradient.sum_to_size(tuple(of.shape))
    assert gradient.device.type == "cuda"
    return gradient if gradient.dtype == of.dtype else gradient.to(of.dtype)
