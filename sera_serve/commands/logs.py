"""The log of a server process: lines of text or of JSON, written by a thread of its own."""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from logging.handlers import QueueHandler, QueueListener
from typing import Any, Literal, TextIO

from sera_serve.commands.output import json_text

# Lines that wait for the terminal, the pipe or the file behind stderr. What comes while they are full is counted.
_MOST_WAITING = 10_000
# How often the end of a full log looks for room.
_FULL_S = 0.01
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


class StderrHandler(logging.Handler):
    """Writes lines to stderr, and counts those that a full disk or a reader that left refused.

    A line is written to the descriptor. The stream of Python would keep the rest of a refused line, and write the rest
    before a later line. Used by one thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failed = 0
        self.reason = ""
        # Whether the last line has no end.
        self._is_torn = False
        try:
            descriptor = sys.stderr.fileno()
        except (AttributeError, OSError, ValueError):
            # There is no stderr, or it is no file.
            self._write: Callable[[bytes], int] = partial(_write_text, sys.stderr)
        else:
            self._write = partial(os.write, descriptor)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or count it."""
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001 - as in logging: one record must not end the thread that writes all
            self.handleError(record)
            return
        if not self.put(line):
            self.failed += 1

    def put(self, line: str) -> bool:
        """Write a line, on a line of its own after one that was torn. Returns whether all of it was written."""
        text = ("\n" * self._is_torn + line + "\n").encode("utf-8", "backslashreplace")
        written = 0
        try:
            while written < len(text):
                written += self._write(text[written:])
        except OSError as error:
            self.reason = error.strerror or str(error)
        if written:
            self._is_torn = text[written - 1 : written] != b"\n"
        return written == len(text)


class _Listener(QueueListener):
    """Writes the records, and says how many found no room, and how many could not be written."""

    def __init__(self, lines: queue.Queue[Any], writer: StderrHandler, source: BoundedQueueHandler) -> None:
        super().__init__(lines, writer)
        self._writer = writer
        self._source = source
        self._told_dropped = self._told_failed = 0

    def handle(self, record: logging.LogRecord) -> None:
        """Write one record."""
        self.tell_lost()
        super().handle(record)

    def enqueue_sentinel(self) -> None:
        """Ask the thread to end after the records that wait. The library's method fails where they leave no room."""
        while True:
            try:
                return super().enqueue_sentinel()
            except queue.Full:
                time.sleep(_FULL_S)

    def tell_lost(self) -> None:
        """Write how many lines were lost since it was last written. What cannot be written is told later."""
        dropped, failed = self._source.dropped, self._writer.failed
        if dropped > self._told_dropped and self._tell(
            f"{dropped - self._told_dropped} lines of the log were dropped: they came faster than they could be written"
        ):
            self._told_dropped = dropped
        if failed > self._told_failed and self._tell(
            f"{failed - self._told_failed} lines of the log were lost: stderr could not be written "
            f"({self._writer.reason})"
        ):
            self._told_failed = failed

    def _tell(self, message: str) -> bool:
        record = logging.LogRecord("sera_serve.log", logging.WARNING, "", 0, message, None, None)
        return self._writer.put(self._writer.format(record))


@contextmanager
def logging_to_stderr(log_format: Literal["text", "json"], access_log: bool = True) -> Iterator[BoundedQueueHandler]:
    """Write the log of this process to stderr until the block ends, and everything that was logged by then.

    Args:
        log_format: See the formatters.
        access_log: Whether each request has a line.
    """
    writer = StderrHandler()
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
        with warnings.catch_warnings():
            # What Pillow notes of a client's image would be a line for each new size or EXIF entry, in no form of a
            # log, and Python would keep each text. An image that cannot be read has its error in the answer.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield handler
    finally:
        listener.stop()
        listener.tell_lost()
        root.removeHandler(handler)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _plain(value: Any) -> str:
    """A value without blanks and line breaks as it is, any other as JSON."""
    text = str(value)
    return text if text.isprintable() and " " not in text and '"' not in text else json_text(text)


def _write_text(stream: TextIO | None, text: bytes) -> int:
    if stream is not None:
        stream.write(text.decode("utf-8"))
    return len(text)
