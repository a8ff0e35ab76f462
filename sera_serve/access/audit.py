"""The audit log: one line of JSON for each change of adapters, keys, quotas, files and jobs."""

from __future__ import annotations

import json
import logging
import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from concurrent_log_handler import ConcurrentRotatingFileHandler

from adapters_store import STORE_MARK

logger = logging.getLogger("sera_serve.access")

AUDIT_FILE = "audit.jsonl"
_MEBIBYTE = 1 << 20

Action = Literal[
    "adapter.publish",
    "adapter.delete",
    "adapter.pin",
    "adapter.unpin",
    "alias.set",
    "alias.remove",
    "share.add",
    "share.remove",
    "key.create",
    "key.revoke",
    "quota.set",
    "quota.clear",
    "file.create",
    "file.delete",
    "job.create",
    "job.cancel",
    "job.finish",
]


@dataclass(frozen=True)
class Actor:
    """Who made a change.

    Attributes:
        source: How: a request, a command, a training job, or the watched directory.
        key_id: The key of the request, or None.
        address: Where the request came from, or None.
        request_id: The request, or None.
    """

    source: Literal["http", "command", "job", "watch"]
    key_id: str | None = None
    address: str | None = None
    request_id: str | None = None


COMMAND = Actor("command")
"""A command of this machine's operator."""


class AuditLog:
    """Appends to `access/audit.jsonl` of a store. Several processes and threads may do so at once.

    The standard library's rotating handler loses lines where two processes rotate one file. concurrent-log-handler
    takes a file lock for each line, of which there are few.
    """

    def __init__(self, store: Path, max_mib: int = 64, keep: int = 8) -> None:
        """Name the log. The first record makes the file.

        Args:
            store: Directory of the store.
            max_mib: Size at which a new file begins, MiB; 0 never begins one. Commands give 0: they do not know the
                settings of the store's server, whose next line begins the new file.
            keep: Older files that are kept: `audit.jsonl.1` is the newest of them.
        """
        self.path = store / "access" / AUDIT_FILE
        self._max_bytes = max_mib * _MEBIBYTE
        self._keep = keep
        self._lock = threading.Lock()
        self._handler: ConcurrentRotatingFileHandler | None = None

    def record(
        self, action: Action, actor: Actor, *, tenant: str, target: str, **details: str | int | float | bool | None
    ) -> None:
        """Append one line. Blocks. A failure is logged, and never fails the change that it is about.

        Args:
            action: What was done.
            actor: Who did it.
            tenant: The tenant whose it is.
            target: What it was done to: an adapter's reference, or an id.
            details: More about it; never a secret, never a prompt.
        """
        line = {
            "at": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "action": action,
            "tenant": tenant,
            "target": target,
            "source": actor.source,
            "key_id": actor.key_id,
            "address": actor.address,
            "request_id": actor.request_id,
            **details,
        }
        text = json.dumps(line, ensure_ascii=False)
        record = logging.LogRecord("audit", logging.INFO, "", 0, text, None, None)
        try:
            self._opened().handle(record)
        # The handler's own failures are RuntimeErrors: no lock after some tries.
        except (OSError, RuntimeError, ValueError) as error:
            logger.error("%s cannot be written (%s); not recorded: %s", self.path, error, text)

    def close(self) -> None:
        """Close the file. The next record opens it again."""
        with self._lock:
            if self._handler is not None:
                self._handler.close()
                self._handler = None

    def _opened(self) -> ConcurrentRotatingFileHandler:
        with self._lock:
            if self._handler is None:
                # A store whose disk is not mounted is an empty directory.
                self.path.parent.parent.joinpath(STORE_MARK).stat()
                self.path.parent.mkdir(mode=0o700, exist_ok=True)
                self._handler = _Handler(
                    str(self.path), maxBytes=self._max_bytes, backupCount=self._keep, encoding="utf-8", chmod=0o600
                )
            return self._handler


class _Handler(ConcurrentRotatingFileHandler):
    def do_write(self, msg: str) -> None:
        """Append a line whole, or raise OSError and leave the file as it was. The caller holds the file's lock.

        The library's own method leaves the rest of a refused line in the stream, which then writes the rest before the
        next line. A write to the descriptor leaves nothing behind.
        """
        if self.stream is None or self.stream.closed:
            self.stream = self.do_open()
        descriptor = self.stream.fileno()
        size = os.fstat(descriptor).st_size
        # Half of a surrogate pair becomes JSON's own escape.
        line = (msg + self.terminator).encode("utf-8", "backslashreplace")
        try:
            while line:
                line = line[os.write(descriptor, line) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(descriptor, size)
            raise

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise what writing a record raised: logging would print it to stderr."""
        raise
