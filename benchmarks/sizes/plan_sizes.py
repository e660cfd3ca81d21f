"""How large are TensorRT plans, by depth, graph and precision, and how long do they take to build?

    python benchmarks/sizes/plan_sizes.py [RUN | --preset paper] [--gpu sm89] [--steps 1,6,16]

Exports each combination and builds it with whichever TensorRT is installed (TensorRT for RTX needs no GPU).  Two depths
whose graph is the same to the byte are built once: a loop's depth is not in its file.  A preset has random weights; sizes do
not depend on them.  Every row is written as it comes, and a row that is there is not made again.
Writes benchmarks/records/plan_sizes-NAME-TENSORRT.json.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from pathlib import Path

import onnx
import torch

from vitrm import checkpoint as checkpoints
from vitrm.checkpoint import Checkpoint, build_model
from vitrm.config import preset
from vitrm.errors import run_command
from vitrm.export import export
from vitrm.export.tensorrt.build import build_engine
from vitrm.export.tensorrt.options import PlanOptions, normal_gpu
from vitrm.export.tensorrt.toolchain import toolchain
from vitrm.runtime.system.machine import cpu_name, versions
from vitrm.system.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
GRAPHS = ("unrolled", "loop", "stepwise")
PRECISIONS = ("fp32", "fp16", "int8")


def main(argv: list[str] | None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("run", nargs="?", default="nano-cifar10")
    p.add_argument("--preset", help="random weights of a preset instead of a run")
    p.add_argument("--gpu", default="sm89")
    p.add_argument("--steps", default="1,6,16")
    p.add_argument("--data-dir")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    if args.preset:
        torch.manual_seed(0)
        config = preset(args.preset)
        checkpoint = Checkpoint(
            model=config, data={"name": "digits"}, weights=build_model(config).state_dict(), source=args.preset
        )
    else:
        checkpoint = checkpoints.load(args.run)
    options = PlanOptions(gpus=(normal_gpu(args.gpu),))
    tools = toolchain(options)
    name = Path(checkpoint.source).name
    path = ROOT / "benchmarks" / "records" / f"plan_sizes-{name}-{str(tools.api).lower().replace(' ', '-')}.json"
    record = {
        "what": "bytes of TensorRT plans by depth, graph and precision",
        "command": f"python benchmarks/sizes/plan_sizes.py {f'--preset {args.preset}' if args.preset else name}",
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "tensorrt": str(tools.api),
        "gpus": tools.gpus,
        "batches": [list(profile) for profile in options.profiles],
        "weights": name if not args.preset else f"random ({name})",
        "versions": versions(("vitrm", "torch", "onnx", "onnx-ir")),
        "rows": read_json(path, "record")["rows"] if path.exists() else [],
    }
    done = {(r["graph"], r["precision"], r["steps"]) for r in record["rows"]}
    for precision in PRECISIONS:
        for graph in GRAPHS:
            for steps in map(int, args.steps.split(",")):
                if (graph, precision, steps) in done:
                    continue
                row = measure(checkpoint, options, graph, precision, steps, args.data_dir, record["rows"])
                record["rows"].append(row)
                write_json(path, record)
                print(
                    f"{graph:9} {precision} {steps:3} steps: ONNX {row['onnx_bytes'] / 2**20:6.2f} MiB, plan "
                    f"{row['plan_bytes'] / 2**20:6.2f} MiB, {row['layers']} layers, built in {row['build_seconds']} s"
                    f"{' (the same graph)' if row['same_as_steps'] else ''}",
                    flush=True,
                )
    print(path.relative_to(ROOT))


def measure(checkpoint, options, graph, precision, steps, data_dir, rows):
    """One row."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / ("graphs" if graph == "stepwise" else "graph.onnx")
        target = {"target": "tensorrt"} if precision == "int8" else {}
        made = export(checkpoint, source, steps=steps, graph=graph, precision=precision, data_dir=data_dir, **target)
        digest = hashlib.sha256()
        for file in sorted(source.iterdir()) if source.is_dir() else [source]:
            digest.update(onnx.load(str(file)).graph.SerializeToString(deterministic=True))
        common = {"graph": graph, "precision": precision, "steps": steps, "onnx_bytes": made.bytes}
        common["graph_sha256"] = digest.hexdigest()
        for row in rows:
            if row["graph_sha256"] == digest.hexdigest():
                return row | common | {"same_as_steps": row["steps"]}
        built = build_engine(source, Path(folder) / ("plans" if graph == "stepwise" else "graph.plan"), options)
    return common | {
        "plan_bytes": built.bytes,
        "layers": built.layers,
        "build_seconds": round(built.seconds, 1),
        "same_as_steps": None,
    }


if __name__ == "__main__":
    sys.exit(run_command(main))
