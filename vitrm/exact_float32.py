"""Float32 that is float32 on a GPU too.

PyTorch convolves in TF32 on a GPU unless told otherwise (`torch.backends.cudnn.allow_tf32`), with 10 of float32's 23 bits of
fraction; matrix products are exact unless somebody asked for TF32.  What is promised in float32 runs in here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """Switches TF32 off for the matrix products and convolutions of the whole process, and back to what it was."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, conv.allow_tf32
    matmul.allow_tf32 = conv.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, conv.allow_tf32 = before
