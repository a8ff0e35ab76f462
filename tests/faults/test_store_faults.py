"""A slow store, failing reads and damaged files: only requests for the affected adapter are refused or wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from adapters_store import AdapterBundle
from support.answers import refused
from support.faulty_serving import Serving, name
from support.live_server import wait_until

Serve = Callable[..., Serving]
SLOW, OTHERS = name(0), [name(i) for i in range(1, 6)]


def test_only_requests_for_the_slow_adapter_wait_for_it(serve: Serve) -> None:
    serving = serve()
    slow = serving.store.resolve(SLOW).digest
    reading, gate = threading.Event(), threading.Event()

    def before_load(digest: str) -> None:
        if digest == slow:
            reading.set()
            assert gate.wait(60)

    serving.store.before_load = before_load
    with ThreadPoolExecutor(5) as clients:
        waiting = [clients.submit(serving.ask, SLOW) for _ in range(5)]
        try:
            assert reading.wait(10)
            for adapter in [*OTHERS, None]:
                serving.assert_right(adapter)
            assert not any(answer.done() for answer in waiting)
            assert serving.client.get("/readyz").status_code == 200
        finally:
            gate.set()
        for answer in waiting:
            serving.assert_right(SLOW, answer.result(30))


def test_a_request_for_a_slow_adapter_times_out_and_the_adapter_is_served_later(serve: Serve) -> None:
    serving = serve(request_timeout_s=0.3)
    slow = serving.store.resolve(SLOW).digest
    gate = threading.Event()

    def before_load(digest: str) -> None:
        if digest == slow:
            assert gate.wait(60)

    serving.store.before_load = before_load
    try:
        for stream in (False, True):
            refused(serving.ask(SLOW, stream=stream), 503, "overloaded")
        serving.assert_right(OTHERS[0])
    finally:
        gate.set()

    def answered() -> bool:
        return serving.ask(SLOW).status_code == 200

    # The loader may still be busy at the first try.
    wait_until(answered, 30)
    serving.assert_right(SLOW)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error", "/secret/path"), MemoryError("secret")])
@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_read_is_reported_to_its_requests_and_tried_again(
    serve: Serve, error: Exception, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    serving = serve()
    failing = serving.store.resolve(SLOW).digest

    def before_load(digest: str) -> None:
        if digest == failing:
            raise error

    serving.store.before_load = before_load
    with ThreadPoolExecutor(8) as clients:
        lost = [clients.submit(serving.ask, SLOW, stream=stream) for _ in range(4)]
        fine = [clients.submit(serving.ask, adapter) for adapter in OTHERS]
        for answer in lost:
            told = refused(answer.result(30), 500, "internal_error")
            assert answer.result().headers["x-request-id"] in told["message"]
            assert "secret" not in answer.result().text
        for adapter, answer in zip(OTHERS, fine, strict=True):
            serving.assert_right(adapter, answer.result(30))
    # The log has the original error.
    assert any(record.exc_info and record.exc_info[1] is error for record in caplog.records)
    del serving.store.before_load
    serving.assert_right(SLOW)


def _flip(content: bytearray) -> None:
    content[-5] ^= 0x40


def _truncate(content: bytearray) -> None:
    del content[-100:]


def _break_header(content: bytearray) -> None:
    content[:8] = b"\xff" * 8


@pytest.mark.parametrize("damage", [_flip, _truncate, _break_header])
def test_a_damaged_bundle_is_never_served_and_an_upload_repairs_it(
    serve: Serve, writers: dict[str, AdapterBundle], damage: Callable[[bytearray], None]
) -> None:
    serving = serve()
    path = serving.path_of(SLOW)
    content = bytearray(path.read_bytes())
    damage(content)
    path.write_bytes(content)
    for stream in (False, True):
        answer = serving.ask(SLOW, stream=stream)
        refused(answer, 500, "store_corrupted")
        assert str(serving.store.root) not in answer.text
    for adapter in OTHERS:
        serving.assert_right(adapter)
    assert serving.client.get("/readyz").status_code == 200
    files = {"bundle": ("a.safetensors", writers[SLOW].to_bytes())}
    assert serving.client.post("/v1/adapters", files=files, data={"name": SLOW}).status_code == 201
    serving.assert_right(SLOW)


def test_a_bundle_that_is_damaged_after_its_load_is_served_from_memory(serve: Serve) -> None:
    serving = serve()
    serving.assert_right(SLOW)
    serving.path_of(SLOW).write_bytes(b"nothing")
    serving.assert_right(SLOW)
