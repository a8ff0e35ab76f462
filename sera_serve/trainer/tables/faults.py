"""What is wrong with training data: rows with their place in a file, and the errors that name them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sera_serve.errors import SeraServeError

_SHOWN = 5
# One for all rows: a file may have millions of them.
_NO_VALUES: dict[str, Any] = {}


class InvalidData(SeraServeError):
    """The training data cannot be used. The message names rows, lines and remedies.

    `param` is the option at fault. A reader does not know what its file is for: `faults_of` turns `train` into that.
    """

    code = "invalid_training_data"
    status = 422

    def __init__(self, message: str, *, param: str = "train") -> None:
        super().__init__(message, param=param)


@contextmanager
def faults_of(use: str) -> Iterator[None]:
    """Let the faults of the block's file be those of the option that names it: train, eval or test."""
    try:
        yield
    except InvalidData as error:
        if error.param == "train":
            error.param = use
        raise


class Lines:
    """The line at which each row of a file ends. The file is looked at only when a line is asked for."""

    def __init__(self, find: Callable[[], Sequence[int]]) -> None:
        """Prepare; `find` returns the 1-based line of each row, in the file's order."""
        self._find = find
        self._found: Sequence[int] | None = None

    def of(self, number: int) -> int | None:
        """Return the line of the row with this 1-based number, or None if the second look does not reach it."""
        if self._found is None:
            self._found = self._find()
        return self._found[number - 1] if number <= len(self._found) else None


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file.

    Attributes:
        values: Values by column.
        number: 1-based number of the row.
        at: Its 1-based last line, what finds this line, or None where a format has no lines.
    """

    values: dict[str, Any]
    number: int
    at: int | Lines | None

    @property
    def line(self) -> int | None:
        """1-based number of the row's last line; None where the format has no lines."""
        return self.at.of(self.number) if isinstance(self.at, Lines) else self.at

    @property
    def where(self) -> str:
        """ "row 3 (line 4)", for messages."""
        line = self.line
        return f"row {self.number}" + (f" (line {line})" if line is not None else "")

    def place(self) -> Row:
        """Return the row without its values, for those who keep it for messages alone."""
        return Row(_NO_VALUES, self.number, self.at)


class Problems:
    """Collects the faults of a file, so that one run shows several of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: list[str] = []

    def add(self, row: Row, text: str) -> None:
        """Add a fault of one row."""
        self.found.append(f"{row.where}: {text}")

    def raise_if_any(self) -> None:
        """Raise `InvalidData` with the first few faults if there is one."""
        if not self.found:
            return
        if len(self.found) == 1:
            raise InvalidData(f"{self.path}, {self.found[0]}")
        shown = "".join(f"\n  {text}" for text in self.found[:_SHOWN])
        more = len(self.found) - _SHOWN
        rest = f"\n  and {more} more" if more > 0 else ""
        raise InvalidData(f"{self.path} has {len(self.found)} problems:{shown}{rest}")
