"""A command line on the page: it breaks between flags, not inside one."""

from __future__ import annotations

from markupsafe import Markup


def flags(command: str) -> list[str]:
    """Returns the command's parts that belong on one line: its name, every flag with its value, every other word."""
    parts: list[str] = []
    takes_value = False
    for word in command.split():
        if takes_value and not word.startswith("-"):
            parts[-1] += f" {word}"
            takes_value = False
        else:
            parts.append(word)
            takes_value = word.startswith("--") and "=" not in word
    return parts


def marked_up(command: str) -> Markup:
    """Returns it as code in which the style keeps every part together."""
    spans = Markup(" ").join(Markup("<span>{}</span>").format(part) for part in flags(command))
    return Markup('<code class="command">{}</code>').format(spans)
