"""safetensors files: their header is held to limits before anything that it promises is allocated.

Loading one executes nothing.  The library checks that the tensors tile the file; what is checked here before is how much
there is of everything.
"""

from __future__ import annotations

import errno
import math
import os
from typing import TYPE_CHECKING, Any

from vitrm.errors import UserError
from vitrm.system import strict_json

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER = 64 << 20  # bytes; of a training state it holds the history, some 700 bytes an epoch
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def write(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes `tensors`, contiguous and on the CPU.  Raises OSError."""
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except OSError:
        raise
    except Exception as error:  # safetensors wraps the system's error in its own
        code = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise OSError(code, str(error), str(path)) from error


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, str], int]:
    """The file's metadata, and the bytes of all its tensors.  Raises ValueError for a damaged header, and OSError."""
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, MAX_HEADER):
            raise ValueError(f"its header is said to have {length:,} bytes, the file has {size:,}")
        raw = file.read(length)
    tensors = strict_json.parse(raw.decode("utf-8"))
    if not isinstance(tensors, dict):
        raise ValueError("its header is no JSON object")
    metadata = tensors.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are not texts")
    held = size - 8 - length
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, held)
    return metadata, held


def _check_tensor(name: str, tensor: Any, held: int) -> None:
    """Raises ValueError unless `tensor` is the entry of one that lies within the file's `held` bytes of tensors."""
    where = f"the entry of {name[:80]!r}"
    if not isinstance(tensor, dict) or set(tensor) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} is not one of a tensor")
    dtype, shape, offsets = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ValueError(f"{where} has another type than {', '.join(_ITEM_BYTES)}")
    if not (_are_sizes(shape) and len(shape) <= 8 and _are_sizes(offsets) and len(offsets) == 2):
        raise ValueError(f"{where} has no shape or no place")
    if offsets[1] > held or math.prod(shape) * _ITEM_BYTES[dtype] != offsets[1] - offsets[0]:
        raise ValueError(f"{where} does not fit the file")


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def check_finite(tensors: dict[str, Tensor], where: str) -> None:
    """Raises `UserError` that names the tensors which hold NaN or infinity."""
    broken = sorted(k for k, v in tensors.items() if v.is_floating_point() and not v.isfinite().all())
    if broken:
        raise UserError(
            f"{where}: weights hold NaN or infinity ({', '.join(broken[:3])}{', …' if len(broken) > 3 else ''}): "
            "train again or take an earlier run"
        )
