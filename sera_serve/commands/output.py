"""What commands share: options, refusals, and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from adapters_store import AdapterStore, StoreError
from sera_serve.access import COMMAND, AccessDatabase, Action, AuditLog
from sera_serve.errors import SeraServeError
from sera_serve.terminal import PlainConsole, fail, printable, say, system_fault

StoreOption = Annotated[Path, typer.Option("--store", help="Directory of the adapter store.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


@contextmanager
def refusals() -> Iterator[None]:
    """Print an error of the block on stderr, and exit with status 1.

    Where the reader of stdout has left, as `head` does, the command ends with this status and without a word.
    """
    try:
        yield
    except (StoreError, SeraServeError) as error:
        fail("sera-serve", error.message, 1)
    except BrokenPipeError:
        # Click ends the command.
        raise
    except OSError as error:
        fail("sera-serve", system_fault(error), 1)


def access_of(store: Path, create: bool = False) -> AccessDatabase:
    """The access database of a store; raises NotAStore for a directory that is something else."""
    return AccessDatabase(AdapterStore(store, create=create).root)


def record(store: Path, action: Action, *, tenant: str, target: str, **details: str | int | None) -> None:
    """Append a line to the audit log of a store: what a command has done."""
    # The server alone begins new files: commands do not know its settings.
    log = AuditLog(store, max_mib=0)
    log.record(action, COMMAND, tenant=tenant, target=target, **details)
    log.close()


def report(as_json: bool, text: str, **fields: Any) -> None:
    """Print a result: as one JSON object, or as a text."""
    if as_json:
        print_json(fields)
    else:
        say(text)


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object."""
    typer.echo(json_text(value))


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON, in which characters that could act on a terminal are JSON's own escapes."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    if printable(text) == text:
        return text
    # Outside its strings, JSON has ASCII alone.
    return "".join(each if printable(each) == each else json.dumps(each)[1:-1] for each in text)


def one_line(value: Any) -> str:
    """A value as JSON; text as it is, without line breaks."""
    return value.replace("\n", "\\n") if isinstance(value, str) else json_text(value)


def console(stderr: bool = False) -> PlainConsole:
    """A console that folds to the terminal's width."""
    shown = PlainConsole(stderr=stderr)
    # A pipe has no width to fold to; cut ids would be of no use to the next program.
    return shown if shown.is_terminal else PlainConsole(stderr=stderr, width=200)
