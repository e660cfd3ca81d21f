"""How much faster than a plain PyTorch transcription of the equations is the exported graph?

    python benchmarks/plain_vs_exported.py [--preset paper] [--steps 6] [--threads 1] [--rounds 40]

Batch 1 on a CPU.  Four ways to compute the same logits take turns within each round, so that whatever else
the machine does hits all of them: the plain transcription (tests/reference.py), this project's eager
model with its exact savings, and the exported graph in ONNX Runtime, in float32 and float16.  Ratios are medians over
rounds of plain / other.  Writes benchmarks/records/plain_vs_exported-PRESET-STEPS-CPU.json.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import reference  # noqa: E402

import vitrm.runtime  # noqa: E402
from vitrm.checkpoint import Checkpoint, build_model  # noqa: E402
from vitrm.config import preset  # noqa: E402
from vitrm.data import photo_crops  # noqa: E402
from vitrm.export import export  # noqa: E402
from vitrm.files import write_json  # noqa: E402
from vitrm.runtime.machine import cpu_name, versions  # noqa: E402

WARM_UP = 3


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--preset", default="paper")
    p.add_argument("--steps", type=int, default=6)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--rounds", type=int, default=40)
    args = p.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    config = preset(args.preset)
    model = build_model(config).eval()  # speed does not depend on what the weights are
    checkpoint = Checkpoint(model=config, data={}, weights=model.state_dict(), source="untrained")
    image = photo_crops(1).astype(np.float32) / np.float32(255)
    tensor = torch.from_numpy(image)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        sessions = {}
        for precision in ("fp32", "fp16"):
            path = Path(folder) / f"{precision}.onnx"
            with torch.inference_mode(False):
                export(checkpoint, path, steps=args.steps, precision=precision)
            sessions[precision] = vitrm.runtime.open(path, threads=args.threads)
        ways = {
            "plain eager": lambda: reference.run(model, tensor, args.steps),
            "eager with exact savings": lambda: model(tensor, args.steps),
            "exported fp32, ONNX Runtime": lambda: sessions["fp32"].infer(image),
            "exported fp16, ONNX Runtime": lambda: sessions["fp16"].infer(image),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for r in range(WARM_UP + args.rounds):
            for name, run in ways.items():
                start = time.perf_counter()
                run()
                if r >= WARM_UP:
                    times[name].append((time.perf_counter() - start) * 1e3)
    plain = np.array(times["plain eager"])
    rows = [
        {
            "what": name,
            "latency_ms": {f"p{q}": round(float(np.percentile(t, q)), 2) for q in (50, 90, 99)}
            | {"min": round(min(t), 2)},
            "times_plain": round(float(np.median(plain / np.array(t))), 3),
        }
        for name, t in times.items()
    ]
    cpu = cpu_name()
    record = {
        "what": "batch-1 latency of the recursion, interleaved in one run",
        "command": "python benchmarks/plain_vs_exported.py " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu,
        "preset": args.preset,
        "steps": args.steps,
        "batch": 1,
        "threads": args.threads,
        "n": args.rounds,
        "warm_up": WARM_UP,
        "versions": versions(("vitrm", "torch", "onnx", "onnxruntime", "numpy")),
        "rows": rows,
    }
    name = re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-")
    path = ROOT / "benchmarks" / "records" / f"plain_vs_exported-{args.preset}-{args.steps}-{name}.json"
    write_json(path, record)
    for row in rows:
        print(f"{row['what']:30} p50 {row['latency_ms']['p50']:8.2f} ms   {row['times_plain']:.2f} × plain")
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
