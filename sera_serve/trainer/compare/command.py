"""The command `train_adapter compare`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from sera_serve.errors import InvalidConfiguration, SeraServeError
from sera_serve.terminal import PlainConsole, fail, say, show_table, system_fault
from sera_serve.trainer.packages import check_packages


def compare_command(
    plan: Annotated[Path, typer.Argument(help="YAML file: bases, data, methods, seeds, settings, learning_rates.")],
    results: Annotated[
        Path | None,
        typer.Option(help="File of finished runs, one JSON object a line. Default: the plan's, or PLAN.results.jsonl."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the table (CSV, Markdown) and the plot. Default: beside --results.")
    ] = None,
    base: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER: another place of one of the plan's bases; may be repeated.")
    ] = None,
    adapters_python: Annotated[
        str | None,
        typer.Option(help="Python of an environment with the library adapters; houlsby and pfeiffer run in it."),
    ] = None,
    hold: Annotated[
        str | None,
        typer.Option(
            help="Command that must answer before each run, and is ended after it, such as 'flock machine.lock cat'."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="Make at most this many runs; 0 only shows.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Make runs again that failed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Last line of stdout: the table as one JSON object.")] = False,
) -> None:
    """Compare methods: every method in every size, on every data set, over every base, with every seed.

    Runs that are finished are kept; the same command goes on with the others. A kill loses the run under way only. A
    run that fails ends no other. The last thing is the table, also as CSV and Markdown, and a plot of score over
    parameters. The exit status is 1 if a run of the table has failed; the last lines of stderr say which, and why.

    Example: `train_adapter compare examples/paper/small.yaml`
    """
    with _told(2):
        check_packages()
    from sera_serve.trainer.compare.plan import read_plan
    from sera_serve.trainer.compare.results import ResultsFile
    from sera_serve.trainer.compare.runner import CompareRunner

    console = PlainConsole(stderr=True)
    with _told(2):
        places = dict(_pair(text) for text in base or ())
        compared = read_plan(plan, places)
        compared.check_files(plan)
        path = results or compared.results or plan.with_name(f"{plan.stem}.results.jsonl")
        name = path.name.removesuffix(".jsonl").removesuffix(".results")
        tables = [(output or path.parent) / f"{name}{suffix}" for suffix in (".csv", ".md", ".png")]
        compared.check_outputs(plan, [path, *tables])
        # Now, and not after the last run.
        tables[0].parent.mkdir(parents=True, exist_ok=True)
        runner = CompareRunner(
            compared,
            ResultsFile(path),
            console,
            adapters_python=adapters_python,
            hold=hold,
            retry_failed=retry_failed,
        )
    stopped = False
    with _told(1):
        try:
            if limit != 0:
                runner.run(limit)
        except KeyboardInterrupt:
            stopped = True
    failures = _show(runner, path, tables, as_json)
    for line in failures:
        say(line, err=True)
    if stopped:
        _fail("stopped; the same command goes on with the runs that are left", 130)
    if failures:
        _fail("runs of the table have failed; --retry-failed makes them again", 1)


@contextmanager
def _told(status: int) -> Iterator[None]:
    """End the command with a message where the block is refused, or the system refuses a file."""
    try:
        yield
    except SeraServeError as error:
        _fail(error.message, status)
    except OSError as error:
        _fail(system_fault(error), status)


def _fail(message: str, status: int) -> NoReturn:
    fail("train_adapter compare", message, status)


def _show(runner: Any, path: Path, tables: list[Path], as_json: bool) -> list[str]:
    """Write and print the table. Return a line for each of its places in which a run has failed."""
    from dataclasses import asdict

    from sera_serve.trainer.compare.plot import plot_scores
    from sera_serve.trainer.compare.report import as_csv, as_markdown, as_table, errors_of, summarise

    cells = summarise(runner)
    left = len(runner.pending())
    csv, markdown, picture = tables
    with _told(1):
        csv.write_text(as_csv(cells), encoding="utf-8")
        markdown.write_text(as_markdown(cells), encoding="utf-8")
        plotted = plot_scores(picture, cells)
    console = PlainConsole(highlight=False)
    if not console.is_terminal:
        # A pipe has no width, and a table cut to 80 columns is of no use.
        console = PlainConsole(highlight=False, width=250)
    show_table(console, as_table(cells))
    files = f"{csv}, .md" + (" and .png" if plotted else "")
    typer.echo(f"{left} of {len(runner.plan.ordered())} runs are left; written: {files}")
    if as_json:
        typer.echo(json.dumps({"left": left, "results": str(path), "cells": [asdict(cell) for cell in cells]}))
    return errors_of(cells)


def _pair(text: str) -> tuple[str, str]:
    name, equals, place = text.partition("=")
    if not equals or not name or not place:
        raise InvalidConfiguration(f"--base {text!r}: write NAME=FOLDER", param="base")
    return name, place
