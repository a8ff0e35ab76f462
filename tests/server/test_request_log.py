"""The log of requests: what a line has, what it never has, and how it is written."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import queue
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stderr
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters_store import AdapterStore
from sera_serve.access import AccessDatabase, Keys
from sera_serve.base import FrozenBase, decode_image
from sera_serve.commands.logs import (
    BoundedQueueHandler,
    JsonFormatter,
    StderrHandler,
    TextFormatter,
    logging_to_stderr,
)
from sera_serve.config import ServeSettings
from sera_serve.errors import ImageTooLarge
from sera_serve.server import build_app
from support.live_server import live_server, wait_until
from support.small_disk import fill_bytes, small_disk
from support.stub_engine import FAILS_LATER, LATE_LATER, OTHERS_SHED, SECRET, SLOW, StubEngine
from support.training import STORIES, jsonl
from support.vision import image_file, picture

PROMPT = "a prompt that nobody may read"
Start = Callable[..., httpx.Client]


class Lines(logging.Handler):
    """Keeps the records of requests."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def fields(self, count: int) -> list[dict[str, Any]]:
        """Wait for so many lines: a line follows its response."""
        wait_until(lambda: len(self.records) == count)
        return [record.fields for record in self.records]  # type: ignore[attr-defined]


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler, logger = Lines(), logging.getLogger("sera_serve.requests")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def start(base: FrozenBase, store: AdapterStore) -> Iterator[Start]:
    """Start servers with settings, and return a client of each."""
    with ExitStack() as stack:

        def begin(other: AdapterStore | None = None, **settings: Any) -> httpx.Client:
            served = other or store
            app = build_app(StubEngine(base), served, ServeSettings(store=served.root, **settings))
            url = stack.enter_context(live_server(app))
            return stack.enter_context(httpx.Client(base_url=url))

        yield begin


def test_a_line_says_who_asked_for_what_and_never_the_prompt(start: Start, lines: Lines) -> None:
    client = start()
    answer = client.post("/v1/generate", json={"prompt": PROMPT, "adapter": "demo/writer"})
    client.post("/v1/classify", json={"adapter": "demo/sorter", "inputs": [PROMPT, "b"]})
    client.get("/v1/adapters/demo/absent")
    client.get("/nothing?" + PROMPT.replace(" ", "+"))
    first, second, third, fourth = lines.fields(4)
    assert first.pop("seconds") > 0
    assert first == {
        "request_id": answer.headers["x-request-id"],
        "method": "POST",
        "route": "/v1/generate",
        "status": 200,
        "address": "127.0.0.1",
        "tenant": "demo",
        "adapter": "demo/writer",
        "version": 3,
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "waited_s": 0.25,
        "first_token_s": 0.5,
    }
    assert (second["adapter"], second["inputs"], second["tenant"]) == ("demo/sorter", 2, "demo")
    assert second["prompt_tokens"] == len(PROMPT) + 1
    assert (third["status"], third["route"]) == (404, "/v1/adapters/{tenant}/{name}")
    assert "tenant" not in third and third["code"] == "adapter_not_found"
    assert fourth["code"] == "not_found"
    assert fourth["route"] == "unmatched"
    assert "nobody" not in str(lines.fields(4))


def test_a_line_of_a_refusal_says_which_adapter_was_asked_for(start: Start, lines: Lines, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    secret = Keys(AccessDatabase(store.root)).create("demo", ["infer"]).secret
    client = start(store)
    client.headers["Authorization"] = f"Bearer {secret}"
    message = {"role": "user", "content": PROMPT}
    for route, body in {
        "/v1/generate": {"adapter": "other/a@v7", "prompt": PROMPT},
        "/v1/classify": {"adapter": "other/b", "inputs": [PROMPT]},
        "/v1/chat/completions": {"model": "other/c", "messages": [message]},
        "/v1/completions": {"model": "other/d", "prompt": PROMPT},
        "/v1/responses": {"model": "other/e", "input": PROMPT},
        "/v1/embeddings": {"model": "other/f@live", "input": PROMPT},
        "/tokenize": {"model": "other/g", "prompt": PROMPT},
    }.items():
        assert client.post(route, json=body).status_code == 404
    assert client.post("/v1/classify", data={"adapter": "other/h"}, files={"image": b"-"}).status_code == 404
    # What is no name may be anything.
    client.post("/v1/generate", json={"prompt": "x", "adapter": PROMPT})
    found = lines.fields(9)
    asked = ["other/a@v7", *(f"other/{name}" for name in "bcde"), "other/f@live", "other/g", "other/h", None]
    assert [line.get("adapter") for line in found] == asked
    assert not any("version" in line for line in found)
    assert PROMPT not in str(found)


def test_a_line_of_a_spent_quota_says_whose_it_is(start: Start, lines: Lines) -> None:
    client = start(quotas={"*": {"requests_per_minute": 1}})
    for body in ({"adapter": "demo/writer", "prompt": PROMPT}, {"prompt": PROMPT}):
        for status in (200, 429):
            assert client.post("/v1/generate", json=body).status_code == status
    several = {"adapters": ["demo/sorter", "demo/other"], "inputs": [PROMPT]}
    assert client.post("/v1/classify", json=several).status_code == 429
    found = lines.fields(5)
    assert [line["tenant"] for line in found] == ["demo", "demo", "_base", "_base", "demo"]
    assert [line.get("adapter") for line in found] == ["demo/writer", "demo/writer", None, None, None]


def test_a_line_of_a_stream_says_how_it_ended(start: Start, lines: Lines) -> None:
    client = start()
    for prompt in ("hello", FAILS_LATER, LATE_LATER):
        client.post("/v1/generate", json={"prompt": prompt, "stream": True})
        client.post("/v1/completions", json={"model": "demo/writer", "prompt": prompt, "stream": True})
    codes = [line.get("code") for line in lines.fields(6)]
    assert codes == [None] * 2 + ["engine_unavailable"] * 2 + ["deadline_exceeded"] * 2


def test_a_line_counts_the_answers_that_ran(start: Start, lines: Lines) -> None:
    client = start()
    client.post("/v1/generate", json={"prompt": OTHERS_SHED, "n": 3})
    (line,) = lines.fields(1)
    # Each prompt of the stub has 5 tokens.
    assert (line["status"], line["code"], line["prompt_tokens"]) == (429, "tenant_overloaded", 5)


def test_a_line_says_that_the_client_left_and_what_it_had_asked_for(start: Start, lines: Lines) -> None:
    client = start()
    with client.stream("POST", "/v1/generate", json={"prompt": SLOW, "adapter": "demo/writer", "stream": True}) as got:
        next(got.iter_lines())
    (line,) = lines.fields(1)
    assert (line["status"], line["code"], line["adapter"], line["version"]) == (200, "client_closed", "demo/writer", 3)
    assert line["prompt_tokens"] == 5 and line["completion_tokens"] >= 1
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/generate", json={"prompt": SLOW, "adapter": "demo/writer"}, timeout=0.2)
    line = lines.fields(2)[1]
    assert (line["status"], line["code"], line["adapter"]) == (499, "client_closed", "demo/writer")


def test_a_line_says_that_the_client_left_the_events_of_a_job(
    start: Start, lines: Lines, base: FrozenBase, tmp_path: Path
) -> None:
    # The job waits for good: only the client ends the stream.
    client = start(AdapterStore(tmp_path / "store"), max_training_jobs=0)
    sent = client.post("/v1/files", files={"file": ("rows.jsonl", jsonl(STORIES))}, data={"purpose": "fine-tune"})
    job = {"training_file": sent.json()["id"], "model": base.name}
    made = client.post("/v1/fine_tuning/jobs", json=job).json()
    with client.stream("GET", f"/v1/fine_tuning/jobs/{made['id']}/events?stream=true") as got:
        next(got.iter_lines())
    line = lines.fields(3)[2]
    assert (line["status"], line["code"]) == (200, "client_closed")
    head = client.head(f"/v1/fine_tuning/jobs/{made['id']}/events?stream=true", timeout=20)
    assert (head.status_code, head.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert "code" not in lines.fields(4)[3], "the headers are the whole answer, and they do not wait for the job"
    client.post(f"/v1/fine_tuning/jobs/{made['id']}/cancel")
    client.get(f"/v1/fine_tuning/jobs/{made['id']}/events?stream=true")
    assert "code" not in lines.fields(6)[5]


def test_a_line_has_the_key_and_the_tenant_of_the_key(start: Start, lines: Lines, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    created = Keys(AccessDatabase(store.root)).create("demo", ["infer"])
    key, secret = created.key, created.secret
    client = start(store)
    client.post("/v1/generate", json={"prompt": "x"}, headers={"Authorization": f"Bearer {secret}"})
    client.get("/v1/adapters", headers={"Authorization": f"Bearer {secret}"})
    client.get("/v1/adapters", headers={"Authorization": "Bearer wrong"})
    assert [line.get("key_id") for line in lines.fields(3)] == [key.id, key.id, None]
    assert [line.get("tenant") for line in lines.fields(3)] == ["demo", "demo", None]
    assert secret not in str(lines.fields(3))
    assert lines.fields(3)[2]["status"] == 401 and lines.fields(3)[2]["code"] == "invalid_api_key"


def test_a_prompt_is_logged_where_the_setting_says_so_and_bounded(start: Start, lines: Lines) -> None:
    client = start(log_prompts=24)
    client.post("/v1/generate", json={"prompt": PROMPT})
    client.post("/v1/load_lora_adapter", json={"lora_name": "a/b", "lora_path": "secret"})
    first, second = lines.fields(2)
    assert first["body"] == '{"prompt":"' + PROMPT[:13]
    assert "body" not in second


def test_a_slow_request_has_a_warning(start: Start, lines: Lines) -> None:
    client = start(slow_request_s=0)
    logging.getLogger("sera_serve.requests").setLevel(logging.WARNING)
    client.get("/healthz")
    lines.fields(1)
    (record,) = lines.records
    assert (record.levelname, record.getMessage()) == ("WARNING", "slow request")
    assert record.fields["route"] == "/healthz"  # type: ignore[attr-defined]


def written(log_format: Any, log: Callable[[], object], count: int, access_log: bool = True) -> list[str]:
    """The lines of a process's log. Waits for so many: a line follows its response."""
    stream = io.StringIO()

    def found() -> list[str]:
        # A busy machine may let the event loop stand still, which has a line of its own.
        return [line for line in stream.getvalue().splitlines() if "stood still" not in line]

    with redirect_stderr(stream), logging_to_stderr(log_format, access_log):
        log()
        wait_until(lambda: len(found()) >= count)
    return found()


def test_json_lines_are_json_with_their_fields(start: Start) -> None:
    client = start()

    def log() -> None:
        client.post("/v1/generate", json={"prompt": PROMPT})
        logging.getLogger("sera_serve.engine").warning("adapter %s\nfails", "a/b")
        try:
            raise RuntimeError(SECRET)
        except RuntimeError:
            logging.getLogger("sera_serve.engine").exception("it broke")

    found = sorted(map(json.loads, written("json", log, 3)), key=lambda line: line["level"])
    error, request, warning = found
    assert (request["message"], request["logger"], request["status"]) == ("request", "sera_serve.requests", 200)
    assert request["time"].endswith("Z") and len(request["time"]) == 24
    assert (warning["message"], warning["level"]) == ("adapter a/b\nfails", "WARNING")
    assert error["error"].startswith("Traceback")


def test_text_lines_have_the_fields_too(start: Start) -> None:
    client = start()
    (line,) = written("text", lambda: client.get("/v1/adapters"), 1)
    assert " INFO sera_serve.requests: request request_id=req-" in line
    assert " method=GET route=/v1/adapters status=200 seconds=0." in line
    record = logging.makeLogRecord({"msg": "request", "fields": {"a": 'b "c"\n', "d": 1}})
    assert TextFormatter().format(record).endswith('request a="b \\"c\\"\\n" d=1')
    assert "\n" not in JsonFormatter().format(record)


def test_no_line_for_each_request_where_the_setting_says_so(start: Start, lines: Lines) -> None:
    client = start()

    def log() -> None:
        client.get("/healthz")
        # The line of a request that came before would be there.
        client.get("/healthz")

    assert written("text", log, 0, access_log=False) == []
    assert lines.records == []


def test_lines_that_find_no_room_are_counted_and_nobody_waits() -> None:
    handler = BoundedQueueHandler(queue.Queue(2))
    for _ in range(5):
        handler.handle(logging.makeLogRecord({"msg": "x"}))
    assert handler.dropped == 3


def test_the_log_says_how_many_lines_were_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def log() -> None:
        (handler,) = (one for one in logging.getLogger().handlers if isinstance(one, BoundedQueueHandler))
        handler.dropped = 7
        logging.getLogger("sera_serve.engine").warning("after")

    dropped, after = written("text", log, 2)
    assert "7 lines of the log were dropped" in dropped
    assert after.endswith("after")


def test_a_log_that_is_full_at_the_end_is_written_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sera_serve.commands.logs._MOST_WAITING", 3)
    may_write = threading.Event()

    class SlowStream(io.StringIO):
        def write(self, text: str) -> int:
            may_write.wait()
            return super().write(text)

    stream = SlowStream()
    threading.Timer(0.3, may_write.set).start()
    with redirect_stderr(stream), logging_to_stderr("text") as handler:
        for _ in range(20):
            logging.getLogger("sera_serve.engine").warning("line")
        assert handler.queue.full()
    assert handler not in logging.getLogger().handlers
    lines = stream.getvalue().splitlines()
    assert sum(line.endswith("line") for line in lines) + handler.dropped == 20
    assert f"{handler.dropped} lines of the log were dropped" in stream.getvalue()


def test_lines_that_a_full_disk_refuses_are_counted_and_tear_no_other(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", mib=1) as disk:
        path, logger = disk / "log", logging.getLogger("sera_serve.engine")
        with path.open("a") as file, redirect_stderr(file), logging_to_stderr("json") as handler:
            logger.warning("before")
            wait_until(lambda: path.read_bytes().endswith(b"\n"))
            fill_bytes(disk)
            for line in range(40):
                logger.warning("full %d %s", line, "x" * 300)
            wait_until(handler.queue.empty)
            (disk / "filler").unlink()
            logger.warning("after")
        lines = path.read_text().splitlines()
    whole = [json.loads(line)["message"] for line in lines if line.endswith("}")]
    assert whole[0] == "before" and whole[-1] == "after"
    told = [int(message.split()[0]) for message in whole if "lines of the log were lost" in message]
    full = [message for message in whole if message.startswith("full")]
    assert sum(told) + len(full) == 40 and sum(told) > 20
    assert "(No space left on device)" in whole[-2]
    # One line found room for its first part.
    assert len(lines) - len(whole) <= 1


@pytest.mark.parametrize("taken", [0, 5])
def test_a_refused_line_is_counted_and_the_next_one_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    """The twin of the full disk. `taken` bytes of each refused line find room."""
    path, write, is_full = tmp_path / "log", os.write, [False]

    def full(descriptor: int, data: bytes) -> int:
        if not is_full[0]:
            return write(descriptor, data)
        if taken and len(data) > 5 and b"x" in data:
            return write(descriptor, data[:taken])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(data: bytes) -> int:
        return full(writer_descriptor, data)

    with path.open("a") as file, redirect_stderr(file):
        writer_descriptor = file.fileno()
        writer = StderrHandler()
        monkeypatch.setattr(writer, "_write", refuse)
        for message in ("one", "two"):
            writer.handle(logging.makeLogRecord({"msg": message}))
        is_full[0] = True
        writer.handle(logging.makeLogRecord({"msg": "xxxxxxxx"}))
        assert (writer.failed, writer.reason) == (1, "No space left on device")
        is_full[0] = False
        writer.handle(logging.makeLogRecord({"msg": "three"}))
    torn = ["x" * taken] if taken else []
    assert path.read_text().splitlines() == ["one", "two", *torn, "three"]


def test_what_was_lost_is_told_at_the_end_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def log() -> None:
        refused = [True]
        put = StderrHandler.put
        monkeypatch.setattr(
            StderrHandler, "put", lambda self, line: not (refused and refused.pop()) and put(self, line)
        )
        logging.getLogger("sera_serve.engine").warning("lost")
        wait_until(lambda: not refused)

    (line,) = written("text", log, 0)
    assert "1 lines of the log were lost" in line


def test_a_clients_images_write_no_lines_of_their_own() -> None:
    # An EXIF entry whose text lies behind the end of the file.
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHIII", 1, 0x10F, 2, 100, 8, 0)
    photo = image_file(1, "JPEG", exif=exif)
    huge = image_file(picture(width=1, height=1)).replace(struct.pack(">II", 1, 1), struct.pack(">II", 9999, 10000), 1)
    # The check sum of the header.
    huge = huge[:29] + struct.pack(">I", zlib.crc32(huge[12:29])) + huge[33:]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with logging_to_stderr("json"):
            decode_image(photo)
            with pytest.raises(ImageTooLarge, match="9999 x 10000"):
                decode_image(huge)
            assert told == []
            warnings.warn("another library's", stacklevel=1)
        decode_image(photo)
    assert [str(warning.message)[:7] for warning in told] == ["another", "Tag dat"]
