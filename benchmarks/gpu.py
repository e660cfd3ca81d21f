"""The GPU record: every engine beside eager PyTorch in float32, one row for each engine and batch size.

    python benchmarks/gpu.py [RUN] [--steps 6] [--batches 1,2,4,…,1024] [--data-dir DIR]          on a machine with a GPU
    python benchmarks/gpu.py --dry-run                           every row with its estimated time, and what is missing for it
    python benchmarks/gpu.py --minutes 9                         as many rows as fit; the next call goes on with the others
    python benchmarks/gpu.py nano-digits --device cpu --steps 2 --batches 1,2 --seconds 0.1 --limit 20     tries it without a GPU

Engines: the plain equations, eager PyTorch (float32 with TF32 off, bfloat16, autocast, CUDA graph), torch.compile (default and
max-autotune), AOTInductor, Torch-TensorRT; the unrolled, loop and stepwise graphs in float32, float16 and int8 in ONNX
Runtime's CUDA provider (unrolled also with CUDA graphs) and as TensorRT plans; trtexec on the same files.  Latency is host to
host and, on a GPU, also on its own clock.  Each engine runs in a process of its own, interleaved there with eager float32:
one that crashes, hangs or takes longer than its limit costs one row, and a row that cannot be measured says why.
Every row is written as soon as it is there, and what is exported or built is kept in --work: the same command goes on where it
stopped.  Writes benchmarks/records/gpu-RUN-STEPS-DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_record.engines import GRAPHS, PRECISIONS, Engine, Job, engines
from record import RECORDS, slug

from vitrm import checkpoint as checkpoints
from vitrm.errors import UserError, run_command
from vitrm.runtime.bench.rows import OK
from vitrm.runtime.system.gpus import find_gpus
from vitrm.runtime.system.machine import cpu_name, physical_cores
from vitrm.system.files import read_json, write_json

BATCHES = ",".join(str(1 << i) for i in range(11))
_START_S = 12.0  # about, of a process: imports, and the model onto the GPU
_ROW_S = 3.0  # about, of a row beside what is measured: preparing, warming up, the GPU's clock


def main(argv: list[str] | None) -> None:
    args = _parser().parse_args(argv)
    checkpoint = checkpoints.load(args.run)
    name = Path(checkpoint.source).name
    gpus = find_gpus()
    on_gpu = args.device != "cpu"
    if on_gpu and not args.dry_run and not gpus.found:
        raise UserError(
            f"{gpus.problem}, so there is nothing to record: --device cpu tries the script, --dry-run lists the rows"
        )
    device = cpu_name()
    if on_gpu:
        device = gpus.at(args.device).name if gpus.found else "no GPU"
    batches = tuple(int(b) for b in args.batches.split(","))
    job = Job(
        run=args.run,
        steps=args.steps,
        device=args.device,
        threads=args.threads or physical_cores(),
        batches=batches,
        work=args.work / f"{name}-{args.steps}",
        data_dir=args.data_dir,
    )
    chosen = [e for e in engines(_words(args.graphs), _words(args.precisions)) if not args.only or args.only in e.name]
    if args.no_compile:
        chosen = [e for e in chosen if "compile" not in e.name and "AOT" not in e.name]
    path = args.record or RECORDS / f"{slug(f'gpu-{name}-{args.steps}-{device}')}.json"
    settings = {"run": name, "weights_sha256": checkpoint.weights_id, "steps": args.steps, "device": args.device}
    settings |= {"seconds": args.seconds, "limit": args.limit}
    record = Record(path, settings, device, command(args, name))
    todo = list(_todo(chosen, batches, record, job, args.retry))
    if args.dry_run:
        show_plan(chosen, batches, record, todo, job, args.seconds)
        return
    job.work.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else None
    for engine, wanted, reason in todo:
        if reason:
            record.add([{"name": engine.name, "kind": engine.kind, "batch": b, "status": reason} for b in wanted])
            say(f"{engine.name}: {reason}")
            continue
        while wanted:
            left = None if deadline is None else deadline - time.monotonic()
            needed = _START_S + _making(engine, job) + row_seconds(engine, args.seconds)
            if left is not None and left < needed:
                say(
                    f"{engine.name} takes about {needed:.0f} s, {max(0, left):.0f} s are left: the same command goes on from here"
                )
                say(f"wrote {path}")
                return
            wanted = measure(engine, wanted, job, args, record, deadline)
            if wanted is None:
                say("the time is over: the same command goes on from here")
                say(f"wrote {path}")
                return
    say(f"wrote {path}")


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("run", nargs="?", help="run folder or bundled checkpoint (default: as vitrm-export)")
    p.add_argument("--steps", type=int, default=6)
    p.add_argument("--graphs", default=",".join(GRAPHS))
    p.add_argument("--precisions", default=",".join(PRECISIONS))
    p.add_argument("--batches", default=BATCHES)
    p.add_argument("--only", help="engines whose name contains this")
    p.add_argument("--device", default="cuda", help="cuda, cuda:1 … or cpu (default: cuda)")
    p.add_argument("--seconds", type=float, default=2.0, help="measured per row")
    p.add_argument("--threads", type=int, help="CPU threads (default: physical cores)")
    p.add_argument("--limit", type=int, help="test images for accuracy and agreement (default: all)")
    p.add_argument("--data-dir", help="where CIFAR's files are")
    p.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile and AOTInductor out: they take minutes"
    )
    p.add_argument("--no-power", action="store_true", help="leave energy out: it takes as long as latency")
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="list the rows, their estimated time and what is missing; measure nothing",
    )
    p.add_argument("--minutes", type=float, help="stop after this time; the next call goes on")
    p.add_argument("--retry", action="store_true", help="try rows again that could not be measured")
    p.add_argument("--build-limit", type=float, default=420, help="seconds for an export or a build (default: 420)")
    p.add_argument("--compile-limit", type=float, default=300, help="seconds to prepare a batch size (default: 300)")
    p.add_argument("--row-limit", type=float, default=120, help="seconds for anything else of a row (default: 120)")
    p.add_argument("--record", type=Path, help="file to write, and to go on with (default: as above)")
    p.add_argument("--work", type=Path, default=Path("runs/gpu-bench"), help="where exported files are kept")
    return p


class Record:
    """The file: rows by engine and batch size, written as they come."""

    def __init__(self, path: Path, settings: dict[str, Any], device: str, command: str) -> None:
        self.path = path
        self.values: dict[str, Any] = {
            "what": "latency of every engine on one device, each interleaved with eager float32"
        }
        self.values |= {"measured_on": device, "settings": settings, "about": {}, "rows": []}
        if path.exists():
            earlier = read_json(path, "record")
            if earlier["settings"] != settings:
                raise UserError(
                    f"{path} was made with {earlier['settings']}, now {settings}: rename it to measure anew"
                )
            self.values = earlier
        self.values["command"] = command

    def status(self, engine: str, batch: int) -> str | None:
        """The row's status; None where it is not there."""
        found = (r["status"] for r in self.values["rows"] if (r["name"], r["batch"]) == (engine, batch))
        return next(found, None)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Puts rows in place of earlier ones, and writes the file."""
        new = {(r["name"], r["batch"]) for r in rows}
        kept = [r for r in self.values["rows"] if (r["name"], r["batch"]) not in new]
        self.values["rows"] = kept + [r | {"date": time.strftime("%Y-%m-%d")} for r in rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.values)

    def describe(self, engine: str, about: dict[str, Any]) -> None:
        """Keeps machine, versions and data of an engine's rows."""
        self.values["about"][engine] = about


def _todo(
    chosen: list[Engine], batches: tuple[int, ...], record: Record, job: Job, retry: bool
) -> Iterator[tuple[Engine, list[int], str | None]]:
    """Engines with the batch sizes that are not in the record yet, and what is missing for them."""
    for engine in chosen:
        statuses = {b: record.status(engine.name, b) for b in batches}
        wanted = [b for b, status in statuses.items() if status is None or (retry and status != OK)]
        if wanted:
            yield engine, wanted, engine.missing(job)


# Measuring ---------------------------------------------------------------------------------------


def measure(
    engine: Engine, wanted: list[int], job: Job, args: argparse.Namespace, record: Record, deadline: float | None
) -> list[int] | None:
    """Measures an engine in a process of its own; returns the batch sizes that are left after one that ended it.

    None where the deadline ended it: the row that it was at is measured next time.
    """
    request = {"engine": engine.name, "measure": wanted, "seconds": args.seconds, "limit": args.limit}
    request |= {"graphs": _words(args.graphs), "precisions": _words(args.precisions), "power": not args.no_power}
    request["job"] = asdict(job) | {"work": str(job.work.absolute())}
    here = str(Path(__file__).resolve().parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])}
    say(f"{engine.name}: batch {', '.join(map(str, wanted))}")
    # Of its own and new: a compiler that is killed leaves half a file, which whoever shares the folder then loads.
    compiled = job.work / "inductor"
    shutil.rmtree(compiled, ignore_errors=True)
    environment = {**environment, "TORCHINDUCTOR_CACHE_DIR": str(compiled.resolve())}
    errors = job.work / "worker.log"
    with (
        errors.open("w", encoding="utf-8") as log,
        subprocess.Popen(
            [sys.executable, "-m", "gpu_record.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,  # its compilers and builders end with it
        ) as child,
    ):
        try:
            return _listen(child, engine, wanted, request, args, record, deadline, errors)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)


def _listen(
    child: subprocess.Popen[str],
    engine: Engine,
    wanted: list[int],
    request: dict[str, Any],
    args: argparse.Namespace,
    record: Record,
    deadline: float | None,
    errors: Path,
) -> list[int] | None:
    assert child.stdin is not None
    assert child.stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(child.stdout, lines), daemon=True).start()
    child.stdin.write(json.dumps(request))
    child.stdin.close()
    left, stage = list(wanted), "opening"
    while True:
        limit = stage_limit(stage, args)
        until = time.monotonic() + limit
        over = deadline is not None and deadline < until
        try:
            line = lines.get(
                timeout=max(0.0, (deadline if over and deadline is not None else until) - time.monotonic())
            )
        except queue.Empty:
            if over:
                return None
            return _given_up(engine, left, f"took longer than {limit:.0f} s ({stage})", stage, record)
        if line is None:
            status = child.wait()
            if not left:
                return []
            said = _last_line(errors)
            how = f"crashed (signal {-status})" if status < 0 else f"ended with status {status}"
            return _given_up(engine, left, f"its process {how} while {stage}{said}", stage, record)
        answer = json.loads(line)
        stage = answer.get("stage", stage)
        if "about" in answer:
            record.describe(engine.name, answer["about"])
        if "row" in answer:
            record.add([answer["row"]])
            left.remove(answer["row"]["batch"])
            show(answer["row"])


def _read(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _given_up(engine: Engine, left: list[int], reason: str, stage: str, record: Record) -> list[int]:
    """Keeps the reason as the row's status: of the batch size that it was at, or of all where it was at none yet."""
    lost = left[:1] if stage.startswith("batch") else left
    record.add([{"name": engine.name, "kind": engine.kind, "batch": b, "status": reason} for b in lost])
    say(f"  {reason}")
    return left[len(lost) :]


def stage_limit(stage: str, args: argparse.Namespace) -> float:
    """The seconds that a stage of the worker may take."""
    if stage.startswith(("exporting", "building")):
        return float(args.build_limit)
    if stage.startswith("batch") and ("preparing" in stage or "trtexec" in stage):
        return float(args.compile_limit)
    # Both sides of a row are measured, twice where energy is; answering many images takes as long as it takes.
    return float(args.row_limit + 8 * args.seconds + (args.compile_limit if stage.startswith("answering") else 0))


def _last_line(errors: Path) -> str:
    lines = [line for line in errors.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f": {lines[-1].strip()[:200]}" if lines else ""


# What would be measured --------------------------------------------------------------------------


def row_seconds(engine: Engine, seconds: float) -> float:
    """About how long a row takes once its process is there: it and eager, latency and energy."""
    return engine.batch_s + 4 * seconds + _ROW_S


def _making(engine: Engine, job: Job) -> float:
    """About how long its file takes; nothing where one is there."""
    stem = engine.name.partition(",")[0].partition(" by ")[0]
    made = job.work / stem, job.work / stem.removesuffix(".onnx"), job.work / stem.replace(".plan", "-plan")
    return 0.0 if any(p.exists() for p in made) else engine.once_s


def show_plan(
    chosen: list[Engine],
    batches: tuple[int, ...],
    record: Record,
    todo: list[tuple[Engine, list[int], str | None]],
    job: Job,
    seconds: float,
) -> None:
    """Prints every row: there already, about how long it takes, or what is missing."""
    open_ones = {engine.name: (wanted, reason) for engine, wanted, reason in todo}
    totals = {"to measure": 0.0, "that something is missing for": 0.0}
    counts = dict.fromkeys(totals, 0)
    for engine in chosen:
        wanted, reason = open_ones.get(engine.name, ([], None))
        first = True
        for batch in batches:
            if batch not in wanted:
                status = record.status(engine.name, batch)
                text = "there" if status == OK else f"there: {status}"
            else:
                took = row_seconds(engine, seconds) + (_START_S + _making(engine, job) if first else 0.0)
                kind = list(totals)[bool(reason)]
                totals[kind], counts[kind], first = totals[kind] + took, counts[kind] + 1, False
                text = f"about {took:3.0f} s" + (f"; missing: {reason}" if reason else "")
            say(f"  {engine.name:44} batch {batch:5}  {text}")
    sums = [f"{counts[kind]} {kind}, about {totals[kind] / 60:.0f} minutes" for kind in totals]
    say(f"{len(chosen) * len(batches)} rows: {'; '.join(sums)} (times are estimates, not measured)")


def command(args: argparse.Namespace, name: str) -> str:
    """What makes this record again; where data and files were is this machine's own business."""
    words = ["python", "benchmarks/gpu.py", name, "--steps", str(args.steps), "--device", args.device]
    for option in ("graphs", "precisions", "batches", "only", "seconds", "threads", "limit"):
        if (value := getattr(args, option)) is not None:
            words += [f"--{option}", str(value)]
    return shlex.join([*words, *(["--no-compile"] if args.no_compile else [])])


def show(row: dict[str, Any]) -> None:
    """A row as text: its ratio is to eager float32."""
    if row["status"] != OK:
        say(f"  batch {row['batch']:5}  {row['status'][:150]}")
        return
    device = f"{row['device_ms']['p50']:9.3f} ms on the GPU" if row["device_ms"] else ""
    ratio = f"{row['speedup']:6.2f} × eager" if row["speedup"] else ""
    say(f"  batch {row['batch']:5}  p50 {row['latency_ms']['p50']:9.3f} ms {device} {ratio}")


def _words(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
