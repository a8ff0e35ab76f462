"""The small JSON files of a local store."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Annotated, TypeVar

from pydantic import Field, ValidationError

from adapters_store.errors import StoreCorrupted
from adapters_store.records import Record, VersionRecord

# A reader's limit. The longest record without labels has some 2 KiB.
MAX_RECORD_BYTES = 1 << 16
_SHORT = 32


class StoreRecord(Record):
    """`store.json`: what kind of directory this is."""

    format: str
    version: int


class AliasRecord(Record):
    """`aliases/<alias>.json`: a movable name for a version."""

    version: Annotated[int, Field(ge=1)]


class RetiredRecord(Record):
    """`retired/<tenant>/<name>.json`: the highest version ever deleted, so that no number is used twice."""

    highest_version: Annotated[int, Field(ge=1)]


R = TypeVar("R", bound=Record)


RESTORE = "restore it from a backup, or delete it to give up what it names"
"""The remedy of most damaged records."""


def read_record(path: str, kind: type[R], remedy: str = RESTORE) -> R:
    """Read one record.

    Args:
        path: Its file.
        kind: What it is.
        remedy: What to do where it is damaged.

    Raises:
        FileNotFoundError: No such file.
        StoreCorrupted: The file does not hold such a record, or is a directory.
    """
    try:
        return _parse(kind, _read(path))
    except IsADirectoryError as error:
        raise StoreCorrupted(
            f"{path} is damaged (it is a directory: remove the directory first); {remedy}", param=path
        ) from error
    except (ValidationError, ValueError) as error:
        raise StoreCorrupted(f"{path} is damaged; {remedy}", param=path) from error


def _parse(kind: type[R], data: bytes) -> R:
    # Most aliases of most adapters have the same few texts.
    return _parse_short(kind, data) if len(data) <= _SHORT else kind.model_validate_json(data)  # type: ignore[return-value]


@lru_cache(maxsize=1024)
def _parse_short(kind: type[Record], data: bytes) -> Record:
    return kind.model_validate_json(data)


def _read(path: str) -> bytes:
    # Three system calls where a file object makes nine. Each call gives up the interpreter's lock, and in a busy
    # server the two records of every request would wait as often to have the lock back.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(descriptor, MAX_RECORD_BYTES + 1)
    except OSError as error:
        # The system does not name the file of a descriptor.
        error.filename = path
        raise
    finally:
        os.close(descriptor)
    if len(data) > MAX_RECORD_BYTES:
        raise ValueError("no record is as long")
    return data


def record_text(record: Record) -> str:
    """The text of a record's file."""
    return record.model_dump_json() + "\n"


def version_text(record: VersionRecord) -> str:
    """The text of a version's file. Facts with very long labels are left out: a reader finds them in the bundle."""
    text = record_text(record)
    if len(text.encode()) <= MAX_RECORD_BYTES:
        return text
    return record_text(record.model_copy(update={"facts": None}))
