"""Fields of a settings dataclass: each states its default and its range once, and `check` holds all values to them.

    dim: int = whole(384, 1, 65_536)  # D: token width

Ranges are there so that no setting, whoever wrote the file that it stands in, makes a process allocate or loop without end.
Imports neither torch nor numpy.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from vitrm.errors import UserError

_RULE = "rule"


class Rule(Protocol):
    """What a field accepts."""

    def accepted(self, value: Any) -> Any:
        """`value` in the field's own type.  Raises ValueError for one that the field does not accept."""

    def __str__(self) -> str:
        """The values accepted, as words after "expected"."""


@dataclass(frozen=True)
class Whole:
    """Whole numbers from `low` to `high`."""

    low: int
    high: int

    def accepted(self, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not self.low <= value <= self.high:
            raise ValueError
        return value

    def __str__(self) -> str:
        return f"a whole number from {self.low:,} to {self.high:,}"


@dataclass(frozen=True)
class Real:
    """Numbers from `low` to `high`; `above`: not `low` itself, `below`: not `high` itself."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def accepted(self, value: Any) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not self.low <= value <= self.high:
            raise ValueError
        if (self.above and value == self.low) or (self.below and value == self.high):
            raise ValueError
        return float(value)

    def __str__(self) -> str:
        return f"a number in {'(' if self.above else '['}{self.low:g}, {self.high:g}{')' if self.below else ']'}"


@dataclass(frozen=True)
class Three:
    """Three numbers, one per color channel."""

    each: Real

    def accepted(self, value: Any) -> tuple[float, float, float]:
        if not isinstance(value, (list, tuple)) or len(value) != 3:
            raise ValueError
        r, g, b = (self.each.accepted(v) for v in value)
        return r, g, b

    def __str__(self) -> str:
        return f"three numbers, each {str(self.each).removeprefix('a number ')}"


@dataclass(frozen=True)
class Several:
    """A list of 1 to 16 values that another rule accepts each."""

    each: Rule

    def accepted(self, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= 16:
            raise ValueError
        return tuple(self.each.accepted(v) for v in value)

    def __str__(self) -> str:
        return f"a list, each {str(self.each).removeprefix('a ')}"


@dataclass(frozen=True)
class Choice:
    """One of some values of one type."""

    values: tuple[Any, ...]

    def accepted(self, value: Any) -> Any:
        if type(value) is not type(self.values[0]) or value not in self.values:
            raise ValueError
        return value

    def __str__(self) -> str:
        *others, last = map(repr, self.values)
        return f"{', '.join(others)} or {last}"


@dataclass(frozen=True)
class Flag:
    """True or false."""

    def accepted(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class OrNone:
    """None, or what another rule accepts."""

    rule: Rule

    def accepted(self, value: Any) -> Any:
        return None if value is None else self.rule.accepted(value)

    def __str__(self) -> str:
        return str(self.rule)


def whole(default: int, low: int, high: int) -> Any:
    """A field of whole numbers from `low` to `high`."""
    return _field(default, Whole(low, high))


def whole_or_none(low: int, high: int) -> Any:
    """A field of whole numbers from `low` to `high`, or None, which is its default."""
    return _field(None, OrNone(Whole(low, high)))


def wholes(default: tuple[int, ...], low: int, high: int) -> Any:
    """A field of 1 to 16 whole numbers from `low` to `high`."""
    return _field(default, Several(Whole(low, high)))


def real(default: float, low: float, high: float = 1e30, *, above: bool = False, below: bool = False) -> Any:
    """A field of numbers from `low` to `high`; `above`: not `low` itself, `below`: not `high` itself."""
    return _field(default, Real(low, high, above, below))


def three(default: tuple[float, float, float], low: float, high: float) -> Any:
    """A field of three numbers from `low` to `high`."""
    return _field(default, Three(Real(low, high)))


def choice(default: Any, *others: Any) -> Any:
    """A field of one of some values."""
    return _field(default, Choice((default, *others)))


def flag(default: bool) -> Any:
    """A field that is true or false."""
    return _field(default, Flag())


def _field(default: Any, rule: Rule) -> Any:
    return dataclasses.field(default=default, metadata={_RULE: rule})


def check(settings: Any) -> None:
    """Brings every field of the (frozen) dataclass `settings` to its own type.  Raises `UserError` naming one out of range."""
    for field in dataclasses.fields(settings):
        if _RULE in field.metadata:
            value = checked(field.name, getattr(settings, field.name), field.metadata[_RULE])
            object.__setattr__(settings, field.name, value)


def checked(name: str, value: Any, rule: Rule) -> Any:
    """`value` in the type of `rule`.  Raises `UserError` that calls it `name`."""
    try:
        return rule.accepted(value)
    except (ValueError, OverflowError):  # the latter from a whole number beyond all floats
        raise UserError(f"{name} is {shown(value)}, expected {rule}") from None


def from_values(make: Callable[..., Any], values: dict[str, Any], where: str, what: str) -> Any:
    """`make(**values)` for a dataclass `make`, called `what`.  Raises `UserError` that begins with `where`."""
    known = [f.name for f in dataclasses.fields(make)]  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        named = ", ".join(shown(name, quoted=False) for name in unknown[:5])
        raise UserError(f"{where}: unknown key {named} for {what}; known are {', '.join(known)}")
    try:
        return make(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out thousands of digits, and nobody reads them.
        return repr(x) if x.bit_length() <= 80 else f"a whole number of {x.bit_length():,} bits"


def shown(value: Any, quoted: bool = True) -> str:
    """`value` for a message of one line: never long, whatever it is."""
    short = _Short()
    short.maxlevel, short.maxstring, short.maxother = 2, 80, 80
    text = short.repr(value)
    return text if quoted or not isinstance(value, str) else text[1:-1]
