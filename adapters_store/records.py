"""The small JSON files of a store, and what the store reports of an adapter."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters_store.config import Method, Task
from adapters_store.errors import StoreCorrupted

# Twenty times the longest record that is written.
_MAX_BYTES = 1 << 16


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class StoreRecord(_Record):
    """`store.json`: what kind of directory this is."""

    format: str
    version: int


class VersionRecord(_Record):
    """`versions/v<n>.json`: one immutable version, with what a listing shows, so that it opens no bundle."""

    version: Annotated[int, Field(ge=1)]
    digest: Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]
    created_at: str
    nbytes: int
    parameters: int
    task: Task
    method: Method
    base: str


class AliasRecord(_Record):
    """`aliases/<alias>.json`: a movable name for a version."""

    version: Annotated[int, Field(ge=1)]


class RetiredRecord(_Record):
    """`retired/<tenant>/<name>.json`: the highest version ever deleted, so that no number is used twice."""

    highest_version: Annotated[int, Field(ge=1)]


R = TypeVar("R", bound=_Record)


def read_record(path: str, kind: type[R]) -> R:
    """Read one record.

    Raises:
        FileNotFoundError: No such file.
        StoreCorrupted: The file does not hold such a record.
    """
    try:
        return kind.model_validate_json(_read(path))
    except (ValidationError, ValueError) as error:
        raise StoreCorrupted(
            f"{path} is damaged; restore it from a backup, or delete it to give up what it names",
            param=path,
        ) from error


def _read(path: str) -> bytes:
    # Three system calls where a file object makes nine: each gives up the interpreter's lock, and in a busy server
    # every request's two records would wait as often to have it back.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(descriptor, _MAX_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) > _MAX_BYTES:
        raise ValueError("no record is as long")
    return data


def record_text(record: _Record) -> str:
    """The text of a record's file."""
    return record.model_dump_json() + "\n"


@dataclass(frozen=True)
class Published:
    """What `AdapterStore.publish` made, or found already there."""

    adapter: str
    version: int
    digest: str


@dataclass(frozen=True)
class ResolvedAdapter:
    """A reference turned into one immutable version; `digest` is the key of caches."""

    adapter: str
    version: int
    digest: str
    task: str = ""
    labels: tuple[str, ...] | None = None
    base: object = None
    max_length: int | None = None


@dataclass(frozen=True)
class AdapterInfo:
    """One version of an adapter, and the adapter's versions and aliases.

    Attributes:
        adapter: `tenant/name`.
        version: The version described.
        digest: Its content digest.
        created_at: When it was published, ISO 8601, UTC.
        nbytes: Bytes of its tensors.
        parameters: Numbers in its tensors, head included.
        task: generate or classify.
        method: As in its configuration.
        base: Name of its base model.
        versions: All versions, oldest first.
        aliases: Version by alias.
    """

    adapter: str
    version: int
    digest: str
    created_at: str
    nbytes: int
    parameters: int
    task: Task
    method: Method
    base: str
    versions: tuple[int, ...]
    aliases: dict[str, int]


@dataclass(frozen=True)
class Collected:
    """What `AdapterStore.collect_garbage` removed."""

    digests: tuple[str, ...]
    nbytes: int

    @property
    def bundles(self) -> int:
        """How many bundles were removed."""
        return len(self.digests)
