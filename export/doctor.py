"""vitrm-export --doctor: which backends and GPUs are here, their versions, and what each can do.

Whatever is missing is an answer, never an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata as packages

from vitrm import __version__
from vitrm.errors import UserError, first_line
from vitrm.runtime.artifact.plan_sidecar import this_system
from vitrm.runtime.backends.tensorrt.api import FULL, INSTALL, NAMES, RTX, load_tensorrt, version_tuple
from vitrm.runtime.system import machine
from vitrm.runtime.system.gpus import Gpus, find_gpus
from vitrm.system.terminal import say


@dataclass(frozen=True)
class Finding:
    """One backend."""

    name: str
    version: str | None  # None where it is not installed
    can: str  # what it can do here, or why not


def diagnose() -> list[Finding]:
    """Lists what is here, most general first."""
    gpus = find_gpus()
    return [
        Finding("machine", None, f"{this_system()}, Python {sys.version.split()[0]}, {machine.cpu_name()}"),
        _gpu(gpus),
        _guarded("torch", lambda: _torch(gpus)),
        _guarded("onnxruntime", _onnxruntime),
        _guarded("onnxruntime-gpu", _onnxruntime),
        *(_tensorrt(flavour, gpus) for flavour in (FULL, RTX)),
        _guarded("cuda-bindings", lambda: _cuda(gpus)),
        _guarded("openvino", lambda: "runs .onnx on CPUs (rows of vitrm-bench --peers)"),
    ]


def print_diagnosis() -> None:
    """Prints it as a table."""
    findings = diagnose()
    width = max(len(f.name) for f in findings)
    versions = [f.version or ("" if f.name in ("machine", "GPU") else "missing") for f in findings]
    column = max(map(len, versions))
    say(f"vitrm {__version__}")
    for finding, version in zip(findings, versions, strict=True):
        say(f"  {finding.name:{width}}  {version:{column}}  {finding.can}")


def _guarded(package: str, what: Callable[[], str]) -> Finding:
    """A package's finding, whatever its import does."""
    try:
        version = packages.version(package)
    except packages.PackageNotFoundError:
        return Finding(package, None, _MISSING.get(package, ""))
    try:
        return Finding(package, version, what())
    except Exception as error:  # a broken installation fails in ways of its own
        return Finding(package, version, f"installed, but does not work: {first_line(error)}")


_MISSING = {
    "torch": "trains and exports: pip install torch torchvision",
    "onnxruntime": 'runs .onnx on a CPU: pip install "vitrm[cpu]"',
    "onnxruntime-gpu": 'runs .onnx on CUDA: pip install "vitrm[gpu]", instead of onnxruntime',
    "cuda-bindings": f"runs plans: {INSTALL[RTX]}",
    "openvino": "a peer in benchmarks: pip install openvino",
}


def _gpu(gpus: Gpus) -> Finding:
    if not gpus.found:
        driver = f" (driver for CUDA {gpus.driver})" if gpus.driver else ""
        return Finding("GPU", None, f"none: {gpus.problem}{driver}")
    listed = "; ".join(f"{gpu}, {gpu.memory_bytes / 2**30:.0f} GiB" for gpu in gpus.found)
    return Finding("GPU", None, f"{listed}; driver for CUDA {gpus.driver}")


def _torch(gpus: Gpus) -> str:
    import torch

    if torch.cuda.is_available():
        return f"trains and exports, eager and torch.compile on CUDA {torch.version.cuda}"
    built = f"built for CUDA {torch.version.cuda}, which needs a GPU" if torch.version.cuda else "built without CUDA"
    reason = f"; sees none of the {len(gpus.found)} GPUs: check the driver's version" if gpus.found else ""
    return f"trains and exports, eager on the CPU ({built}{reason})"


def _onnxruntime() -> str:
    from vitrm.runtime.backends.onnxruntime.session import load_onnxruntime

    providers = load_onnxruntime().get_available_providers()
    names = ", ".join(p.removesuffix("ExecutionProvider") for p in providers)
    return f"runs .onnx; built with providers {names}"


def _tensorrt(flavour: str, gpus: Gpus) -> Finding:
    name = NAMES[flavour]
    try:
        api = load_tensorrt(flavour)
    except UserError as error:
        missing = "is not installed" in str(error)
        return Finding(name, None, INSTALL[flavour] if missing else str(error))
    present = gpus.found[0] if gpus.found else None
    targets = api.targets
    if targets is None:
        can = f"builds and runs plans for {present}" if present else f"builds for the GPU present, and {gpus.problem}"
    else:
        can = f"builds plans for {', '.join(targets)}, with or without a GPU; "
        if present is None:
            can += f"runs none here: {gpus.problem}"
        else:
            can += f"{'runs them' if present.sm in targets else 'runs none'} on the {present} here"
    return Finding(name, api.version, can)


def _cuda(gpus: Gpus) -> str:
    from cuda.bindings import runtime

    # They import where no call of theirs works: one that asks for nothing is tried.
    status, count = runtime.cudaGetDeviceCount()
    version = packages.version("cuda-bindings")
    if int(status):
        _, text = runtime.cudaGetErrorString(status)
        reason = gpus.problem or bindings_for(gpus.driver, version) or "check nvidia-smi"
        return f"runs no plans here: {text.decode()} (CUDA error {int(status)}); {reason}"
    slow = bindings_for(gpus.driver, version)
    return f"runs plans on {count} GPU{'s' * (count != 1)}" + (f"; {slow}" if slow else "")


def bindings_for(driver: str | None, version: str) -> str | None:
    """Names the cuda-bindings that fit a driver for CUDA `driver` ("12.8") better than `version`; None where it fits."""
    if driver is None:
        return None
    served, found = version_tuple(driver), version_tuple(version)
    wanted = '"cuda-bindings>=12.9.1,<13"' if served[0] == 12 else f'"cuda-bindings=={served[0]}.*"'
    if found[0] > served[0]:
        return f"the driver serves CUDA {driver}, these bindings need {found[0]}: pip install {wanted}"
    if found < (12, 9, 1):
        return f"before 12.9.1 threads wait for each other's calls: pip install {wanted}"
    return None
