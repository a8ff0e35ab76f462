"""The file of a comparison's results: one JSON object a line, appended and synced as runs finish."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapters_store.backends.durable import try_file_lock
from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.checkpoint import RunInProgress
from sera_serve.trainer.schedule import SCHEDULE


class ResultsFile:
    """Finished runs by digest. A line that a kill cut off is dropped.

    Attributes:
        path: The file.
        records: Each finished run by its digest; of several lines with one digest, the last.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        if path.exists():
            self._read(path.read_bytes().rpartition(b"\n")[0])

    def _read(self, lines: bytes) -> None:
        self.records = {}
        for number, line in enumerate(lines.splitlines(), start=1):
            try:
                record = json.loads(line)
                self.records[record["run"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidConfiguration(
                    f"{self.path} line {number} is not a result of a comparison; give another --results",
                    param="results",
                ) from error

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the file alone, cut off a torn last line, and read what others have added.

        Raises:
            RunInProgress: Another comparison writes to this file.
            InvalidConfiguration: A line is not a result.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with try_file_lock(str(self.path)) as is_ours:
            if not is_ours:
                raise RunInProgress(f"another comparison writes to {self.path}; wait for it, or give --results")
            with self.path.open("rb+") as file:
                whole, newline, _ = file.read().rpartition(b"\n")
                file.truncate(len(whole) + len(newline))
            # Another comparison may have run since this one began.
            self._read(whole)
            yield

    def check_schedule(self) -> None:
        """Refuse to add runs to those of another schedule of the learning rate: their scores would not compare.

        Raises:
            InvalidConfiguration: A finished run had another schedule, or is older than the record of it.
        """
        # A run that failed has no score.
        others = [r for r in self.records.values() if "error" not in r and r.get("schedule") != SCHEDULE]
        if others:
            raise InvalidConfiguration(
                f"{self.path} has results ({len(others)}) of another schedule of the learning rate than this release's "
                f"({SCHEDULE}), and new runs beside them would not compare; give another --results, or --limit 0 to "
                "show these alone",
                param="results",
            )

    def add(self, record: dict[str, Any]) -> None:
        """Append a record. It is durable when this returns."""
        with self.path.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.records[record["run"]] = record
