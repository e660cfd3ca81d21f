"""JSON from anybody: what one reader would take for this and another for that, or trip over, is refused.

Numbers are finite, whole ones have 64 bits, no key comes twice, nothing is nested deeper than `MAX_DEPTH`, and every text
can be written as bytes, as a file's name is.  So a value that was read can be compared, printed and written again without surprises.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable
from typing import Any

MAX_DEPTH = 64
MAX_CONTAINERS = 200_000  # each takes a hundred times its two bytes to read
_TOO_DEEP = f"nested deeper than {MAX_DEPTH}"
_TOO_LONG = "a whole number of more than 64 bits"


def parse(text: str) -> Any:
    """The value of a JSON text.  Raises ValueError, with a short message, for anything else."""
    if text.count("{") + text.count("[") > MAX_CONTAINERS:
        raise ValueError(f"more than {MAX_CONTAINERS:,} lists and objects")
    try:
        value = json.loads(text, parse_constant=_constant, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        # Python itself refuses thousands of digits, with a message for programmers.
        raise ValueError(_TOO_LONG if "digits" in str(error) else str(error)) from None
    check(value)
    return value


def check(value: Any) -> None:
    """Raises ValueError unless `value` (of dicts, lists, texts and numbers, from any parser) is as this module promises."""
    level: list[Any] = [[value]]
    for _ in range(MAX_DEPTH + 1):
        inside: list[Any] = []
        for container in level:
            values = container
            if type(container) is dict:
                _check_texts(container)
                values = container.values()
            inside += _check_values(values)
        if not inside:
            return
        level = inside
    raise ValueError(_TOO_DEEP)


def canonical(value: Any) -> bytes:
    """The one way to write `value`: equal values give equal bytes, in every version of Python."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(value: Any) -> str:
    """SHA-256 of the canonical form of `value`, as hexadecimal: of its content, not of how a file spells it."""
    return hashlib.sha256(canonical(value)).hexdigest()


def _check_values(values: Collection[Any]) -> list[Any]:
    """Checks what a dict or list holds, except for the dicts and lists in it, which it returns."""
    # By type, not by value: what is long is a list of numbers or texts.
    for kind in set(map(type, values)):
        if kind in (dict, list):
            return [v for v in values if type(v) in (dict, list)] + _check_values(
                [v for v in values if type(v) not in (dict, list)]
            )
        of_kind: list[Any] = [v for v in values if type(v) is kind]
        if kind is str:
            _check_texts(of_kind)
        elif kind is int and not -(2**63) <= min(of_kind) <= max(of_kind) < 2**63:
            raise ValueError(_TOO_LONG)
        elif kind is float and not all(map(math.isfinite, of_kind)):
            raise ValueError("a number that is not finite, or beyond all floats")
    return []


def _check_texts(texts: Iterable[str]) -> None:
    for text in texts:
        if not text.isascii():
            try:
                # Half a character stands for a byte of a file's name that is no UTF-8, or for nothing.
                text.encode("utf-8", "surrogateescape")
            except UnicodeEncodeError:
                raise ValueError("half a character (a lone surrogate) in a text") from None


def _constant(name: str) -> float:
    raise ValueError(f"{name}, which is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:40]!r} twice")
    return made
