"""Where the benchmarks' records lie, and what every one of them says of its making."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vitrm.runtime.system.machine import cpu_features, cpu_name, versions

RECORDS = Path(__file__).resolve().parent / "records"
_KINDS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512f", "avx2", "i8mm", "asimddp", "asimd")  # the best first
_PLACES = re.compile(r"--(runs|data-dir|work)[ =]\S+")  # where data and files were is this machine's own business


def made(what: str, packages: Sequence[str]) -> dict[str, Any]:
    """A record's beginning: `what` it holds, the command that makes it again, date, processor and its instruction sets,
    versions of `packages`.
    """
    script = Path(sys.argv[0])
    package = script.name == "__main__.py"  # started as python -m, with benchmarks on the path
    start = (
        ["PYTHONPATH=benchmarks", "python", "-m", script.parent.name]
        if package
        else ["python", script.resolve().relative_to(RECORDS.parents[1]).as_posix()]
    )
    words = [*start, *sys.argv[1:]]
    return {
        "what": what,
        "command": _PLACES.sub(lambda found: f"--{found[1]} DIR", " ".join(words)),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "cpu_features": list(cpu_features()),
        "versions": versions(tuple(packages)),
    }


def draw_all(draw: Callable[[dict[str, Any], Path], None], record: dict[str, Any], beside: Path, docs: Path) -> None:
    """Draws the picture of a record `beside` it, and for the `docs`, whose pages show files of their own folder."""
    for place in (beside, docs):
        draw(record, place)


def processor(record: dict[str, Any]) -> str:
    """The record's processor as a part of a file's name: its name may be no more than "AMD EPYC", so with what it multiplies by."""
    kind = next((k for k in _KINDS if k in record["cpu_features"]), "")
    return slug(f"{record['cpu']} {kind}")


def slug(name: str) -> str:
    """`name` as a part of a file's name: lower-case letters and digits, hyphens between them."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
