"""The table of a comparison: rows for people, CSV and Markdown for files."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from rich.table import Table

from sera_serve.trainer.compare.plan import LOWER_IS_BETTER, Cell
from sera_serve.trainer.compare.runner import CompareRunner


@dataclass(frozen=True)
class CellResult:
    """One place of the table.

    Attributes:
        base: Name of the base in the plan.
        data: Name of the data set.
        method: Label of the method and size.
        family: The method without its size.
        score: Name of the metric.
        mean: Mean of the score over the seeds that are finished, or None.
        deviation: Sample standard deviation of the score, or None below two seeds.
        runs: Number of finished runs without an error.
        failed: Number of runs that failed.
        planned: Number of runs in the plan.
        learning_rate: Rate of the runs; None for the method's default or if nothing ran.
        parameters: Trained parameters without the head.
        head_parameters: Parameters of the head.
        peak_memory_mb: Median over the runs.
        step_ms: Median over the runs.
        error: The message of a failed run, or None.
    """

    base: str
    data: str
    method: str
    family: str
    score: str
    mean: float | None
    deviation: float | None
    runs: int
    failed: int
    planned: int
    learning_rate: float | None
    parameters: int | None
    head_parameters: int | None
    peak_memory_mb: float | None
    step_ms: float | None
    error: str | None


def summarise(runner: CompareRunner) -> list[CellResult]:
    """Return the places of the table in the plan's order, empty ones included."""
    return [_cell_result(runner, cell) for cell in runner.plan.cells()]


def _cell_result(runner: CompareRunner, cell: Cell) -> CellResult:
    found = [runner.finished(cell, seed) for seed in runner.plan.seeds]
    records = [record for record in found if record is not None]
    good = [record for record in records if "error" not in record]
    errors = [record["error"] for record in records if "error" in record]
    scores = [record["score"] for record in good]

    def middle(name: str) -> Any:
        return statistics.median(record[name] for record in good) if good else None

    return CellResult(
        base=cell.base,
        data=cell.data,
        method=cell.variant.label,
        family=cell.variant.family,
        score=runner.plan.score_of(cell.data),
        mean=statistics.fmean(scores) if scores else None,
        deviation=statistics.stdev(scores) if len(scores) > 1 else None,
        runs=len(good),
        failed=len(errors),
        planned=len(runner.plan.seeds),
        learning_rate=records[0]["learning_rate"] if records else None,
        parameters=good[0]["parameters"] if good else None,
        head_parameters=good[0]["head_parameters"] if good else None,
        peak_memory_mb=middle("peak_memory_mb"),
        step_ms=middle("step_ms"),
        error=errors[0] if errors else None,
    )


def as_csv(results: Sequence[CellResult]) -> str:
    """Write one line for each place of the table."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(CellResult)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(result) for result in results)
    return text.getvalue()


def table_rows(results: Sequence[CellResult]) -> list[list[str]]:
    """Return header and rows of the table: one row for each base and method, one column for each data set.

    A score is `mean ± deviation`, in hundredths of the metric (a loss as it is), with the number of seeds behind it
    where some of the plan's seeds are missing. The mean over the data sets stands where each of them has a score.
    Memory and step time are means over the data sets, where the method has run on each of them.
    """
    data = {result.data: result.score for result in results}
    groups: dict[tuple[str, str], dict[str, CellResult]] = {}
    for result in results:
        groups.setdefault((result.base, result.method), {})[result.data] = result
    scores = [f"{name} ({score})" for name, score in data.items()]
    rows = [["base", "method", "parameters", *scores, "mean", "memory MB", "step ms"]]
    for (base, method), cells in groups.items():
        means = [c.mean for c in cells.values() if c.mean is not None and c.score not in LOWER_IS_BETTER]
        parameters = [cell.parameters for cell in cells.values() if cell.parameters is not None]
        rows.append(
            [
                base,
                method,
                f"{max(parameters):,}" if parameters else "",
                *(_shown(cells.get(name)) for name in data),
                f"{100 * statistics.fmean(means):.1f}" if len(means) == len(data) else "",
                _mean_of([cell.peak_memory_mb for cell in cells.values()], len(data), 0),
                _mean_of([cell.step_ms for cell in cells.values()], len(data), 1),
            ]
        )
    return rows


def _mean_of(values: Sequence[float | None], count: int, digits: int) -> str:
    known = [value for value in values if value is not None]
    # Rows of several lengths take other times: means over other data sets would not compare.
    return f"{statistics.fmean(known):.{digits}f}" if len(known) == count else ""


def _shown(cell: CellResult | None) -> str:
    if cell is None:
        return ""
    if cell.mean is None:
        return "failed" if cell.failed else ""
    # Losses are no shares of one.
    scale, digits = (1, 4) if cell.score in LOWER_IS_BETTER else (100, 1)
    text = f"{scale * cell.mean:.{digits}f}"
    if cell.deviation is not None:
        text += f" ± {scale * cell.deviation:.{digits}f}"
    if cell.runs < cell.planned:
        text += f" ({cell.runs} of {cell.planned}{f', {cell.failed} failed' if cell.failed else ''})"
    return text


def as_markdown(results: Sequence[CellResult]) -> str:
    """Write the table in Markdown, and the errors of failed runs below it."""
    header, *rows = table_rows(results)
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)], *rows]
    text = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    if errors := errors_of(results):
        text += ["", *(f"- {line}" for line in errors)]
    return "\n".join(text) + "\n"


def errors_of(results: Sequence[CellResult]) -> list[str]:
    """Return one line for each place of the table in which a run failed."""
    return [
        f"{result.base} {result.data} {result.method}: {result.failed} of {result.failed + result.runs} runs failed: "
        f"{' '.join(result.error.split())}"
        for result in results
        if result.error is not None
    ]


def as_table(results: Sequence[CellResult]) -> Table:
    """Build the table for a terminal."""
    header, *rows = table_rows(results)
    table = Table(box=None, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < 2 else "right", no_wrap=i < 2)
    for row in rows:
        table.add_row(*row)
    return table
