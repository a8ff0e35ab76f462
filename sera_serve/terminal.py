"""Text for a terminal: names, labels and messages may be written by strangers, and must not act on the terminal.

Commands and the trainer share it.
"""

from __future__ import annotations

import unicodedata
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text


def printable(text: str) -> str:
    r"""Return a text with `\x1b` and the like for characters that could act on a terminal; line breaks stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def say(text: str, err: bool = False) -> None:
    """Print a text; characters that could act on a terminal are written as escapes."""
    typer.echo(printable(text), err=err)


def fail(program: str, message: str, status: int) -> NoReturn:
    """End a command with a message on stderr."""
    say(f"{program}: {message}", err=True)
    raise typer.Exit(status)


class PlainConsole(Console):
    """A console that shows each text as it is: without rich's markup, codes of emoji, and control characters."""

    def __init__(self, **options: Any) -> None:
        """Set up; `options` are rich's own."""
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make a text of a string; rich does so with each string that is printed, and with each cell of a table."""
        return super().render_str(printable(text), **options)


def _shown(character: str) -> str:
    # Of Unicode's categories: control, format (such as marks of direction), surrogates, and separators of lines.
    category = unicodedata.category(character)
    if character == "\n" or (category[0] != "C" and category not in ("Zl", "Zp")):
        return character
    return character.encode("unicode_escape").decode("ascii")
