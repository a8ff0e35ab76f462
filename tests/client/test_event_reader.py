"""Streams of events: cut anywhere, of any content, and broken in any way."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from sera_serve.client import (
    InvalidAnswerError,
    RequestTimeoutError,
    SeraAPIError,
    SeraClient,
    SeraConnectionError,
    ServerError,
    UnavailableError,
)
from sera_serve.client.events import EventReader

# Line and paragraph separators, next line, vertical tab as JSON may hold them: none of them ends an event.
TEXTS = ["Ahoy", ", \u2028mate\u2029\x85\x0b\x0c\n\n", "ys ☠", "data: [DONE]", '{"error"']


def event(text: str, **fields: Any) -> bytes:
    whole = {"id": "gen-1", "adapter": None, "version": None, "text": text, "token_ids": [1]} | fields
    return b"data: " + json.dumps(whole, ensure_ascii=False).encode() + b"\n\n"


LAST = event("", token_ids=[], finish_reason="stop", usage={"prompt_tokens": 2, "completion_tokens": 3})
STREAM = b"".join(map(event, TEXTS)) + LAST + b"data: [DONE]\n\n"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, len(STREAM)])
def test_a_stream_is_read_however_it_is_cut(size: int) -> None:
    reader = EventReader()
    events = [one for begin in range(0, len(STREAM), size) for one in reader.feed(STREAM[begin : begin + size])]
    reader.finish()
    assert [one.text for one in events] == [*TEXTS, ""]
    assert (events[-1].finish_reason, events[0].finish_reason) == ("stop", None)
    assert events[-1].usage is not None and events[-1].usage.completion_tokens == 3


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 5000])
def test_what_a_proxy_adds_is_left_out(size: int) -> None:
    pinged = b": ping\n\n" + STREAM.replace(b"\n\n", b"\n:\n\n") + b": ping\n\n"
    for content in (pinged, STREAM.replace(b"\n", b"\r\n"), pinged.replace(b"\n", b"\r\n")):
        reader = EventReader()
        parts = (content[begin : begin + size] for begin in range(0, len(content), size))
        assert [one.text for part in parts for one in reader.feed(part)] == [*TEXTS, ""]
        reader.finish()


def read(content: bytes) -> list[str]:
    """The texts that a client gives before it ends, or raises."""

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=content, headers={"x-request-id": "req-5"})

    texts: list[str] = []
    with (
        SeraClient("http://test", transport=httpx.MockTransport(answer)) as client,
        client.stream("a") as events,
    ):
        try:
            texts.extend(event.text for event in events)
        except SeraAPIError as error:
            assert (error.status, error.request_id) == (200, "req-5")
            raise
    return texts


@pytest.mark.parametrize(
    ("code", "kind", "raised"),
    [
        ("engine_unavailable", "service_unavailable_error", UnavailableError),
        ("deadline_exceeded", "server_error", RequestTimeoutError),
        ("internal_error", "server_error", ServerError),
    ],
)
def test_a_failure_in_a_stream_is_raised_by_its_kind(code: str, kind: str, raised: type[SeraAPIError]) -> None:
    error = {"error": {"message": "it failed", "type": kind, "param": None, "code": code}}
    content = event("a") + b"data: " + json.dumps(error).encode() + b"\n\n"
    with pytest.raises(raised, match="it failed"):
        read(content)


def test_a_stream_that_ends_early_is_an_error() -> None:
    for end in range(0, len(STREAM) - 15, 9):
        with pytest.raises(SeraConnectionError, match="before the text was finished"):
            read(STREAM[:end])
    assert read(STREAM) == [*TEXTS, ""]


@pytest.mark.parametrize(
    "content", [b"<html>\n", b"event: x\n\n", b"data: {}\n\n", b"data: [\n\n", b"data: \xff\n\n", STREAM + event("b")]
)
def test_what_is_no_stream_of_events(content: bytes) -> None:
    with pytest.raises(InvalidAnswerError):
        read(content)


def test_a_line_without_an_end_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sera_serve.client.events._MAX_LINE_BYTES", 1000)
    reader = EventReader()
    with pytest.raises(InvalidAnswerError, match="more than 1000 bytes"):
        for _ in range(100):
            assert not list(reader.feed(b"x" * 100))
