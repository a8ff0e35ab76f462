"""The file of rows: JSON lines that the processes of all sections append to."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """JSON lines; each has the name of its section. A row without a `status` is what the section found."""

    path: Path

    def add(self, section: str, row: Row) -> None:
        """Append a row, in one write: lines of several processes do not mix, and a process may be killed after it."""
        line = json.dumps(readable({"section": section, **row}), default=str) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def rows(self) -> list[Row]:
        """All rows so far, in the order in which they were found."""
        if not self.path.exists():
            return []
        lines = self.path.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def readable(value: Any) -> Any:
    """A row with six significant digits, and with words for numbers that JSON has not."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: readable(item) for key, item in value.items()}
    return [readable(item) for item in value] if isinstance(value, (list, tuple)) else value
