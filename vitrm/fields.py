"""Fields of a settings dataclass: each declares its type, default, range, unit and help once.

    image_size: int = whole(32, 1, 4096, "height and width of the input", unit="pixels")

Everything else follows: `check` validates all values, TOML files take the names as keys, and vitrm.command_line makes a
flag of each field.  A field that is named with `group` opens a group of `--help`, in which those after it stand, too.

Ranges are there so that no setting, whoever wrote the file that it stands in, makes a process allocate or loop without end.
Imports neither torch nor numpy.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from vitrm.errors import UserError

_SETTING = "setting"  # the key of a field's `Setting` in its metadata
NONE = "none"  # None on a command line
UNBOUNDED = 1e30  # a bound of numbers that need none


class Rule(Protocol):
    """The values that a field accepts."""

    def accepted(self, value: Any) -> Any:
        """`value` in the field's own type.  Raises ValueError for one that the field does not accept."""

    def parsed(self, text: str) -> Any:
        """The value that `text` stands for on a command line; its range is not checked.  Raises ValueError."""

    @property
    def brief(self) -> str:
        """The range for `--help`, empty where there is none to speak of."""

    @property
    def placeholder(self) -> str:
        """A word for the value in `--help`, where the field has no unit."""

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

    def parsed(self, text: str) -> int:
        return int(text)

    @property
    def brief(self) -> str:
        return f"{self.low:,} to {self.high:,}" if self.high < 1 << 20 else f"at least {self.low:,}"

    @property
    def placeholder(self) -> str:
        return "N"

    def __str__(self) -> str:
        return f"a whole number from {self.low:,} to {self.high:,}"


@dataclass(frozen=True)
class Side(Whole):
    """Sides of a square, as whole numbers; height and width are refused with what to do instead."""

    def accepted(self, value: Any) -> int:
        if isinstance(value, (list, tuple)):
            raise _not_square(value)
        return super().accepted(value)

    def parsed(self, text: str) -> int:
        sides = re.split("[,x×]", text)
        if len(sides) == 2 and all(side.strip().isdecimal() for side in sides):
            raise _not_square(text)
        return super().parsed(text)


def _not_square(value: Any) -> UserError:
    return UserError(
        f"image_size is {shown(value, quoted=False)}, expected one number: models take square images; --fit letterbox brings wide or tall "
        "pictures to them whole, with bars, and --fit squash without"
    )


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

    def parsed(self, text: str) -> float:
        return float(text)

    @property
    def brief(self) -> str:
        if self.high < UNBOUNDED:
            return str(self).removeprefix("a number ")
        return f"{'above' if self.above else 'at least'} {self.low:g}"

    @property
    def placeholder(self) -> str:
        return "X"

    def __str__(self) -> str:
        return f"a number in {'(' if self.above else '['}{self.low:g}, {self.high:g}{')' if self.below else ']'}"


@dataclass(frozen=True)
class Three:
    """Three numbers, one per color channel."""

    each: Real | Whole

    def accepted(self, value: Any) -> tuple[float, float, float]:
        if not isinstance(value, (list, tuple)) or len(value) != 3:
            raise ValueError
        r, g, b = (self.each.accepted(v) for v in value)
        return r, g, b

    def parsed(self, text: str) -> list[float]:
        return [self.each.parsed(part) for part in text.split(",")]

    @property
    def brief(self) -> str:
        return f"each {self.each.brief}"

    @property
    def placeholder(self) -> str:
        return "X,X,X"

    def __str__(self) -> str:
        return f"three numbers, each {str(self.each).removeprefix('a number ').removeprefix('a ')}"


@dataclass(frozen=True)
class Several:
    """A list of 1 to 16 values that another rule accepts each."""

    each: Rule

    def accepted(self, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= 16:
            raise ValueError
        return tuple(self.each.accepted(v) for v in value)

    def parsed(self, text: str) -> list[Any]:
        return [self.each.parsed(part) for part in text.split(",")]

    @property
    def brief(self) -> str:
        return f"each {self.each.brief}"

    @property
    def placeholder(self) -> str:
        return f"{self.each.placeholder},{self.each.placeholder},…"

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

    def parsed(self, text: str) -> Any:
        return type(self.values[0])(text)

    @property
    def brief(self) -> str:
        return ""

    @property
    def placeholder(self) -> str:
        return "{" + ",".join(map(str, self.values)) + "}"

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

    def parsed(self, text: str) -> bool:
        if text not in ("true", "false"):
            raise ValueError
        return text == "true"

    @property
    def brief(self) -> str:
        return ""

    @property
    def placeholder(self) -> str:
        return "{true,false}"

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class OrNone:
    """None, or what another rule accepts."""

    rule: Rule

    def accepted(self, value: Any) -> Any:
        return None if value is None else self.rule.accepted(value)

    def parsed(self, text: str) -> Any:
        return None if text == NONE else self.rule.parsed(text)

    @property
    def brief(self) -> str:
        return self.rule.brief

    @property
    def placeholder(self) -> str:
        return self.rule.placeholder

    def __str__(self) -> str:
        return str(self.rule)


@dataclass(frozen=True)
class Text:
    """A text."""

    def accepted(self, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError
        return value

    def parsed(self, text: str) -> str:
        return text

    @property
    def brief(self) -> str:
        return ""

    @property
    def placeholder(self) -> str:
        return "TEXT"

    def __str__(self) -> str:
        return "a text"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A field's declaration beside its name, type and default."""

    rule: Rule
    help: str = ""
    unit: str = ""  # of the value, or another word for it
    flag: str = ""  # on the command line, where it is not the field's name
    group: str = ""  # of `--help` that begins here

    @property
    def explained(self) -> str:
        """The help text with the range."""
        if not self.rule.brief:
            return self.help
        if self.help.endswith(")"):  # where the default stands
            return f"{self.help[:-1]}; {self.rule.brief})"
        return f"{self.help} ({self.rule.brief})"

    @property
    def placeholder(self) -> str:
        """A word for the value in `--help`."""
        return self.unit.upper() or self.rule.placeholder


def whole(default: int, low: int, high: int, help: str, **more: str) -> Any:
    """A field of whole numbers from `low` to `high`; `more`: unit, flag or group of its `Setting`."""
    return _field(default, Whole(low, high), help, more)


def side(default: int, low: int, high: int, help: str) -> Any:
    """A field of the side of a square, `low` to `high` pixels."""
    return _field(default, Side(low, high), help, {"unit": "pixels"})


def whole_or_none(low: int, high: int, help: str, **more: str) -> Any:
    """A field of whole numbers from `low` to `high`, or None, which is its default."""
    return _field(None, OrNone(Whole(low, high)), help, more)


def wholes(default: tuple[int, ...], low: int, high: int, help: str, **more: str) -> Any:
    """A field of 1 to 16 whole numbers from `low` to `high`."""
    return _field(default, Several(Whole(low, high)), help, more)


def real(
    default: float, low: float, high: float, help: str, *, above: bool = False, below: bool = False, **more: str
) -> Any:
    """A field of numbers from `low` to `high`; `above`: not `low` itself, `below`: not `high` itself."""
    return _field(default, Real(low, high, above, below), help, more)


def three(default: tuple[float, float, float], low: float, high: float, help: str, **more: str) -> Any:
    """A field of three numbers from `low` to `high`."""
    return _field(default, Three(Real(low, high)), help, more)


def three_whole(default: tuple[int, int, int], low: int, high: int, help: str, **more: str) -> Any:
    """A field of three whole numbers from `low` to `high`."""
    return _field(default, Three(Whole(low, high)), help, more)


def choice(default: Any, *others: Any, help: str, **more: str) -> Any:
    """A field of one of some values."""
    return _field(default, Choice((default, *others)), help, more)


def choices_or_none(*values: str, help: str, **more: str) -> Any:
    """A field of one or several of some words, or None, which is its default."""
    return _field(None, OrNone(Several(Choice(values))), help, more)


def flag(default: bool, help: str, **more: str) -> Any:
    """A field that is true or false."""
    return _field(default, Flag(), help, more)


def flag_or_none(help: str, **more: str) -> Any:
    """A field that is true, false, or None, which is its default."""
    return _field(None, OrNone(Flag()), help, more)


def text(default: str, help: str, **more: str) -> Any:
    """A field of any text."""
    return _field(default, Text(), help, more)


def text_or_none(help: str, **more: str) -> Any:
    """A field of any text, or None, which is its default."""
    return _field(None, OrNone(Text()), help, more)


def _field(default: Any, rule: Rule, help: str, more: dict[str, str]) -> Any:
    return dataclasses.field(default=default, metadata={_SETTING: Setting(rule=rule, help=help, **more)})


def declared(settings: Any) -> dict[str, Setting]:
    """The declared fields of a settings dataclass (or an instance of it), by name."""
    return {f.name: f.metadata[_SETTING] for f in dataclasses.fields(settings) if _SETTING in f.metadata}


def check(settings: Any) -> None:
    """Brings every field of the (frozen) dataclass `settings` to its own type.  Raises `UserError` naming one out of range."""
    for name, setting in declared(settings).items():
        object.__setattr__(settings, name, checked(name, getattr(settings, name), setting.rule))


def checked(name: str, value: Any, rule: Rule) -> Any:
    """`value` in the type of `rule`.  Raises `UserError` that calls it `name`."""
    try:
        return rule.accepted(value)
    except (ValueError, OverflowError):  # the latter from a whole number beyond all floats
        meant = did_you_mean(value, rule.values) if isinstance(rule, Choice) else ""
        raise UserError(f"{name} is {shown(value)}, expected {rule}{meant}") from None


def did_you_mean(word: Any, known: Iterable[Any]) -> str:
    """The end of a message, ": did you mean …?", with the one of `known` spelled like `word`; empty where none is."""
    from difflib import get_close_matches  # only for errors

    similar = (
        get_close_matches(word, [name for name in known if isinstance(name, str)], 1) if isinstance(word, str) else []
    )
    return f": did you mean {similar[0]}?" if similar else ""


def from_values(
    make: Callable[..., Any],
    values: dict[str, Any],
    where: str,
    what: str,
    why_unknown: Callable[[str], str] | None = None,
) -> Any:
    """`make(**values)` for a dataclass `make`, called `what`.

    Raises `UserError` that begins with `where`; of an unknown key it says what `why_unknown` does, where that is given.
    """
    known = [f.name for f in dataclasses.fields(make)]  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        named = ", ".join(shown(name, quoted=False) for name in unknown[:5])
        reason = why_unknown(unknown[0]) if why_unknown else ""
        raise UserError(
            f"{where}: unknown key {named} for {what}{reason}; known are {', '.join(known)}{did_you_mean(unknown[0], known)}"
        )
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
