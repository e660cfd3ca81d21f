"""Measures what the page in the browser downloads, without the model's own graphs.

python benchmarks/sizes/page_sizes.py --json benchmarks/records/page_sizes.json

onnxruntime-web's files are those that `vitrm-export --web DIR --download` keeps; page and scripts are the repository's own.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from pathlib import Path

from vitrm.export.web.runtime_files import VERSION, find_runtime

sys.path.append(str(Path(__file__).resolve().parents[1]))
from record import made

STATIC = Path(__file__).resolve().parents[2] / "export" / "web" / "static"


def sizes(files: list[Path]) -> dict[str, int]:
    """Bytes of files as they are, and as a server sends them that compresses with gzip, level 6."""
    contents = [file.read_bytes() for file in files]
    return {"bytes": sum(map(len, contents)), "gzip_bytes": sum(len(gzip.compress(c, 6)) for c in contents)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    folder = find_runtime(None, download=False)
    record = made("bytes that the page in the browser downloads, beside the model's graphs", ())
    record |= {
        "onnxruntime_web": {"version": VERSION, **sizes([f for f in sorted(folder.iterdir()) if f.is_file()])},
        "page": sizes([f for f in sorted(STATIC.rglob("*")) if f.is_file()]),
    }
    print(json.dumps(record, indent=2))
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")
