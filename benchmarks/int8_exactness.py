"""Does an int8 file give the same answers on every CPU?  And what does int8 cost in accuracy?

    python benchmarks/int8_exactness.py [RUN] [--steps 6] [--data-dir DIR] [--limit 10000] [--as "python benchmarks/as_avx2"]

Exports RUN in int8, unrolled and as a loop, and answers the test images with each file and with PyTorch in float32.  The
files for a CPU run in ONNX Runtime, beside a copy whose weights are unsigned, which ONNX Runtime multiplies in 32 bits on any
processor: where a file's own sums are exact, its copy gives the same logits to the last bit.  The files for TensorRT run in
OpenVINO, where that is installed.

Writes benchmarks/records/int8_exactness-RUN-CPU.json, with every image's answer as a digit string, and compares it with the
records of other processors: flips are images that another processor answered otherwise.  Each record comes from files of its
own, whose calibration is its processor's too.  --as answers the same images with the very same files as another processor
would: a command to start Python with.  `python benchmarks/as_avx2` runs ONNX Runtime's kernels for AVX2, which add in 16 bits.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from record import RECORDS, made, processor

import vitrm.runtime
from vitrm import checkpoint as checkpoints
from vitrm.data import load
from vitrm.export import export
from vitrm.runtime.artifact.saturation_check import integer_products
from vitrm.runtime.backends.eager import EagerSession
from vitrm.runtime.backends.openvino import OpenVinoSession
from vitrm.runtime.bench.accuracy import predict
from vitrm.system.files import read_json, write_json

GRAPHS = ("unrolled", "loop")
TARGETS = ("cpu", "tensorrt")
ANSWERS = Path(__file__).with_name("answers.py")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("run", nargs="?", default="nano-cifar10")
    p.add_argument("--steps", type=int, default=6)
    p.add_argument("--data-dir")
    p.add_argument("--limit", type=int, default=10_000)
    p.add_argument(
        "--as",
        dest="other",
        type=shlex.split,
        metavar="COMMAND",
        help="the same files as another processor runs them, too",
    )
    args = p.parse_args()
    checkpoint = checkpoints.load(args.run)
    test = load(str(checkpoint.data["name"]), "test", data_dir=args.data_dir, preprocessing=checkpoint.preprocessing)
    pixels, labels = test.pixels[: args.limit], test.labels[: args.limit]
    exact = predict(EagerSession(checkpoint, steps=args.steps), pixels)
    name = Path(args.run).name
    packages = ("vitrm", "onnxruntime", "openvino")
    record = made("int8 files: the same answers on every CPU, and what int8 costs", packages)
    record |= {"run": name, "steps": args.steps, "images": len(pixels)}
    record |= {"float32_accuracy": float((exact.top1 == labels).mean()), "rows": []}
    if args.other:
        record["as"] = shlex.join(args.other)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "pixels.npy", pixels)
        calibration = Path(folder) / "ranges.json"
        for target, graph in itertools.product(TARGETS, GRAPHS):
            if target == "tensorrt" and find_spec("openvino") is None:
                print("no OpenVINO here: the files for TensorRT are left out", flush=True)
                break
            path = Path(folder) / f"{graph}-{target}.onnx"
            settings: dict[str, Any] = {"precision": "int8", "target": target, "calibration": calibration}
            export(checkpoint, path, steps=args.steps, graph=graph, data_dir=args.data_dir, **settings)
            products = integer_products(onnx.load(path).graph)
            session = vitrm.runtime.open(path) if target == "cpu" else OpenVinoSession(path)
            found = predict(session, pixels)
            wide = predict(vitrm.runtime.open(widened(path), verify=False), pixels) if target == "cpu" else None
            row = {
                "graph": graph,
                "target": target,
                "backend": session.backend,
                "int8_weights": len(products.exact | products.saturating),
                "that_could_saturate": len(products.saturating),
                "accuracy": float((found.top1 == labels).mean()),
                "agreement_with_float32": float((found.top1 == exact.top1).mean()),
                "largest_difference_from_32_bit_sums": float(np.abs(found.logits - wide.logits).max())
                if wide
                else None,
                "answers": "".join(map(str, found.top1)) if checkpoint.model.classes <= 10 else found.top1.tolist(),
            }
            if args.other and target == "cpu":
                row["as_the_other"] = compared(found.logits, logits_as(args.other, path, Path(folder)), labels)
            record["rows"].append(row)
            print({k: v for k, v in row.items() if k != "answers"}, flush=True)
    limited = f"-{len(pixels)}-images" if len(pixels) < len(test) else ""
    path = RECORDS / f"int8_exactness-{name}-{processor(record)}{limited}.json"
    write_json(path, record)
    for other in sorted(set(RECORDS.glob(f"int8_exactness-{name}-*.json")) - {path}):
        theirs = read_json(other, "record")
        if theirs["images"] == record["images"]:
            print(f"flips against {other.name}: {flips(record, theirs)}")


def logits_as(command: list[str], path: Path, folder: Path) -> NDArray[np.float32]:
    """The logits [N, classes] of the file at `path` on the processor that `command` starts Python on, for the folder's pixels."""
    logits = folder / "logits.npy"
    subprocess.run([*command, sys.executable, ANSWERS, path, folder / "pixels.npy", logits], check=True)
    return np.load(logits)


def compared(ours: NDArray[np.float32], theirs: NDArray[np.float32], labels: NDArray[np.int64]) -> dict[str, Any]:
    """Two processors' logits of one file: how many answers differ, and by how many logits the first one led in those images."""
    differing = ours.argmax(1) != theirs.argmax(1)
    best = np.sort(ours, axis=1)
    leads = best[:, -1] - best[:, -2]
    return {
        "accuracy": float((theirs.argmax(1) == labels).mean()),
        "flips": int(differing.sum()),
        "largest_lead_among_them": float(leads[differing].max(initial=0.0)),
        "median_lead_of_all": float(np.median(leads)),
        "largest_difference": float(np.abs(ours - theirs).max()),
    }


def widened(path: Path) -> Path:
    """A copy of an int8 file for a CPU whose weights are unsigned, with zero point 128."""
    model = onnx.load(path)
    weights = {i.name: i for i in model.graph.initializer}
    model.graph.initializer.append(helper.make_tensor("zero.128", TensorProto.UINT8, [], [128]))
    changed = set()
    for node in integer_nodes(model.graph):
        if node.input[1] not in changed:
            stored = weights[node.input[1]]
            values = numpy_helper.to_array(stored).astype(np.int16) + 128
            stored.CopyFrom(numpy_helper.from_array(values.astype(np.uint8), stored.name))
            changed.add(stored.name)
        inputs = [*node.input, *[""] * (6 - len(node.input))]
        inputs[5] = "zero.128"
        del node.input[:]
        node.input.extend(inputs)
    target = path.with_name(f"{path.stem}-wide.onnx")
    onnx.save(model, target)
    return target


def integer_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The integer products of a graph and of the bodies in it."""
    bodies = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    own = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    return own + [node for body in bodies for node in integer_nodes(body)]


def flips(one: dict[str, Any], other: dict[str, Any]) -> dict[str, int]:
    """Images that two records answer otherwise, by file."""

    def answers(record: dict[str, Any]) -> dict[str, Any]:
        return {f"{row['graph']} for {row['target']}": row["answers"] for row in record["rows"]}

    ours, theirs = answers(one), answers(other)
    return {name: sum(a != b for a, b in zip(ours[name], theirs[name], strict=True)) for name in ours if name in theirs}


if __name__ == "__main__":
    main()
