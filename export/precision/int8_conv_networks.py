"""INT8 for a network of convolutions: these stand between QuantizeLinear and DequantizeLinear, by ONNX Runtime's own quantizer.

Weights are symmetric with a scale per output channel and have 7 bits: |q| ≤ 64, so that no two products overflow the
16 bits in which x86 processors without VNNI add them (see vitrm.calib.int8_weights).  Activations have one range each, the
least to the largest value met (unsigned with a zero point for a CPU; signed and symmetric for TensorRT).  They are rounded
after their ReLU, not before: a CPU's convolution cuts off and rounds in one; TensorRT asks for rounded inputs alone, and
fuses the rest.  Biases stay float32, as TensorRT takes no int32 ones, and so does everything else, the classifier too.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vitrm.runtime.artifact.graph_names import PIXELS
from vitrm.runtime.backends.onnxruntime.calibration_reader import calibration_reader

_BATCH = 64
_SUFFIXES = {"_quantized": ".int8", "_scale": ".scale", "_zero_point": ".zero.scale"}


def quantize_network(model: ir.Model, images: NDArray[np.float32], target: str) -> ir.Model:
    """Copies the float32 `model` with int8 convolutions, ranges from float32 images [n, 3, H, W] in [0, 1].

    Raises ValueError if a convolution did not become int8.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    reader = calibration_reader({PIXELS: images[i : i + _BATCH]} for i in range(0, len(images), _BATCH))
    signed = target == "tensorrt"
    with tempfile.TemporaryDirectory() as name, _quiet():
        before, after = Path(name) / "float.onnx", Path(name) / "int8.onnx"
        ir.save(model, before)
        quantize_static(
            str(before),
            str(after),
            reader,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv"] if signed else ["Conv", "Relu", "Clip"],
            extra_options={
                "ActivationSymmetric": signed,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "OpTypesToExcludeOutputQuantization": ["Conv"] if signed else [],
            },
        )
        quantized = ir.load(after)
        _load(quantized)
    _rename(quantized)
    convolutions = [node for node in quantized.graph if node.op_type == "Conv"]
    left = [n.name for n in convolutions if not all(_dequantized(v) for v in n.inputs[:2])]
    if left or not convolutions:
        raise ValueError(f"{', '.join(map(str, left)) or 'no convolution'} became int8")
    return quantized


def _dequantized(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    return node is not None and node.op_type == "DequantizeLinear"


def _rename(model: ir.Model) -> None:
    """Gives stored tensors this project's endings, by which weights are told from scales."""
    for value in list(model.graph.initializers.values()):
        assert value.name is not None
        for theirs, ours in _SUFFIXES.items():
            if value.name.endswith(theirs):
                # Weights with a batch norm folded in have no name in the checkpoint; they are weights nevertheless.
                value.name = value.name.removesuffix(theirs).removeprefix("const.") + ours
                break


def _load(model: ir.Model) -> None:
    """Reads what lies in the file into memory, before the file goes."""
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer advises on standard error to pre-process what is processed already."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
