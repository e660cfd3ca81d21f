"""Measures one engine at several batch sizes beside eager float32: `python -m gpu_record.worker < request.json`.

A process of its own: a crash, a hang or a lost GPU costs one row.  It says what it comes to as JSON lines:
{"stage": text} before whatever may take long, {"row": {…}} for each batch size, {"about": {…}} once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from vitrm import checkpoint as checkpoints
from vitrm.errors import UserError, first_line
from vitrm.runtime.bench.cases import Case, OpenBench, group_key
from vitrm.runtime.bench.collect import describe_machine, rows_of
from vitrm.runtime.bench.energy import Meters
from vitrm.runtime.bench.images import load_sample
from vitrm.runtime.bench.rows import OK, to_plain
from vitrm.runtime.bench.run import measure_batch, predict_case
from vitrm.runtime.system.gpus import gpu_index
from vitrm.runtime.system.machine import versions
from vitrm.runtime.system.power import ROOT

from . import engines
from .engines import REFERENCE, Engine, Job

_PACKAGES = (
    "vitrm",
    "torch",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-bindings",
    "torch-tensorrt",
)


def main() -> int:
    """Entry point; returns the exit code."""
    request = json.load(sys.stdin)
    # Libraries print to the process's own standard output too: that goes where the errors go.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**answer: Any) -> None:
        answers.write(json.dumps(to_plain(answer)) + "\n")
        answers.flush()

    job = Job(**{**request["job"], "work": Path(request["job"]["work"]), "batches": tuple(request["job"]["batches"])})
    chosen = engines.engines(tuple(request["graphs"]), tuple(request["precisions"]))
    engine = next(e for e in chosen if e.name == request["engine"])
    say(stage="opening")
    checkpoint = checkpoints.load(job.run)
    if engine.kind == "trtexec":
        _trtexec(engine, checkpoint, job, request, say)
    else:
        _measure(engine, checkpoint, job, request, say)
    answers.flush()
    os._exit(0)  # a crash while libraries unload should not count


def _measure(engine: Engine, checkpoint: checkpoints.Checkpoint, job: Job, request: dict[str, Any], say: Any) -> None:
    reference = next(e for e in engines.engines((), ()) if e.name == REFERENCE)
    try:
        session = engine.open(checkpoint, job, lambda stage: say(stage=stage))
        beside = None if engine.name == REFERENCE else reference.open(checkpoint, job, lambda stage: None)
    except Exception as error:
        for batch in request["measure"]:
            say(row=_failed(engine, batch, error))
        return
    eager = session if beside is None else beside
    group = group_key(eager.metadata)
    cases = [] if beside is None else [Case("reference", REFERENCE, "eager", beside, group)]
    kind = engine.kind if engine.kind != "eager" or beside is None else "peer"
    cases.append(Case("own", engine.name, kind, session, group))
    sample = load_sample(eager.metadata, session.name, data_dir=job.data_dir, limit=request["limit"])
    meters = Meters(ROOT) if request["power"] else None
    say(about={"machine": describe_machine(None, ROOT), "versions": versions(_PACKAGES), "threads": job.threads,
               "data": {"name": sample.name, "images": len(sample), "note": sample.note}})  # fmt: skip
    for case in cases:
        say(stage=f"answering {len(sample)} images, {case.name}")
        predict_case(case, sample, lambda stage, fraction: None)
    for batch in request["measure"]:
        began = time.perf_counter()
        measure_batch(
            cases,
            {group: sample},
            batch,
            request["seconds"],
            meters,
            lambda stage, fraction, batch=batch: say(stage=f"batch {batch}: {stage}") if fraction == 0 else None,
        )
        row = dataclasses.asdict(rows_of(OpenBench(cases, [], {group: sample}, {}, compared=True), [batch])[-1])
        say(row=row | {"took_s": time.perf_counter() - began})
        if cases[-1].failure != OK:
            cases[-1].failure = OK  # an answer that failed at one batch size may succeed at another


def _trtexec(engine: Engine, checkpoint: checkpoints.Checkpoint, job: Job, request: dict[str, Any], say: Any) -> None:
    precision = engine.name.removeprefix("unrolled-").partition(".")[0]
    try:
        onnx = engines.onnx_file(checkpoint, job, "unrolled", precision, lambda stage: say(stage=stage))
    except UserError as error:
        for batch in request["measure"]:
            say(row=_failed(engine, batch, error))
        return
    for batch in request["measure"]:
        say(stage=f"batch {batch}: trtexec builds and measures")
        began = time.perf_counter()
        try:
            size = checkpoint.model.image_size
            figures = engines.run_trtexec(onnx, batch, size, request["seconds"], gpu_index(job.device))
        except Exception as error:
            say(row=_failed(engine, batch, error))
        else:
            row = {"name": engine.name, "kind": "peer", "batch": batch, "status": OK, "backend": "trtexec", **figures}
            row |= {"precision": precision, "steps": job.steps, "speedup": None, "took_s": time.perf_counter() - began}
            say(row=row)


def _failed(engine: Engine, batch: int, error: Exception) -> dict[str, Any]:
    reason = str(error) if isinstance(error, UserError) else first_line(error, named=True)
    return {"name": engine.name, "kind": engine.kind, "batch": batch, "status": reason}


if __name__ == "__main__":
    sys.exit(main())
