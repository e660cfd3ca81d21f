"""Peers: what other tools make of the same float32 file, as rows that `vitrm-bench --peers` puts beside ours.

    OpenVINO            runs the file itself, in float32 and (where the CPU has it) bfloat16, and our Q/DQ int8 file
    NNCF                OpenVINO's quantizer, with its preset for transformers
    quantize_static     onnxruntime's static quantization, per channel
    ORTQuantizer        optimum's, dynamic, with its settings for AVX-512 VNNI

The quantizers get the file and training images, and their defaults otherwise: what a user gets who knows nothing of the
recursion.  A note of each row says how many of the weights became int8: a quantizer that does not enter a Loop's body leaves them all.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrm.errors import UserError, first_line
from vitrm.runtime.artifact.graph_names import HALT_THRESHOLD, PIXELS, STEPS
from vitrm.runtime.artifact.onnx_file import inspect, write_metadata
from vitrm.runtime.artifact.saturation_check import integer_products
from vitrm.runtime.backends.onnxruntime.calibration_reader import calibration_reader
from vitrm.runtime.backends.onnxruntime.session import OnnxRuntimeSession
from vitrm.runtime.backends.openvino import OpenVinoSession, has_bf16
from vitrm.runtime.bench.images import load_sample
from vitrm.runtime.session import Session
from vitrm.runtime.system.machine import saturates_integer_sums

_IMAGES = 128  # that a static quantizer is shown
_BATCH = 16


@dataclass(frozen=True)
class Peer:
    """A row to be."""

    name: str
    make: Callable[[], Session]  # raises `UserError` where the tool is missing or fails


def peers_of(session: Session, name: str, folder: Path, data: str | None, data_dir: Any) -> Iterator[Peer]:
    """The peers of an open ONNX artifact called `name`; the quantizers write into `folder`.

    None for what only ONNX Runtime can run, for float16 (a GPU's), and for stepwise folders.
    """
    m, path, threads = session.metadata, session.path, session.threads
    if not isinstance(session, OnnxRuntimeSession) or path is None or session.device_kind != "cpu":
        return
    if m.precision == "fp16" or m.target == "cpu":
        return
    yield Peer(f"{name} in OpenVINO", lambda: OpenVinoSession(path, threads=threads))
    if m.precision != "fp32":
        return
    if find_spec("openvino") is not None and has_bf16():
        yield Peer(f"{name} in OpenVINO, bfloat16", lambda: OpenVinoSession(path, floats="bf16", threads=threads))

    def feeds() -> list[dict[str, NDArray[Any]]]:
        sample = load_sample(m, session.name, data=data, data_dir=data_dir, limit=_IMAGES, split="train")
        depth: dict[str, NDArray[Any]] = {}
        if session.takes_depth:
            depth = {STEPS: np.asarray(m.steps, np.int64), HALT_THRESHOLD: np.asarray(m.halt_threshold, np.float32)}
        return [{PIXELS: sample.batch(_BATCH, i), **depth} for i in range(max(1, len(sample) // _BATCH))]

    yield Peer(f"{name} by NNCF in OpenVINO", lambda: _nncf(path, feeds(), threads))

    def quantized(tool: str, make: Callable[[], Path]) -> Peer:
        return Peer(f"{name} by {tool}", lambda: _in_onnxruntime(_tried(tool, make), path, threads))

    yield quantized("quantize_static", lambda: _quantize_static(path, folder / f"{path.stem}-static", feeds()))
    yield quantized("ORTQuantizer", lambda: _ort_quantizer(path, folder / f"{path.stem}-optimum"))


# The tools --------------------------------------------------------------------------------------


def _quantize_static(path: Path, folder: Path, feeds: list[dict[str, NDArray[Any]]]) -> Path:
    """onnxruntime's static quantization of the file, with its defaults but for a scale per channel."""
    from onnxruntime.quantization import quantize_static

    folder.mkdir(parents=True)
    quantize_static(str(path), str(folder / "model.onnx"), calibration_reader(feeds), per_channel=True)
    return folder / "model.onnx"


def _ort_quantizer(path: Path, folder: Path) -> Path:
    """optimum's dynamic quantization of the file."""
    if find_spec("optimum") is None:
        raise UserError('optimum is not installed: pip install "vitrm[optimum]"')
    from optimum.onnxruntime import AutoQuantizationConfig, ORTQuantizer
    from transformers import PretrainedConfig

    folder.mkdir(parents=True)
    source = folder / "source.onnx"  # it writes beside the file that it reads
    shutil.copyfile(path, source)
    settings = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
    made = ORTQuantizer(source, config=PretrainedConfig()).quantize(settings, folder / "made")
    return next(Path(made).glob("*.onnx"))


def _nncf(path: Path, feeds: list[dict[str, NDArray[Any]]], threads: int) -> Session:
    """NNCF's static quantization of the file, in OpenVINO."""
    if find_spec("nncf") is None:
        raise UserError("NNCF is not installed: pip install nncf")

    def quantize() -> Any:
        import nncf
        import openvino

        return nncf.quantize(
            openvino.Core().read_model(str(path)),
            nncf.Dataset(feeds),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(feeds),
        )

    model = _tried("NNCF", quantize)
    session = OpenVinoSession(path, threads=threads, compiled_from=model)
    count = sum(_int8_constants(op) for op in model.get_ops())
    session.notes = (
        _counted(count),
        *(
            ("OpenVINO's integer sums can saturate here: this CPU has no VNNI",)
            if count and saturates_integer_sums()
            else ()
        ),
    )
    session.metadata = replace(session.metadata, precision="int8")
    return session


def _int8_constants(op: Any) -> int:
    """int8 weight matrices in an OpenVINO operation, or in the body it holds."""
    if op.get_type_name() in ("Loop", "TensorIterator"):
        return sum(_int8_constants(inner) for inner in op.get_function().get_ops())
    if op.get_type_name() != "Constant" or op.get_element_type().get_type_name() not in ("i8", "u8"):
        return 0
    return int(len(op.get_output_shape(0)) >= 2)


def _in_onnxruntime(made: Path, source: Path, threads: int) -> Session:
    """The file that a quantizer made, opened as what its source was."""
    import onnx

    write_metadata(made, made, inspect(source, verify=False).metadata)
    model = onnx.load(made)
    session = OnnxRuntimeSession(made, threads=threads)
    products = integer_products(model.graph)
    saturating = products.saturating and saturates_integer_sums()
    session.notes = (
        _counted(count_int8_initializers(model.graph)),
        *((f"{products}, as this one is",) if saturating else ()),
    )
    session.metadata = replace(session.metadata, precision="int8")
    return session


def count_int8_initializers(graph: Any) -> int:
    """int8 weight matrices of an ONNX graph and its bodies."""
    import onnx

    kinds = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    bodies = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return sum(i.data_type in kinds and len(i.dims) >= 2 for i in graph.initializer) + sum(
        map(count_int8_initializers, bodies)
    )


def _counted(count: int) -> str:
    return f"int8 weight tensors: {count}" if count else "int8 weight tensors: none, so this is the float32 model"


def _tried(tool: str, make: Callable[[], Any]) -> Any:
    """Calls `make` without what the tool prints.  Raises its failure, whatever it is, as a `UserError` of one line."""
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            return make()
    except UserError:
        raise
    except Exception as error:  # the tools raise all kinds
        raise UserError(f"{tool} failed: {first_line(error, named=True)}") from None
