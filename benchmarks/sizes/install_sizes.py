"""Measures what an installation weighs: the files of each package that vitrm and its extras pull in.

python benchmarks/sizes/install_sizes.py --json benchmarks/records/install_sizes-linux-x86_64.json

Reads the environment it runs in; an extra of which a package is missing there is left out, and named.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

sys.path.append(str(Path(__file__).resolve().parents[1]))
from record import made

EXTRAS = (
    "cpu",
    "gpu",
    "tensorrt",
    "tensorrt-rtx",
    "optimum",
    "tensorboard",
    "heif",
    "video",
    "examples",
    "peers",
    "docs",
    "dev",
)


def needed(requirements: list[str], extra: str, found: dict[str, int], missing: set[str]) -> None:
    """Adds each package that `requirements` lead to, with its bytes, to `found`, or its name to `missing`."""
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = requirement.name.lower().replace("_", "-")
        if name in ("vitrm",):
            continue
        if name not in found:
            try:
                package = metadata.distribution(name)
            except metadata.PackageNotFoundError:
                missing.add(name)
                continue
            found[name] = sum(p.stat().st_size for f in package.files or [] if (p := Path(str(f.locate()))).is_file())
            needed(package.requires or [], "", found, missing)
        for inner in requirement.extras:
            needed(metadata.distribution(name).requires or [], inner, found, missing)


def of_project() -> tuple[list[str], dict[str, list[str]]]:
    """The requirements in pyproject.toml: of everyone, and by extra, those that name other extras resolved."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def resolved(name: str) -> list[str]:
        out = []
        for text in extras[name]:
            requirement = Requirement(text)
            out += [t for e in requirement.extras for t in resolved(e)] if requirement.name == "vitrm" else [text]
        return out

    return project["dependencies"], {name: resolved(name) for name in extras}


def measure() -> dict[str, object]:
    """Megabytes of the base, of CUDA's part of it, and of what each extra adds."""
    base, extras = of_project()
    found: dict[str, int] = {}
    missing: set[str] = set()
    needed(base, "", found, missing)
    if missing:
        sys.exit(f"not installed here: {', '.join(sorted(missing))}")
    cuda = {name: size for name, size in found.items() if name.startswith(("nvidia-", "cuda-")) or name == "triton"}
    added: dict[str, float] = {}
    left_out: dict[str, list[str]] = {}
    for extra in EXTRAS:
        more, lacking = dict(found), set[str]()
        needed(extras.get(extra, []), "", more, lacking)
        if lacking:
            left_out[extra] = sorted(lacking)
        else:
            added[extra] = round((sum(more.values()) - sum(found.values())) / 1e6, 1)
    total = sum(found.values())
    return {
        "base_mb": round(total / 1e6, 1),
        "base_packages": len(found),
        "cuda_mb": round(sum(cuda.values()) / 1e6, 1),
        "cuda_packages": sorted(cuda),
        "base_without_cuda_mb": round((total - sum(cuda.values())) / 1e6, 1),
        "torch_mb": round(found["torch"] / 1e6, 1),
        "extra_mb": added,
        "not_measured": left_out,
        "largest_mb": {n: round(s / 1e6, 1) for n, s in sorted(found.items(), key=lambda item: -item[1])[:12]},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    record = made(
        "megabytes of the installed packages: of the files that each one's RECORD lists",
        ("torch", "torchvision", "onnx"),
    )
    record |= {"system": f"{platform.system()} {platform.machine()}", **measure()}
    print(json.dumps(record, indent=2))
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")
