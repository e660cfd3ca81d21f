"""A calibration reader for ONNX Runtime's own quantizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from numpy.typing import NDArray


def calibration_reader(feeds: Iterable[dict[str, NDArray[Any]]]) -> Any:
    """Returns a `CalibrationDataReader` that gives `feeds`, inputs by name, once.

    A function: onnxruntime.quantization is imported by those alone who quantize.
    """
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(feeds)

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return next(self.left, None)

    return Reader()
