"""`python -m torture`: runs the parts, goes on where it was stopped, writes the record."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", MPLBACKEND="agg", TOKENIZERS_PARALLELISM="false")

from record import RECORDS, made, slug

from vitrm.runtime.system.machine import cpu_name
from vitrm.system.files import write_json

from . import children, subjects
from .findings import Finding, Part, grouped
from .plan import PARTS, SMALL, Budget


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m torture", description="Damages, kills, starves and crowds the toolkit, and judges what it does."
    )
    p.add_argument("--part", action="append", choices=PARTS, help="one part, or several (default: all)")
    p.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: 0)")
    p.add_argument("--budget", type=float, default=1.0, metavar="X", help="times the cases of a full run (default: 1)")
    p.add_argument("--format", metavar="NAME", help="of --part formats: this one alone")
    p.add_argument("--case", type=int, metavar="N", help="of --format: this case alone, shown in full")
    p.add_argument(
        "--work", type=Path, metavar="DIR", help="where subjects and finished parts are kept, to go on after a stop"
    )
    p.add_argument("--record", type=Path, metavar="FILE", help="where the record goes (default: benchmarks/records)")
    return p


def main() -> int:
    """Runs; 1 if anything was found."""
    args = parser().parse_args()
    work = args.work or Path(tempfile.gettempdir()) / f"vitrm-torture-{os.getuid()}"
    work.mkdir(parents=True, exist_ok=True)
    children.warm()
    missing = subjects.make(work / "subjects", small=args.budget < SMALL)
    if any(name in (args.part or PARTS) for name in ("kills", "disk", "environment", "concurrency")):
        children.trace(work / "subjects" / "run")
    budget = Budget(args.seed, args.budget, work, args.format, args.case)
    whole = args.format is None and args.case is None
    parts = []
    for name in args.part or PARTS:
        kept = work / f"{name}-{args.seed}-{args.budget:g}.json"
        if whole and kept.is_file():
            part = Part.from_dict(json.loads(kept.read_text()))
            print(f"{name}: done before ({kept}; remove it to run it again)", flush=True)
        else:
            part = _run(name, PARTS[name], budget)
            if whole:
                write_json(kept, part.to_dict())
        parts.append(part)
    _show(parts, missing)
    if whole and not args.part:
        path = args.record or RECORDS / f"torture-{slug(cpu_name())}.json"
        write_json(path, record(parts, missing, args.seed, args.budget))
        print(f"wrote {path}")
        for name in PARTS:
            (work / f"{name}-{args.seed}-{args.budget:g}.json").unlink(missing_ok=True)
    return int(any(part.findings for part in parts) or bool(missing))


def _run(name: str, run: Callable[[Budget, Callable[[str], None]], Part], budget: Budget) -> Part:
    began, shown = time.monotonic(), 0.0

    def progress(text: str) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown > 5:
            shown = now
            print(f"{name} {now - began:5.0f} s  {text}", flush=True)

    part = run(budget, progress)
    part.seconds = round(time.monotonic() - began, 1)
    print(f"{name} {part.seconds:5.0f} s  {part.cases} cases: {part.outcomes}", flush=True)
    return part


def _show(parts: list[Part], missing: list[str]) -> None:
    for part in parts:
        for finding, count in grouped(part.findings):
            print(f"{finding}\n    {count} ×")
        for reason in part.skipped:
            print(f"\n{part.name}: not tried: {reason}")
    for reason in missing:
        print(f"\nnot made: {reason}")
    found = sum(len(part.findings) for part in parts)
    print(f"\n{sum(part.cases for part in parts)} cases, {found} findings")


def record(parts: list[Part], missing: list[str], seed: int, budget: float) -> dict[str, object]:
    """The record's content."""
    outcomes: dict[str, int] = {}
    for part in parts:
        for outcome, count in part.outcomes.items():
            outcomes[outcome] = outcomes.get(outcome, 0) + count

    def shown(finding: Finding, count: int) -> dict[str, object]:
        return {"subject": finding.subject, "kind": finding.kind, "times": count, "case": finding.case,
                "detail": finding.detail, "repeat": finding.repeat}  # fmt: skip

    return {
        **made(
            "damaged files, kills, full disks, hostile environments, crowds, and halting in company",
            ("vitrm", "torch", "onnxruntime", "onnx", "numpy", "safetensors", "pillow"),
        ),
        "seed": seed,
        "budget": budget,
        "cases": sum(part.cases for part in parts),
        "outcomes": dict(sorted(outcomes.items())),
        "not made": missing,
        "parts": {
            part.name: {
                "cases": part.cases,
                "seconds": part.seconds,
                "outcomes": dict(sorted(part.outcomes.items())),
                **part.figures,
                "skipped": part.skipped,
                "findings": [shown(*group) for group in grouped(part.findings)],
            }
            for part in parts
        },
    }


if __name__ == "__main__":
    sys.exit(main())
