"""`sera-serve doctor`: says what this machine can do, and what is in the way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from sera_serve.commands.output import JsonOption, json_text
from sera_serve.config import load_settings
from sera_serve.errors import InvalidConfiguration
from sera_serve.terminal import fail, say


def doctor_command(
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.", show_default=False)] = None,
    base: Annotated[str | None, typer.Option(help="The base to plan memory for.", show_default=False)] = None,
    store: Annotated[Path | None, typer.Option(help="Folder of the adapter store.", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="Torch device.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help="dtype of the base.", show_default=False)] = None,
    full: Annotated[bool, typer.Option("--full", help="Read every bundle of the store.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Look at this machine, the base's memory and the store. The exit status is 1 if there is a problem."""
    try:
        settings = load_settings(config, {"base": base, "store": store, "device": device, "dtype": dtype})
    except InvalidConfiguration as error:
        fail("sera-serve", error.message, 2)
    # torch and transformers take seconds to import, and --help does not need them.
    from sera_serve.commands.diagnosis import diagnose

    findings = []
    for finding in diagnose(settings, full):
        findings.append(finding)
        if not as_json:
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            say(f"{finding.status:<7}  {finding.name}: {finding.detail}{remedy}")
    worst = next((status for status in ("problem", "warning") if any(f.status == status for f in findings)), "ok")
    if as_json:
        content = {"status": worst, "findings": [dataclasses.asdict(finding) for finding in findings]}
        typer.echo(json_text(content, indent=2))
    raise typer.Exit(1 if worst == "problem" else 0)
