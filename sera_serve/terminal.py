"""Text for a terminal: names, labels and messages may be written by strangers, and must not act on the terminal.

Commands and the trainer share it.
"""

from __future__ import annotations

import unicodedata
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
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


def system_fault(error: OSError) -> str:
    """What the system says of a file, after the file's name. The error of a full disk has no name."""
    reason = error.strerror or str(error) or type(error).__name__
    return reason if error.filename is None else f"{error.filename}: {reason}"


class PlainConsole(Console):
    """A console that shows each text as it is: without rich's markup, codes of emoji, and control characters."""

    def __init__(self, **options: Any) -> None:
        """Set up; `options` are rich's own."""
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make a text of a string; rich does so with each string that is printed, and with each cell of a table."""
        return super().render_str(printable(text), **options)


def show_table(console: Console, table: Table) -> None:
    """Print a table. On a console that is too narrow for it, each row is a block of lines, so that nothing is cut."""
    unbounded = console.options.update_width(100_000)
    # Rich shrinks columns in proportion: it may cut a word also where all words have room.
    if Measurement.get(console, unbounded, table).maximum <= console.width:
        console.print(table)
        return
    blocks = facts_table()
    for row in zip(*(column.cells for column in table.columns), strict=True):
        for column, cell in zip(table.columns, row, strict=True):
            blocks.add_row(column.header, cell)
        blocks.add_row()
    console.print(blocks)


def facts_table() -> Table:
    """Make a table of a name and its value in each row; a value longer than its line goes on in the next line."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _shown(character: str) -> str:
    # Of Unicode's categories: control, format (such as marks of direction), surrogates, and separators of lines.
    category = unicodedata.category(character)
    if character == "\n" or (category[0] != "C" and category not in ("Zl", "Zp")):
        return character
    return character.encode("unicode_escape").decode("ascii")
