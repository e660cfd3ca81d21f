"""A rare class: what `--balance` does for 6 images of one class beside 200 of another.

    python benchmarks/photos/imbalance.py [--seeds 2] [--json FILE]

Drawn photos (photo_like.py), `vitrm-train --init nano-v2-cifar10 --image-size 32 --batch-size 16` with everything else as it comes; of the six,
one goes to validation.  Both classes' recall is of 200 further images each, as the run's own results have it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from photo_like import make

from vitrm.system.files import write_json
from vitrm.training.cli import main as train

sys.path.append(str(Path(__file__).resolve().parents[1]))
from record import made

COMMON, RARE, TESTED = 200, 6, 200


def recalls(folder: Path, balance: str, seed: int, epochs: int) -> tuple[dict[str, Any], str]:
    """The recall of each class, and the folder's run."""
    out = folder / f"{balance}-{seed}"
    argv = [
        "--data",
        str(folder / "photos"),
        "--init",
        "nano-v2-cifar10",
        "--image-size",
        "32",
        "--batch-size",
        "16",
        "--epochs",
        str(epochs),
        "--device",
        "cpu",
    ]
    if train([*argv, "--balance", balance, "--seed", str(seed), "--out", str(out)]):
        raise SystemExit("training failed")
    return json.loads((out / "results.json").read_text()), str(out)


def main() -> None:
    """Prints the table, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make(folder / "photos" / "train", {"ball": COMMON, "ring": RARE}, size=64, seed=0)
        make(folder / "photos" / "test", {"ball": TESTED, "ring": TESTED}, size=64, seed=1)
        for balance in ("none", "sampling", "loss"):
            for seed in range(args.seeds):
                result, _ = recalls(folder, balance, seed, args.epochs)
                recall = {entry["name"]: round(entry["recall"], 4) for entry in result["classes"]}
                rows.append({"balance": balance, "seed": seed, "recall": recall})
                print(rows[-1], flush=True)
    means: dict[str, dict[str, float]] = {}
    for balance in ("none", "sampling", "loss"):
        found = [row["recall"] for row in rows if row["balance"] == balance]
        means[balance] = {name: round(float(np.mean([r[name] for r in found])), 4) for name in found[0]}
        print(f"{balance:9} recall, mean of the seeds: {means[balance]}")
    if args.json:
        record = made(f"recall of a class with {RARE} images beside one with {COMMON}", ("vitrm", "torch"))
        setting = {"images": [COMMON, RARE], "tested": TESTED, "epochs": args.epochs, "seeds": args.seeds}
        write_json(args.json, {**record, **setting, "means": means, "rows": rows})


if __name__ == "__main__":
    main()
