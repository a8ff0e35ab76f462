"""What the command line tells of itself."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
from collections.abc import Iterator
from typing import Any

import typer.main
from typer.testing import CliRunner

from sera_serve.cli import build_cli


def commands_of(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, each in getattr(command, "commands", {}).items():
        yield from commands_of(each, (*path, name))


def test_examples_in_the_help_are_commands_that_are_taken() -> None:
    found = set()
    for path, command in commands_of(typer.main.get_command(build_cli())):
        for example in re.findall(r"Example: sera-serve (.+)", command.help or ""):
            arguments = shlex.split(example)
            assert tuple(arguments[: len(path)]) == path
            # Raises where an option or an argument is not taken, or missing.
            command.make_context(path[-1], arguments[len(path) :])
            found.add(" ".join(path))
    assert {"adapters import", "adapters export", "adapters combine", "analyze", "keys create"} <= found


def test_the_version_is_told() -> None:
    found = CliRunner().invoke(build_cli(), ["--version"])
    assert (found.exit_code, found.output) == (0, f"sera-serve {importlib.metadata.version('sera-serve')}\n")
