"""The cache of decoded pictures at a set's full size: starts, memory, disk, and how fast batches come out of it.

    python benchmarks/photos/decode_cache.py --images 100000 [--size 224] [--memory-mb MB] [--work DIR] [--json FILE]

Drawn photos (photo_like.py) as JPEG files of 341 × 256 pixels or larger, in ten classes.  The pictures are `DRAWN` different ones, each file a
shifted and re-encoded one of them: no two files are alike, and a file takes as long to decode as a photo of its size.  Every start is a
process of its own that loads all three parts as vitrm-train does, except that rows are always read from the mapped file, as those of a set larger than a quarter of the
memory are.  With `--memory-mb` every start runs in a control group of that size (Linux, as root), which pages of the mapped file count
into: a set larger than the memory, then.  `anonymous_mb` is the largest RssAnon met, which a machine must have; the mapped file's pages are the system's to drop.
Needs the room of the files and of 3 bytes a pixel, and removes both.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from photo_like import CLASSES, draw
from PIL import Image

from vitrm import data
from vitrm.preprocessing import Preprocessing
from vitrm.system.files import write_json

sys.path.append(str(Path(__file__).resolve().parents[1]))
from record import made

DRAWN = 240  # different pictures
FOLDERS = 10
_SIDE = 256  # of a file, the shorter one
_BATCH = 128
_EVERY = 0.05  # seconds between two looks at the memory


def make(folder: Path, count: int) -> None:
    """Writes `count` files into class folders, by all cores."""
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores) as pool:
        drawn = list(pool.map(_drawn, range(DRAWN), chunksize=8))
        for i in range(FOLDERS):
            (folder / f"{i}").mkdir(parents=True)
        starts = range(0, count, 500)
        list(pool.map(partial(_write, folder, drawn, count), starts))


def _drawn(number: int) -> NDArray[np.uint8]:
    return np.asarray(draw(CLASSES[number % len(CLASSES)], np.random.default_rng(number), _SIDE))


def _write(folder: Path, drawn: list[NDArray[np.uint8]], count: int, start: int) -> None:
    for i in range(start, min(start + 500, count)):
        # Of one picture, file after file: another shift, so other blocks.
        turn = i // DRAWN
        moved = np.roll(drawn[i % DRAWN], (turn % _SIDE, turn // _SIDE * 7 + turn % 31), (0, 1))
        Image.fromarray(moved).save(folder / str(i % FOLDERS) / f"{i:07}.jpg", quality=60 + i % 35)


def start(folder: Path, size: int, seconds: float) -> dict[str, float]:
    """Loads the set as training does, then draws shuffled batches for `seconds`; returns what that took."""
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(_EVERY):
            text = Path("/proc/self/status").read_text(encoding="ascii")
            peak[0] = max(peak[0], int(text.split("RssAnon:")[1].split()[0]))

    threading.Thread(target=watch, daemon=True).start()
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    with data.decoding_once():
        parts = {
            split: data.load(str(folder), split, preprocessing=Preprocessing.square(size), in_memory=0)
            for split in data.SPLITS
        }
    took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    train = parts["train"]
    order = np.random.default_rng(0).permutation(len(train))
    drawn, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        rows = order[np.arange(drawn, drawn + _BATCH) % len(order)]
        assert train.pixels[rows].shape == (_BATCH, 3, size, size)
        drawn += _BATCH
    rate = drawn / (time.perf_counter() - began)
    over.set()
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": round(took, 2),
        "cpu_seconds": round(cpu, 2),
        "anonymous_mb": round(peak[0] / 1e3, 1),
        "batches_images_per_s": round(rate),
        "images": sum(len(part) for part in parts.values()),
    }


@contextmanager
def control_group(megabytes: int | None) -> Iterator[list[str]]:
    """A control group of so much memory; yields the words before a command that runs it there, none without a limit."""
    if megabytes is None:
        yield []
        return
    root = Path("/sys/fs/cgroup")
    old = root / "memory"  # version 1 has a tree for each resource
    group, limit = (old, "memory.limit_in_bytes") if old.is_dir() else (root, "memory.max")
    group /= f"decode_cache-{os.getpid()}"
    group.mkdir()
    try:
        (group / limit).write_text(str(megabytes * 1_000_000), encoding="ascii")
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    finally:
        group.rmdir()


def _in_own_process(folder: Path, args: argparse.Namespace, cache: Path) -> dict[str, Any]:
    words = [sys.executable, __file__, "--start", str(folder), "--size", str(args.size), "--seconds", str(args.seconds)]
    with control_group(args.memory_mb) as inside:
        ended = subprocess.run(
            inside + words,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        )
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    """Prints the figures, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=10.0, help="of drawing batches")
    parser.add_argument("--memory-mb", type=int, metavar="MB", help="of a start, in 10⁶ bytes (default: the machine's)")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="where files and cache are made (default: a temporary folder)"
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        print(json.dumps(start(args.start, args.size, args.seconds)))
        return
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        folder, cache = Path(scratch) / "photos", Path(scratch) / "cache"
        make(folder, args.images)
        result: dict[str, Any] = {
            "images": args.images,
            "size": args.size,
            "memory_mb": args.memory_mb,
            "threads": len(os.sched_getaffinity(0)),
            "load_before": round(os.getloadavg()[0], 1),  # of other processes
            "files_mb": round(sum(f.stat().st_size for f in folder.rglob("*.jpg")) / 1e6),
            "first": _in_own_process(folder, args, cache),
            "second": _in_own_process(folder, args, cache),
        }
        changed = sorted(folder.rglob("*.jpg"))[:: max(1, args.images // 100)]
        for file in changed:
            file.write_bytes(file.read_bytes())
        result |= {
            "changed": len(changed),
            "after_a_change": _in_own_process(folder, args, cache),
            "cache_mb": round(sum(f.stat().st_size for f in cache.rglob("*") if f.is_file()) / 1e6),
        }
    for name in ("first", "second", "after_a_change"):
        print(f"{name:15} {result[name]}")
    if args.json:
        what = f"starts from {args.images:,} pictures, brought to {args.size} × {args.size} pixels"
        write_json(args.json, {**made(what, ("vitrm", "numpy", "pillow")), **result})


if __name__ == "__main__":
    main()
