"""Command lines: the parser that all commands share, and flags made of declared settings (vitrm.fields).

Built on argparse: it imports in under 10 ms and is there on every device.  tyro, cyclopts and jsonargparse, which make
flags of dataclasses too, take 100 to 150 ms to import and would have to be installed where artifacts run; what they would
save is `add_setting` below.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

from vitrm import __version__
from vitrm.errors import UserError
from vitrm.fields import Flag, OrNone, Setting, did_you_mean, shown

COMMANDS = {
    "vitrm-train": "train a model into a run folder",
    "vitrm-export": "export a run to ONNX, or to a TensorRT plan",
    "vitrm-bench": "measure exported files: latency, accuracy, agreement with PyTorch",
    "vitrm-predict": "classify pictures with an exported file",
}
_CONVERSION = re.compile(r"invalid (?P<type>int|float) value: (?P<value>.*)", re.DOTALL)  # of argparse
_WORDS = {"int": "a whole number", "float": "a number"}


class CommandParser(argparse.ArgumentParser):
    """A parser that explains a mistake in one line, with a suggestion, and knows --version.

    A mistake is a `UserError`, which commands print without a page of usage.  Flags cannot be abbreviated: the next version
    may have another one that begins alike.
    """

    def __init__(
        self,
        prog: str,
        description: str,
        epilog: str | None = None,
        usage: str | None = None,
        elsewhere: Mapping[str, str] | None = None,
    ) -> None:
        """`elsewhere`: flags that other tools have, with what takes their place here, for the message where one is given."""
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._elsewhere = elsewhere or {}
        self.add_argument(
            "--version", action="version", version=f"vitrm {__version__}", help="print the version of vitrm and end"
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """The parsed arguments.  Raises `UserError`."""
        words = sys.argv[1:] if args is None else list(args)
        self._check_flags(words)  # first: argparse would rather complain of an argument that is missing
        parsed, rest = self.parse_known_args(words, namespace)
        if rest:
            self.error(f"{rest[0]} is one argument too many")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Raises `UserError` with argparse's message about what is wrong."""
        message = message.removeprefix("argument ")
        conversion = _CONVERSION.search(message)
        if conversion:
            flag = message[: conversion.start()].rstrip(": ")
            message = f"{flag} is {conversion['value']}, expected {_WORDS[conversion['type']]}"
        raise UserError(f"{message} (see {self.prog} --help)")

    def _check_flags(self, words: Sequence[str]) -> None:
        """Raises `UserError` for a flag that does not exist."""
        for word in words:
            if word == "--":
                return
            flag = word.partition("=")[0]
            # argparse takes a word with a space in it for a value, whatever it begins with.
            if flag.startswith("--") and " " not in word and flag not in self._option_string_actions:
                if flag in self._elsewhere:
                    raise UserError(f"{flag} is unknown: {self._elsewhere[flag]}")
                meant = did_you_mean(flag, self._option_string_actions)
                raise UserError(f"{shown(flag, quoted=False)} is unknown{meant or f': see {self.prog} --help'}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Checks a value against an argument's choices, as argparse does, and suggests one of them."""
        if action.choices is not None and value not in action.choices:
            meant = did_you_mean(value, action.choices)
            raise argparse.ArgumentError(
                action, f"{shown(value)} is none of {', '.join(map(str, action.choices))}{meant}"
            )


def add_setting(parser: Any, name: str, *settings: Setting, help: str = "") -> None:
    """Adds the flag of a declared setting to a parser or group of arguments.

    Left out on the command line, the setting is no attribute of what `parse_args` gives.

    Args:
        parser: a parser, or a group of one
        name: of the field
        settings: its declaration, or those of several dataclasses whose fields share the name
        help: instead of the declaration's own
    """
    first = settings[0]
    flag = first.flag or f"--{name.replace('_', '-')}"
    more: dict[str, Any] = {"default": argparse.SUPPRESS, "help": (help or first.explained).replace("%", "%%")}
    if isinstance(first.rule.rule if isinstance(first.rule, OrNone) else first.rule, Flag):
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **more)
    else:
        parser.add_argument(flag, type=partial(_parsed, flag, settings), metavar=first.placeholder, **more)


def _parsed(flag: str, settings: Sequence[Setting], text: str) -> Any:
    """The value of a setting in `text`, a whole number if it may be one.  Raises `UserError`."""
    values = []
    for setting in settings:
        with suppress(ValueError):
            values.append(setting.rule.parsed(text))
    if not values:
        raise UserError(f"{flag} is {shown(text)}, expected {settings[0].rule}")
    # Where kinds of models differ, a number of any takes a whole one, too.
    return next((value for value in values if type(value) is int), values[0])
