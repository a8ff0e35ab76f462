"""Reads the server-sent events of a stream of generated text."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import ValidationError

from sera_serve.client.answers import GenerateEvent
from sera_serve.client.errors import InvalidAnswerError, SeraConnectionError, api_error

# The server's longest event has 1,024 tokens with 20 likely ones each: about 1 MiB.
_MAX_LINE_BYTES = 64 << 20
_DATA = b"data: "
_DONE = b"[DONE]"
_ERROR = b'{"error"'


class EventReader:
    """Turns the bytes of one stream into events. Only a line feed ends a line: JSON may have other line breaks in it.

    https://html.spec.whatwg.org/multipage/server-sent-events.html, of which the server uses lines `data: ...` alone. A
    proxy may add comments, and carriage returns before the line feeds.
    """

    def __init__(self, request_id: str | None = None) -> None:
        """Set up.

        Args:
            request_id: The id of the request, for errors.
        """
        self._request_id = request_id
        self._rest = bytearray()
        self._done = False

    def feed(self, data: bytes) -> Iterator[GenerateEvent]:
        """Yield the events that the next bytes complete.

        Raises:
            SeraAPIError: The generation failed; the server sent this as the last event.
            InvalidAnswerError: The bytes are no such stream.
        """
        searched = len(self._rest)
        self._rest += data
        begin = 0
        while (end := self._rest.find(b"\n", max(begin, searched))) >= 0:
            line = bytes(self._rest[begin:end])
            begin = end + 1
            if (event := self._read(line)) is not None:
                yield event
        del self._rest[:begin]
        if len(self._rest) > _MAX_LINE_BYTES:
            raise InvalidAnswerError(f"an event of the stream has more than {_MAX_LINE_BYTES} bytes")

    def finish(self) -> None:
        """Check that the stream is whole. Raises SeraConnectionError if it ended before its end mark."""
        if not self._done:
            raise SeraConnectionError("the stream ended before the text was finished", sent=True)

    def _read(self, line: bytes) -> GenerateEvent | None:
        line = line.removesuffix(b"\r")
        if not line or line.startswith(b":"):
            return None
        data = line.removeprefix(_DATA)
        if len(data) == len(line) or self._done:
            raise InvalidAnswerError(f"the stream has a line that is no event of a generation: {line[:100]!r}")
        if data == _DONE:
            self._done = True
            return None
        if data.startswith(_ERROR):
            raise api_error(200, data, self._request_id)
        try:
            return GenerateEvent.model_validate_json(data)
        except ValidationError as error:
            raise InvalidAnswerError(f"an event of the stream cannot be read: {error}") from error
