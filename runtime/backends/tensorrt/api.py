"""The one place that imports TensorRT: `tensorrt` 10.3 … 11 or TensorRT for RTX, which share an API.

Everything used is in TensorRT 10.3 (JetPack 6); what only a newer one or TensorRT for RTX has is asked for first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from vitrm.errors import UserError, first_line

FULL, RTX = "full", "rtx"
MODULES = {FULL: "tensorrt", RTX: "tensorrt_rtx"}
NAMES = {FULL: "TensorRT", RTX: "TensorRT for RTX"}
INSTALL = {
    FULL: 'pip install "vitrm[tensorrt]" (on Jetson it comes with JetPack)',
    RTX: 'pip install "vitrm[tensorrt-rtx]"',
}
OLDEST = (10, 3)
ERRORS = ("ERROR", "INTERNAL_ERROR")  # severities of what went wrong


@dataclass(frozen=True)
class TensorRT:
    """An installed TensorRT."""

    module: Any
    flavour: str  # full or rtx
    version: str

    def __str__(self) -> str:
        return f"{NAMES[self.flavour]} {self.version}"

    @property
    def targets(self) -> tuple[str, ...] | None:
        """The compute capabilities it builds for, as "sm89", whatever GPU is present; None: for the one present alone."""
        capabilities = getattr(self.module, "ComputeCapability", None)
        if capabilities is None:
            return None
        names = [name.lower() for name in capabilities.__members__ if name.startswith("SM")]
        return tuple(sorted(names, key=lambda name: int(name[2:])))


def installed() -> tuple[str, ...]:
    """The flavours whose package is there; importing it may still fail."""
    return tuple(flavour for flavour, module in MODULES.items() if find_spec(module) is not None)


def load_tensorrt(flavour: str | None = None) -> TensorRT:
    """Imports TensorRT of that flavour, or (None) the full one, else the one for RTX.

    Raises `UserError` when it is not installed, does not import or is too old.
    """
    there = installed()
    if flavour is None:
        if not there:
            raise UserError(
                f"a TensorRT plan needs TensorRT, which is not installed: {INSTALL[RTX]}, which builds without a GPU, for "
                f"GeForce and RTX cards; {INSTALL[FULL]} for all others"
            )
        flavour = there[0]
    elif flavour not in there:
        raise UserError(f"{NAMES[flavour]} is not installed: {INSTALL[flavour]}")
    name = MODULES[flavour]
    try:
        module = import_module(name)
        version = str(module.__version__)
    except Exception as error:  # its loader raises what its libraries' absence makes of it
        raise UserError(f"{name} is installed but does not import ({first_line(error)}): {INSTALL[flavour]}") from None
    if flavour == FULL and version_tuple(version)[:2] < OLDEST:
        raise UserError(f"TensorRT {version} is installed, expected 10.3 or later: {INSTALL[FULL]}")
    return TensorRT(module, flavour, version)


def version_tuple(version: str) -> tuple[int, ...]:
    """The numbers of a version like 10.3.0.26; a part that is none ends them."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def make_log(trt: Any, told: Callable[[str, str], None] = lambda severity, text: None) -> Any:
    """A new ILogger that keeps TensorRT's messages: `messages` as pairs of severity ("ERROR") and text, `errors` alone.

    Each is also `told` as it comes.
    """

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            name = str(severity).rsplit(".", 1)[-1]
            if name != "VERBOSE":
                self.messages.append((name, message))
                told(name, message)

        @property
        def errors(self) -> list[str]:
            return [text for severity, text in self.messages if severity in ERRORS]

    return Log()
