"""What anybody may put into a file, and the little memory in which it has to be refused."""

from __future__ import annotations

import copy
import json
import random
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vitrm.errors import UserError

# Written into JSON and TOML as they stand.
NUMBERS = ("-1", "0", "1", "2", "1e9", "1000000000", "-5", "2147483648", "9223372036854775807", "9223372036854775808")
NUMBERS += ("1e308", "-1e308", "1e999", "1e-320", "0.5", "0.1", "9" * 5000, "-" + "9" * 5000)
TEXTS = (
    '""',
    '"x"',
    '"nan"',
    '"\\n\\u001b[31m"',
    '"\\ud800"',
    '"' + "a" * 5000 + '"',
    '"\\u0000"',
    '"../../x"',
    '"１"',
)
OTHERS = (
    "null",
    "true",
    "NaN",
    "-Infinity",
    "[]",
    "{}",
    "[0]",
    "[0, 0, 0]",
    '{"a": 1, "a": 2}',
    "[" * 5000,
    "[" * 70 + "]" * 70,
)
RAW = (*NUMBERS, *TEXTS, *OTHERS)
_MARK = "@raw@"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything inside `value`; of long lists the first two."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of `value` with `new` at `path`."""
    whole = copy.deepcopy(value)
    place = whole
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = new
    return whole


def mutants(value: dict[str, Any], count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """`count` JSON texts of `value` with something else in one place, every place in its turn, and what was changed."""
    dice, every = random.Random(seed), list(places(value))
    for i in range(count):
        path = every[i % len(every)]
        raw = dice.choice(RAW)
        text = json.dumps(changed(value, path, _MARK)).replace(f'"{_MARK}"', raw)
        yield f"{'.'.join(map(str, path))} = {raw[:60]}", text


@contextmanager
def little_memory(mib: int = 512) -> Iterator[None]:
    """This process may map that much more memory than it has."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (mib << 20), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def refused_or_read(what: str, seconds: float = 5) -> Iterator[list[str]]:
    """Passes for a `UserError` of one short line, whose text it appends to the list that it yields, and for none.

    `seconds` of the processor are far more than any refusal takes: they tell it from work that has begun.
    """
    said: list[str] = []
    start = time.process_time()
    try:
        yield said
    except UserError as error:
        said.append(str(error))
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:300]}") from error
    assert time.process_time() - start < seconds, what
    assert all("\n" not in text and len(text) < 2500 for text in said), what
