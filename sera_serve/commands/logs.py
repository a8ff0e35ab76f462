"""The log of a server process: lines of text or of JSON, written by a thread of its own."""

from __future__ import annotations

import json
import logging
import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import QueueHandler, QueueListener
from typing import Any, Literal

from sera_serve.commands.output import json_text

# Lines that wait for the terminal, the pipe or the file behind stderr. What comes while they are full is counted.
_MOST_WAITING = 10_000
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class TextFormatter(logging.Formatter):
    """Lines for people: the time, the level, the logger, the message, and fields as name=value."""

    def __init__(self) -> None:
        super().__init__(_TEXT)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, or the lines where there is a traceback."""
        line = super().format(record)
        fields: dict[str, Any] | None = getattr(record, "fields", None)
        if not fields:
            return line
        return line + "".join(f" {name}={_plain(value)}" for name, value in fields.items())


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (UTC), `level`, `logger`, `message`, `error` (a traceback), and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        milliseconds = int(record.created % 1 * 1000)
        content: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{milliseconds:03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            content["error"] = self.formatException(record.exc_info)
        content |= getattr(record, "fields", {})
        return json.dumps(content, ensure_ascii=False, default=str)


class BoundedQueueHandler(QueueHandler):
    """Hands records to the thread that writes them, and never waits: records that find no room are counted.

    A record goes as it is. `QueueHandler` itself would format it first, on the event loop.
    """

    def __init__(self, lines: queue.Queue[Any]) -> None:
        super().__init__(lines)
        self.dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Return the record. Where its message has arguments, they are put in now: they may change."""
        if record.args:
            record.msg, record.args = record.getMessage(), None
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        """Hand a record on, or count it."""
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1


class _Listener(QueueListener):
    """Writes the records, and says how many found no room."""

    def __init__(self, lines: queue.Queue[Any], handler: logging.Handler, source: BoundedQueueHandler) -> None:
        super().__init__(lines, handler)
        self._source = source
        self._told = 0

    def handle(self, record: logging.LogRecord) -> None:
        """Write one record."""
        dropped = self._source.dropped - self._told
        if dropped:
            self._told += dropped
            message = f"{dropped} lines of the log were dropped: they came faster than they could be written"
            super().handle(logging.LogRecord("sera_serve.log", logging.WARNING, "", 0, message, None, None))
        super().handle(record)


@contextmanager
def logging_to_stderr(log_format: Literal["text", "json"], access_log: bool = True) -> Iterator[BoundedQueueHandler]:
    """Write the log of this process to stderr until the block ends, and everything that was logged by then.

    Args:
        log_format: See the formatters.
        access_log: Whether each request has a line.
    """
    writer = logging.StreamHandler()
    writer.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    lines: queue.Queue[Any] = queue.Queue(_MOST_WAITING)
    handler = BoundedQueueHandler(lines)
    listener = _Listener(lines, writer, handler)
    root = logging.getLogger()
    levels = {name: logging.getLogger(name).level for name in ("sera_serve", "sera_serve.requests", "uvicorn.error")}
    logging.getLogger("sera_serve").setLevel(logging.INFO)
    logging.getLogger("sera_serve.requests").setLevel(logging.INFO if access_log else logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.INFO)
    root.addHandler(handler)
    listener.start()
    try:
        yield handler
    finally:
        listener.stop()
        root.removeHandler(handler)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _plain(value: Any) -> str:
    """A value without blanks and line breaks as it is, any other as JSON."""
    text = str(value)
    return text if text.isprintable() and " " not in text and '"' not in text else json_text(text)
