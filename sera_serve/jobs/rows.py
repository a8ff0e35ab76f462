"""Checks an uploaded training file row by row, in bounded memory, with the trainer's own checks of a row."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from sera_serve.errors import SeraServeError
from sera_serve.trainer.data.labelled import label_of, messages_of, string_of, text_of
from sera_serve.trainer.tables.table import InvalidData, Problems, Row

RowKind = Literal["messages", "prompt", "text", "pair"]
"""What each row of a file has: `messages`; `prompt` and `completion`; `text` and `label`; or `text_pair` too."""

KINDS: dict[RowKind, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    # Before `text`, which a row of this kind has too.
    "pair": ("text_pair", "text", "label"),
    "text": ("text", "label"),
}
MAX_ROWS = 200_000
MAX_LINE_BYTES = 1 << 20
# Faults are shown for so many rows at most. The rest of the file is then not read.
_MAX_FAULTS = 20
_SHAPES = (
    '{"messages": [...]}, or {"prompt": ..., "completion": ...}, or {"text": ..., "label": ...}, the last perhaps with '
    '"text_pair"'
)
# Python code holds the interpreter's lock, which the engine needs: the check rests for as long as it works.
_WORK_S = 0.005
_BLOCK_BYTES = 1 << 20


class InvalidTrainingFile(SeraServeError):
    """The training file has rows that cannot be used. The message names rows, lines and remedies."""

    code = "invalid_training_file"
    status = 422


@dataclass(frozen=True)
class CheckedRows:
    """What a check found.

    Attributes:
        kind: What each row has.
        rows: Number of rows.
        nbytes: Bytes of the file.
        sha256: Hexadecimal SHA-256 of the bytes.
        labels: Number of different labels; 0 for rows without labels.
    """

    kind: RowKind
    rows: int
    nbytes: int
    sha256: str
    labels: int


def check_rows(file: BinaryIO) -> CheckedRows:
    """Check a JSONL file from its beginning. Blocks; memory is bounded by one line, and a number a row.

    Raises:
        InvalidTrainingFile: The file has no rows, too many, rows of several kinds, or rows that cannot be learned from.
    """
    problems = Problems(Path("the file"))
    digest = hashlib.sha256()
    kind: RowKind | None = None
    rows = nbytes = 0
    labels: set[int] = set()
    number = 0
    rested = time.monotonic()
    file.seek(0)
    while content := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        nbytes += len(content)
        digest.update(content)
        if len(content) > MAX_LINE_BYTES:
            raise _refused(f"line {number} has more than {MAX_LINE_BYTES} bytes; split the row into shorter ones")
        if number == 1:
            content = content.removeprefix(b"\xef\xbb\xbf")
        if not content.strip():
            continue
        rows += 1
        if rows > MAX_ROWS:
            raise _refused(f"the file has more than {MAX_ROWS} rows; send several files, one a job")
        row = _parsed(content, rows, number, problems)
        if row is not None:
            own = _kind_of(row, problems)
            kind = kind or own
            if own is not None and own != kind:
                problems.add(row, f"it has {_words(own)}, and rows before it have {_words(kind)}; one kind a file")
            elif own is not None:
                _check(row, own, problems)
                if "label" in row.values:
                    labels.add(hash(str(row.values["label"])))
        if len(problems.found) >= _MAX_FAULTS:
            break
        if time.monotonic() - rested > _WORK_S:
            time.sleep(_WORK_S)
            rested = time.monotonic()
    try:
        problems.raise_if_any()
    except InvalidData as error:
        raise _refused(error.message) from None
    if kind is None:
        raise _refused(f"the file has no rows; each line is one JSON object: {_SHAPES}")
    return CheckedRows(kind, rows, nbytes, digest.hexdigest(), len(labels))


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file. Blocks; raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _parsed(content: bytes, rows: int, number: int, problems: Problems) -> Row | None:
    row = Row({}, rows, number)
    try:
        value = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        problems.add(row, "it is not UTF-8; save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        problems.add(row, f"not JSON ({error}); each line must be one object")
    else:
        if isinstance(value, dict):
            return Row(value, rows, number)
        problems.add(row, f"not an object; each line must look like {_SHAPES}")
    return None


def _kind_of(row: Row, problems: Problems) -> RowKind | None:
    given = set(row.values)
    for kind, columns in KINDS.items():
        if columns[0] in given:
            if missing := [column for column in columns if column not in given]:
                problems.add(row, f"{missing[0]} is missing; a row of this kind has {_words(kind)}")
                return None
            if more := sorted(given - set(columns)):
                problems.add(row, f"{more[0][:64]!r} is not used; a row of this kind has {_words(kind)} alone")
                return None
            return kind
    problems.add(row, f"it has no field that can be learned from; a row is {_SHAPES}")
    return None


def _check(row: Row, kind: RowKind, problems: Problems) -> None:
    if kind == "messages":
        messages_of(row, "messages", problems)
    elif kind in ("text", "pair"):
        text_of(row, "text", problems)
        if kind == "pair":
            text_of(row, "text_pair", problems)
        label_of(row, "label", problems)
    else:
        string_of(row, "prompt", problems)
        text_of(row, "completion", problems)


def _words(kind: RowKind | None) -> str:
    return " and ".join(KINDS[kind or "messages"])


def _refused(message: str) -> InvalidTrainingFile:
    return InvalidTrainingFile(message, param="file")
