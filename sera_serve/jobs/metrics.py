"""The metrics of a job as a table: one row a step, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

_COLUMNS = ("step", "epoch", "train_loss", "learning_rate", "valid_loss")
_EVALUATED, _VALID = "eval_", "valid_"
# A number of the run, not of a step.
_LEFT_OUT = ("total_steps",)


def metrics_csv(points: Iterable[Mapping[str, Any]]) -> tuple[bytes, int]:
    """Return (the table, its rows) of the data of metrics events.

    The columns are step, epoch, train_loss, learning_rate and valid_loss, then the other metrics by name. What was
    measured on the validation rows begins with `valid_`, as in OpenAI's result files; a value that a step does not have
    is empty.
    """
    steps: dict[int, dict[str, Any]] = {}
    for point in points:
        row = steps.setdefault(int(point["step"]), {})
        for name, value in point.items():
            if name not in _LEFT_OUT and isinstance(value, int | float):
                row[_VALID + name.removeprefix(_EVALUATED) if name.startswith(_EVALUATED) else name] = value
    others = sorted({name for row in steps.values() for name in row}.difference(_COLUMNS))
    text = io.StringIO()
    table = csv.DictWriter(text, [*_COLUMNS, *others], lineterminator="\n")
    table.writeheader()
    table.writerows(row for _, row in sorted(steps.items()))
    return text.getvalue().encode(), len(steps)
