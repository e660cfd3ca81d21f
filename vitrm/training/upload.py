"""Small arrays from the host to the device, without waiting for it.

A copy out of ordinary memory makes the host wait until the GPU has done all before it; one out of pinned memory only
joins the queue.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array as a tensor on `device`: on a CPU the same memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return pinned(tensor).to(device, non_blocking=True)


def pinned(tensor: Tensor) -> Tensor:
    """The tensor in memory that the GPU reads directly; PyTorch keeps it until the copy is done."""
    return tensor.pin_memory()
