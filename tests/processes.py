"""Other processes, for tests that must not depend on how busy the machine is."""

from __future__ import annotations

import resource
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

# Put before a program: no module of torch can be imported in it.
WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision"):
            raise ImportError(f"{name} is refused")
sys.meta_path.insert(0, Refuse())
"""
PATIENCE = 600  # seconds until a process that should have ended is given up: for a hang, not for a busy machine


def timed(argv: Sequence[str], **options: Any) -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs a command, its output captured as text; also gives the seconds of CPU time that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, check=False, **options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def interruptible(argv: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Starts a command that SIGINT interrupts: from a background job, as in some CI, it would inherit an ignored one."""
    return subprocess.Popen(argv, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)
