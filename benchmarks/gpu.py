"""The GPU record: every engine beside eager PyTorch, torch.compile and ONNX Runtime, in one interleaved run per batch size.

    python benchmarks/gpu.py [RUN] [--steps 6] [--batches 1,2,4,…,1024] [--data-dir DIR]          on a machine with a GPU
    python benchmarks/gpu.py nano-digits --device cpu --steps 2 --batches 1,2 --seconds 0.1 --limit 20     tries it without one

Rows: eager and torch.compile (max-autotune) in float32 and bfloat16; the unrolled, loop and stepwise graphs in float32,
float16 and int8, each in ONNX Runtime's CUDA provider and as a TensorRT plan.  Latency is host to host and, on a GPU,
also on its own clock.  A row that cannot run says why.  Everything exported is kept in --work, and the record is written after
each batch size: run the command again and it goes on where it stopped.
Writes benchmarks/records/gpu-RUN-STEPS-DEVICE.json.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from vitrm import checkpoint as checkpoints
from vitrm.errors import UserError, run_command
from vitrm.export import export
from vitrm.export.tensorrt.build import build_engine
from vitrm.export.tensorrt.options import PlanOptions
from vitrm.export.tensorrt.toolchain import toolchain
from vitrm.runtime.artifact.graph_names import PARTS
from vitrm.runtime.bench.run import bench
from vitrm.runtime.system.gpus import find_gpus
from vitrm.runtime.system.machine import cpu_name
from vitrm.system.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
GRAPHS = ("unrolled", "loop", "stepwise")
PRECISIONS = ("fp32", "fp16", "int8")
BATCHES = ",".join(str(1 << i) for i in range(11))


def main(argv: list[str] | None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("run", nargs="?", help="run folder or bundled checkpoint (default: as vitrm-export)")
    p.add_argument("--steps", type=int, default=6)
    p.add_argument("--graphs", default=",".join(GRAPHS))
    p.add_argument("--precisions", default=",".join(PRECISIONS))
    p.add_argument("--batches", default=BATCHES)
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    p.add_argument("--seconds", type=float, default=2.0, help="measured per row")
    p.add_argument("--threads", type=int, help="CPU threads (default: physical cores)")
    p.add_argument("--limit", type=int, help="test images for accuracy and agreement (default: all)")
    p.add_argument("--data-dir", help="where CIFAR's files are")
    p.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes per batch size")
    p.add_argument("--record", type=Path, help="file to write, and to go on with (default: as above)")
    p.add_argument("--work", type=Path, default=Path("runs/gpu-bench"), help="where exported files are kept")
    args = p.parse_args(argv)

    checkpoint = checkpoints.load(args.run)
    name = Path(checkpoint.source).name
    gpus = find_gpus()
    if args.device == "cuda" and not gpus.found:
        raise UserError(f"{gpus.problem}, so there is nothing to record: --device cpu tries the script without one")
    device = gpus.found[0].name if args.device == "cuda" else cpu_name()
    batches = [int(b) for b in args.batches.split(",")]
    work = args.work / f"{name}-{args.steps}"
    artifacts, missing = make(checkpoint, args, batches, work)

    path = args.record or record_path(f"gpu-{name}-{args.steps}-{device}")
    settings = {"run": name, "weights_sha256": checkpoint.weights_id, "steps": args.steps, "device": args.device}
    settings |= {"seconds": args.seconds, "limit": args.limit}
    record: dict[str, Any] = {"what": "latency of every engine on one GPU, interleaved", "measured_on": device}
    record |= {"settings": settings, "rows": [], "benches": []}
    if path.exists():
        earlier = read_json(path, "record")
        if earlier["settings"] != settings:
            raise UserError(f"{path} was made with {earlier['settings']}, now {settings}: rename it to measure anew")
        record = earlier
    for batch in batches:
        done = {(row["name"], row["batch"]) for row in record["rows"] if row["status"] == "ok"}
        # A batch size is one interleaved run: whole, or not there.
        if all((Path(a).name, batch) in done for a in artifacts) and any(
            b["batch"] == batch for b in record["benches"]
        ):
            say(f"batch {batch}: there already")
            continue
        say(f"batch {batch}")
        record["rows"] = [row for row in record["rows"] if row["batch"] != batch]
        record["benches"] = [b for b in record["benches"] if b["batch"] != batch]
        rows, about = measure(artifacts, args, batch)
        record["rows"] += rows + [
            {"name": n, "kind": "artifact", "status": why, "batch": batch} for n, why in missing.items()
        ]
        record["benches"].append(about)
        record["command"] = command(args, name)
        write_json(path, record)
        show(rows)
    for n, why in missing.items():
        say(f"{n}: {why}")
    say(f"wrote {path}")


def make(
    checkpoint: Any, args: argparse.Namespace, batches: list[int], work: Path
) -> tuple[list[Path], dict[str, str]]:
    """The ONNX files and plans that are not in `work` yet; those that cannot be made, with the reason."""
    artifacts, missing = [], {}
    top = max(batches)
    # One image alone, a few, many: each profile is tuned for its own batch size.
    profiles = [(1, 1, 1), (2, min(32, top), min(64, top)), (65, 256, top)]
    options = PlanOptions(profiles=tuple((a, min(b, c), c) for a, b, c in profiles if a <= c))
    # On a CPU int8 has a graph of its own, which is no plan.
    target = "tensorrt" if args.device == "cuda" else "cpu"
    for precision in args.precisions.split(","):
        for graph in args.graphs.split(","):
            stepwise = graph == "stepwise"
            onnx = work / (f"{graph}-{precision}" + ("" if stepwise else ".onnx"))
            plan = work / (f"{graph}-{precision}-plan" if stepwise else f"{graph}-{precision}.plan")
            if not whole(onnx):
                say(f"exporting {onnx.name}")
                export(
                    checkpoint,
                    onnx,
                    steps=args.steps,
                    graph=graph,
                    precision=precision,
                    target=target,
                    data_dir=args.data_dir,
                )
            artifacts.append(onnx)
            if whole(plan):
                artifacts.append(plan)
                continue
            try:
                if args.device == "cpu":
                    raise UserError("a plan runs on a GPU, this record is of a CPU")
                if not toolchain(options).runs_here:
                    raise UserError("TensorRT builds it, but no GPU that runs it is here")
                say(f"building {plan.name}")
                artifacts.append(build_engine(onnx, plan, options).path)
            except UserError as error:
                missing[plan.name] = str(error)
    return artifacts, missing


def whole(path: Path) -> bool:
    """Whether the artifact is there: they are written whole or not at all."""
    return path.is_file() or any(all((path / f"{part}{s}").exists() for part in PARTS) for s in (".onnx", ".plan"))


def measure(artifacts: list[Path], args: argparse.Namespace, batch: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One interleaved run at one batch size: its rows, and what is to be known of it."""
    date = time.strftime("%Y-%m-%d")
    try:
        result = bench(
            artifacts,
            run=args.run,
            data_dir=args.data_dir,
            batches=(batch,),
            seconds=args.seconds,
            threads=args.threads,
            limit=args.limit,
            compile=False if args.no_compile else "max-autotune",
            bf16=True,
            device=args.device,
        ).to_dict()
    except UserError as error:  # nothing at all could run
        rows = [{"name": a.name, "kind": "artifact", "status": str(error), "batch": batch} for a in artifacts]
        return rows, {"batch": batch, "date": date, "machine": None, "notes": [str(error)]}
    about = {
        k: result[k]
        for k in ("machine", "versions", "threads", "rounds", "warm_up", "data", "power", "notes", "started")
    }
    return result["rows"], {"batch": batch, "date": date, **about}


def command(args: argparse.Namespace, name: str) -> str:
    """What makes this record again; where data and files were is this machine's own business."""
    words = ["python", "benchmarks/gpu.py", name, "--steps", str(args.steps), "--device", args.device]
    for option in ("graphs", "precisions", "batches", "seconds", "threads", "limit"):
        if (value := getattr(args, option)) is not None:
            words += [f"--{option}", str(value)]
    return shlex.join([*words, *(["--no-compile"] if args.no_compile else [])])


def record_path(name: str) -> Path:
    """Where the record is."""
    return ROOT / "benchmarks" / "records" / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as text: ratios to eager float32."""
    for row in rows:
        if row["status"] != "ok":
            say(f"  {row['name']:44} {row['status'][:100]}")
            continue
        device = f"{row['device_ms']['p50']:9.3f} ms on the GPU" if row["device_ms"] else ""
        ratio = f"{row['speedup']:6.2f} × eager" if row["speedup"] else ""
        say(f"  {row['name']:44} p50 {row['latency_ms']['p50']:9.3f} ms {device} {ratio}")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
