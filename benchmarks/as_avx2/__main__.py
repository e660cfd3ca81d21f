"""Runs Python with an ONNX Runtime that takes this x86-64 processor for one that has AVX2 and neither VNNI nor AVX-512.

    python benchmarks/as_avx2 PYTHON [ARGUMENT …]

ONNX Runtime asks the processor what it can do (`cpuid`) and chooses its kernels by the answer.  This makes a copy of the
installed ONNX Runtime in which each of these instructions traps, and answers the trap (cpuid.c) without what is above AVX2.
The kernels for AVX2 then run as they are, 16-bit sums that saturate included, at the processor's own speed.  Other
libraries see the processor as it is.  Needs Linux, gcc and objdump; the copy is gone afterwards.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

CPUID, TRAP = b"\x0f\xa2", b"\xcc\x90"  # the instruction; `int3; nop`, as long and never a compiler's


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "cpuid.so"
        source = Path(__file__).with_name("cpuid.c")
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
        package = masked_copy(Path(folder))
        paths = [str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(paths)}
        sys.exit(subprocess.run(sys.argv[1:], env=environment).returncode)


def masked_copy(folder: Path) -> Path:
    """A copy of the installed onnxruntime in `folder` whose library traps where it would ask the processor."""
    spec = find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        sys.exit("onnxruntime is not installed here")
    package = folder / "packages" / "onnxruntime"
    shutil.copytree(Path(spec.origin).parent, package, ignore=shutil.ignore_patterns("__pycache__", "*.so.*"))
    (library,) = package.glob("capi/onnxruntime_pybind11_state*.so")
    code = bytearray(library.read_bytes())
    for at in cpuid_offsets(library):
        if code[at : at + 2] != CPUID:
            sys.exit(f"no cpuid at {at:#x} of {library.name}: objdump's addresses were read wrongly")
        code[at : at + 2] = TRAP
    library.write_bytes(code)
    return package


def cpuid_offsets(library: Path) -> list[int]:
    """Where in the file the instruction stands, by a disassembly: the same two bytes within others are not it."""
    headers = subprocess.run(["objdump", "-h", library], check=True, capture_output=True, text=True).stdout
    sections = re.findall(r"^ *\d+ (\S+) +([0-9a-f]+) +([0-9a-f]+) +[0-9a-f]+ +([0-9a-f]+)", headers, re.M)
    offset = {name: int(file, 16) - int(address, 16) for name, _, address, file in sections}
    listing = subprocess.run(["objdump", "-d", library], check=True, capture_output=True, text=True).stdout
    found, section = [], ""
    for line in listing.splitlines():
        if line.startswith("Disassembly of section "):
            section = line.split()[-1].rstrip(":")
        elif line.endswith("\tcpuid"):
            found.append(int(line.split(":")[0], 16) + offset[section])
    return found


if __name__ == "__main__":
    main()
