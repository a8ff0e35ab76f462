"""How every benchmark ends: its last line on stdout, one JSON object, and its exit status."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer


def tell(
    benchmark: str,
    rows: Sequence[dict[str, Any]],
    *,
    correct: bool = True,
    is_check: bool = False,
    output: Path | None = None,
    **facts: Any,
) -> None:
    """Print the last line. Where something is wrong, it has no speed, and the exit status is 1.

    Args:
        benchmark: Its name.
        rows: What was measured.
        correct: Whether everything that was computed is right.
        is_check: The rows and facts say what is wrong, so a wrong run tells them too.
        output: Also write the JSON to this file.
        facts: What else is told.

    Raises:
        typer.Exit: Something is wrong.
    """
    told: dict[str, Any] = {"benchmark": benchmark, "correct": correct, "rows": []}
    if correct or is_check:
        told |= {"rows": rows, **facts}
    if output is not None:
        output.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    typer.echo(json.dumps(told))
    if not correct:
        raise typer.Exit(1)
