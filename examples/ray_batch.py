"""Millions of pictures on all machines of a Ray cluster, or on all cores of this one: labels as CSV files.

    pip install 'vitrm[examples]'
    python examples/ray_batch.py mine.onnx photos/ labels/ --workers 4

Ray Data streams: paths are dealt out in blocks, each worker opens the model once, and a picture that cannot be read is a line with
an error.  On a cluster the paths and the artifact must be where every worker finds them (NFS, or a bucket mounted).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ray

import vitrm.runtime
from vitrm.data.decoding import readable_suffixes
from vitrm.data.folders import files_below


class Classifier:
    """A worker: the model, opened once, for batch after batch of paths."""

    def __init__(self, artifact: str, threads: int) -> None:
        self.session = vitrm.runtime.open(artifact, threads=threads)

    def __call__(self, batch: dict) -> dict:
        """{"path": paths} → the same with label, probability, steps_used and error."""
        found = list(self.session.predict(batch["path"], top=1, batch=len(batch["path"])))
        return {
            "path": batch["path"],
            "label": [p.labels[0] if p.labels else "" for p in found],
            "probability": [p.probabilities[0] if p.labels else None for p in found],
            "steps_used": [p.steps_used for p in found],
            "error": [p.error or "" for p in found],
        }


def main() -> None:
    """Classifies a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, help="a folder for the CSV files, new or empty")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a worker")
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty: Ray would mix its files with those")
    suffixes = readable_suffixes()
    paths = [{"path": str(f.resolve())} for f in files_below(args.folder) if f.suffix.lower() in suffixes]
    if not paths:
        parser.error(f"{args.folder} holds no pictures")

    data = ray.data.from_items(paths, override_num_blocks=max(args.workers, len(paths) // 1000))
    labelled = data.map_batches(
        Classifier,
        fn_constructor_args=(str(args.artifact.resolve()), args.threads),
        compute=ray.data.ActorPoolStrategy(size=args.workers),
        num_cpus=args.threads,
        batch_size=args.batch,
    )
    labelled.write_csv(str(args.out.resolve()))
    print(f"{len(paths)} pictures, labels in {args.out}")


if __name__ == "__main__":
    main()
