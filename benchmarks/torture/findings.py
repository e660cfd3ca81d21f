"""What a part of the torture found, ready for JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

# What an input or an act may come to.  The rest are findings.
# "backend": ONNX Runtime itself died of a graph that was made to fit its digest; a digest tells damage, not malice.
GOOD = ("same", "altered", "refused", "killed", "edge", "backend")
KINDS = {
    "traceback": "an exception that is not a UserError",
    "hang": "no end within the time limit",
    "crash": "the process died of a signal",
    "memory": "far more memory than the file is worth",
    "damage": "damaged weights or graph accepted, with other answers",
    "contract": "accepted or written what must not be",
    "message": "an error that is not one clean line",
    "different": "another result than the undisturbed one",
    "lost": "a file lost, half-written or left behind",
}


@dataclass(frozen=True)
class Finding:
    """One thing that should not have happened."""

    part: str
    subject: str  # the format, command or backend
    kind: str  # of KINDS
    case: str  # which input or act
    detail: str
    repeat: str  # the command that shows it again

    def __str__(self) -> str:
        return f"! {self.part}: {self.subject}: {self.kind}: {self.case!r}\n    {self.detail!r}\n    {self.repeat}"

    @property
    def signature(self) -> tuple[str, str, str]:
        """Equal for findings that likely have one cause: numbers, names and quoted values left out."""
        return self.subject, self.kind, re.sub(r"'[^']*'|\"[^\"]*\"|[\d.e+-]*\d[\d.e+-]*|/\S+", "…", self.detail)[:160]


@dataclass
class Part:
    """What came of one part."""

    name: str
    cases: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)  # of GOOD and KINDS
    findings: list[Finding] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)  # what could not be tried here, and why
    seconds: float = 0.0

    def count(self, outcome: str, number: int = 1) -> None:
        """So many more cases that came to `outcome`."""
        self.cases += number
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + number

    def found(self, finding: Finding, cases: int = 1) -> None:
        """A finding, which `cases` cases came to; the first of its signature is shown at once."""
        self.count(finding.kind, cases)
        if all(finding.signature != other.signature for other in self.findings):
            print(finding, flush=True)
        self.findings.append(finding)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Part:
        """The inverse of `to_dict`."""
        return cls(**{**values, "findings": [Finding(**f) for f in values["findings"]]})


def grouped(findings: Iterable[Finding]) -> list[tuple[Finding, int]]:
    """The first finding of each signature, and how many share it, most frequent first."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.signature, []).append(finding)
    return sorted(((some[0], len(some)) for some in groups.values()), key=lambda group: -group[1])
