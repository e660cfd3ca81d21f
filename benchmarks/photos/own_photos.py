"""README's "your own photos, in four commands", run as they stand there on drawn photos, with the time that each takes.

    python benchmarks/photos/own_photos.py [--work DIR] [--images 100] [--device-python PYTHON]

The commands are read from README.md.  With `--device-python`, another interpreter (numpy, onnxruntime and Pillow, no torch) runs the last one,
as a device would.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from photo_like import CLASSES, make

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    "vitrm-train": "vitrm.training.cli",
    "vitrm-export": "vitrm.export.cli",
    "vitrm-bench": "vitrm.runtime.bench.cli",
    "vitrm-predict": "vitrm.runtime.predict.cli",
}


def commands() -> list[str]:
    """The four commands, as README has them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## Your own photos", 1)[1].split("\n## ", 1)[0]
    return [line for line in section.splitlines() if line.startswith("vitrm-")]


def main() -> None:
    """Prints a transcript."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where files are made (default: a temporary folder)")
    parser.add_argument("--images", type=int, default=100, help="of each of the three classes")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device-python", help="interpreter of the last command")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="own-photos-"))
    make(work / "photos", dict.fromkeys(CLASSES, args.images), size=args.size, seed=0)
    make(work / "drawn", dict.fromkeys(CLASSES, 3), size=args.size, seed=1)
    (work / "new").mkdir()
    for picture in (work / "drawn").rglob("*.jpg"):
        picture.rename(work / "new" / picture.name)

    for number, command in enumerate(commands(), 1):
        name, rest = command.split(maxsplit=1)
        python = args.device_python if args.device_python and name == "vitrm-predict" else sys.executable
        print(f"$ {command}" + (f"    # {python}" if python != sys.executable else ""), flush=True)
        began = time.monotonic()
        ended = subprocess.run(
            ["bash", "-c", f'exec "$PYTHON" -m {MODULES[name]} {rest}'],
            cwd=work,
            env={**os.environ, "PYTHON": python},
            check=False,
        )
        print(f"# {time.monotonic() - began:.0f} s, exit {ended.returncode}\n", flush=True)
        if ended.returncode:
            sys.exit(f"command {number} failed")


if __name__ == "__main__":
    main()
