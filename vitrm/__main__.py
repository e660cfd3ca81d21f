"""`python -m vitrm`: lists the commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vitrm import __version__
from vitrm.command_line import COMMANDS, CommandParser
from vitrm.errors import run_command
from vitrm.system.terminal import say


def command(argv: Sequence[str] | None) -> None:
    """Prints the version and the commands."""
    CommandParser("python -m vitrm", "Lists the commands of vitrm.").parse_args(argv)
    say(f"vitrm {__version__}: train, export and measure recursive vision models\n")
    for name, does in COMMANDS.items():
        say(f"  {name:14} {does}")
    say("\nEach command explains itself with --help.")


if __name__ == "__main__":
    sys.exit(run_command(command))
