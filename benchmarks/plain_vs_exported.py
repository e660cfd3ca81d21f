"""How much faster than a plain PyTorch transcription of the equations are the exported graphs, and what others make of it?

    python benchmarks/plain_vs_exported.py [--preset paper] [--steps 6] [--threads 1] [--rounds 40] [--peers]

Batch 1 on a CPU.  All ways to compute the same logits take turns within each round, so that whatever else the
machine does hits all of them: the plain transcription (tests/reference.py), this project's eager model with its exact
savings, and the exported graph in ONNX Runtime, in float32, float16 and int8.  With --peers also what onnxruntime's
`quantize_static` alone makes of torch's export of the plain transcription, and our graphs in OpenVINO (float32,
bfloat16, int8).  Ratios are medians over rounds of plain / other.
Writes benchmarks/records/plain_vs_exported-PRESET-STEPS-CPU.json.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import vitrm  # before tests/ is on the path, which has a folder of that name

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import reference  # noqa: E402
from record import RECORDS, made, processor  # noqa: E402

import vitrm.runtime  # noqa: E402
from vitrm.calib.calibration import calibrate  # noqa: E402
from vitrm.checkpoint import Checkpoint, build_model  # noqa: E402
from vitrm.config import preset  # noqa: E402
from vitrm.data import Images, photo_crops  # noqa: E402
from vitrm.export import export  # noqa: E402
from vitrm.runtime.backends.onnxruntime.calibration_reader import calibration_reader  # noqa: E402
from vitrm.system.files import write_json  # noqa: E402

WARM_UP = 3


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--preset", default="paper")
    p.add_argument("--steps", type=int, default=6)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--rounds", type=int, default=40)
    p.add_argument("--peers", action="store_true", help="add quantize_static and OpenVINO (pip install openvino)")
    args = p.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    config = preset(args.preset)
    model = build_model(config).eval()  # speed does not depend on what the weights are
    checkpoint = Checkpoint(model=config, data={}, weights=model.state_dict(), source="untrained")
    photos = photo_crops(64)
    images = photos.astype(np.float32) / np.float32(255)
    image, tensor = images[:1], torch.from_numpy(images[:1])
    # Speed does not depend on how good the ranges are, so few images serve.
    calibration = calibrate(
        checkpoint, args.steps, images=Images(photos, np.zeros(len(photos), np.int64), ("0",), "photographs", "train")
    )
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for name, settings in {
            "fp32": {},
            "fp16": {"precision": "fp16"},
            "int8": {"precision": "int8", "target": "cpu", "calibration": calibration},
            "int8 Q/DQ": {"precision": "int8", "target": "tensorrt", "calibration": calibration},
        }.items():
            path = Path(folder) / f"{name.replace('/', '')}.onnx"
            print(f"exporting {name}", flush=True)
            export(checkpoint, path, steps=args.steps, **settings)
            sessions[name] = vitrm.runtime.open(path, threads=args.threads)
        ways = {
            "plain eager": lambda: reference.run(model, tensor, args.steps)[-1][0].numpy(),
            "eager with exact savings": lambda: model(tensor, args.steps).logits.numpy(),
            **{
                f"exported {name}, ONNX Runtime": lambda s=sessions[name]: s.infer(image).logits
                for name in ("fp32", "fp16", "int8")
            },
        }
        if args.peers:
            static = quantized_statically(model, args.steps, images, Path(folder), args.threads)
            ways["plain export, quantize_static, ONNX Runtime"] = lambda: static(image)
            for name, precision in (("fp32", "f32"), ("fp32", "bf16"), ("int8 Q/DQ", "f32")):
                label = f"exported {name if precision == 'f32' else precision}, OpenVINO"
                run = in_openvino(sessions[name].path, precision, args.threads)
                ways[label] = lambda r=run: r(image)
        with torch.inference_mode():
            expected = ways["plain eager"]()
            differences = {name: float(np.abs(run() - expected).max()) for name, run in ways.items()}
            times = measure(ways, args.rounds)
    write_record(args, times, differences)


def measure(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each way in each round, all ways taking turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for r in range(WARM_UP + rounds):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if r >= WARM_UP:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def quantized_statically(
    model: torch.nn.Module, steps: int, images: np.ndarray, folder: Path, threads: int
) -> Callable[[np.ndarray], np.ndarray]:
    """onnxruntime's own static quantization, with its defaults, of torch's export of the plain equations."""
    import onnxruntime
    from onnxruntime.quantization import quantize_static

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return reference.run(self.model, pixels, steps)[-1][0]

    plain, int8 = folder / "plain.onnx", folder / "static.onnx"
    with torch.no_grad():
        torch.onnx.export(
            Plain().eval(), (torch.from_numpy(images[:1]),), plain, input_names=["pixels"], dynamo=True, verbose=False
        )
    logging.disable(logging.WARNING)  # a line for each LayerNorm
    quantize_static(plain, int8, calibration_reader({"pixels": image[None]} for image in images[:32]), per_channel=True)
    logging.disable(logging.NOTSET)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(int8), options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"pixels": image})[0]


def in_openvino(path: Path, precision: str, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """One of our files in OpenVINO; `precision` is what it computes floating point in."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    request = compiled.create_infer_request()
    return lambda image: request.infer({"pixel_values": image})["logits"]


def write_record(args: argparse.Namespace, times: dict[str, list[float]], differences: dict[str, float]) -> None:
    """Prints the table and writes the record."""
    plain = np.array(times["plain eager"])
    rows = [
        {
            "what": name,
            "latency_ms": {f"p{q}": round(float(np.percentile(t, q)), 2) for q in (50, 90, 99)}
            | {"min": round(min(t), 2)},
            "times_plain": round(float(np.median(plain / np.array(t))), 3),
            "max_logit_difference": round(differences[name], 6),
        }
        for name, t in times.items()
    ]
    packages = ("vitrm", "torch", "onnx", "onnxruntime", "openvino", "numpy")
    record = {
        **made("batch-1 latency of the recursion, interleaved in one run", packages),
        "preset": args.preset,
        "steps": args.steps,
        "batch": 1,
        "threads": args.threads,
        "n": args.rounds,
        "warm_up": WARM_UP,
        "rows": rows,
    }
    path = RECORDS / f"plain_vs_exported-{args.preset}-{args.steps}-{processor(record)}.json"
    write_json(path, record)
    for row in rows:
        print(
            f"{row['what']:44} p50 {row['latency_ms']['p50']:8.2f} ms   {row['times_plain']:.2f} × plain   max |Δlogit| {row['max_logit_difference']:.1e}"
        )
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
