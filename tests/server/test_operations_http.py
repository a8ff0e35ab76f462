"""Health, metrics, request ids, unknown paths, and limits of bodies."""

from __future__ import annotations

import socket
import threading

import httpx
import pytest

from adapters_store import AdapterBundle, AdapterStore
from sera_serve.jobs import JobStatus
from sera_serve.server import metrics
from support.answers import refused
from support.live_server import wait_until
from support.stub_engine import (
    CRASHES_LATER,
    FLOODING,
    GONE_LATER,
    LATE,
    LATE_LATER,
    OVERLOADED,
    TOO_LONG,
    StubEngine,
)


def samples(client: httpx.Client) -> dict[str, float]:
    """Return all metrics by name and labels."""
    lines = client.get("/metrics").text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def test_alive_and_ready(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready", "store": "writable"}


def test_a_dead_engine_is_not_ready_but_the_process_is_alive(client: httpx.Client, engine: StubEngine) -> None:
    engine.started = False
    assert "not running" in refused(client.get("/readyz"), 503, "engine_unavailable")["message"]
    assert client.get("/healthz").status_code == 200
    engine.started = True
    assert client.get("/readyz").status_code == 200


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/", "/v1/generate/", "/docs/", "/v1/adapters/a", "/%00", "/☠"])
def test_unknown_paths(client: httpx.Client, path: str) -> None:
    refused(client.get(path), 404, "not_found")


def test_each_request_has_an_id_that_the_client_cannot_choose(client: httpx.Client) -> None:
    ids = {client.get("/healthz", headers={"X-Request-Id": "mine"}).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    assert "mine" not in ids


def test_metrics_show_the_adapters_in_each_tier(client: httpx.Client) -> None:
    found = samples(client)
    assert found['sera_adapter_hits_total{tier="device"}'] == 7
    assert found['sera_adapter_load_seconds_bucket{le="0.0025",tier="host"}'] == 1
    assert found['sera_adapter_load_seconds_bucket{le="0.025",tier="store"}'] == 1
    assert found['sera_adapter_load_seconds_bucket{le="10.0",tier="store"}'] == 1
    assert found['sera_adapter_load_seconds_bucket{le="+Inf",tier="store"}'] == 2
    assert found['sera_adapter_load_seconds_count{tier="store"}'] == 2
    assert found['sera_adapter_load_seconds_sum{tier="store"}'] == pytest.approx(99.02)
    reasons = ("gone", "cannot_combine", "error")
    failures = {reason: found[f'sera_adapter_load_failures_total{{reason="{reason}"}}'] for reason in reasons}
    assert failures == {"gone": 2, "cannot_combine": 3, "error": 1}
    assert (found["sera_adapters_resident"], found["sera_adapter_evictions_total"]) == (3, 4)
    assert (found["sera_adapter_device_bytes"], found["sera_adapter_host_limit_bytes"]) == (4096, 1024)


def test_metrics_count_the_damaged_records_that_were_met(
    client: httpx.Client, store: AdapterStore, writer: AdapterBundle
) -> None:
    for name in ("worn/a", "worn/b"):
        store.publish(writer, name)
        (store.root / "adapters" / name / "versions" / "v1.json").write_bytes(b"")
    assert samples(client)["sera_damaged_records"] == 0
    refused(client.get("/v1/adapters/worn/a"), 500, "store_corrupted")
    for _ in range(2):
        refused(client.put("/v1/adapters/worn/a/pin"), 500, "store_corrupted")
        assert samples(client)["sera_damaged_records"] == 1
    for _ in range(2):
        assert client.get("/v1/adapters", params={"tenant": "worn"}).json()["adapters"] == []
        assert samples(client)["sera_damaged_records"] == 2
    for name in ("worn/a", "worn/b"):
        assert client.delete(f"/v1/adapters/{name}").status_code == 200


def test_metrics_count_requests_and_tokens_by_bounded_labels(client: httpx.Client) -> None:
    before = samples(client)
    client.post("/v1/generate", json={"prompt": "hello"})
    client.post("/v1/generate", json={"prompt": "hello", "stream": True})
    client.post("/v1/classify", json={"adapter": "demo/sorter", "inputs": ["a", "b"]})
    for prompt in (OVERLOADED, FLOODING, LATE, TOO_LONG):
        client.post("/v1/generate", json={"prompt": prompt})
    client.post("/v1/generate", json={"prompt": LATE_LATER, "stream": True})
    for number in range(3):
        client.get(f"/v1/adapters/demo/absent-{number}")
        client.get(f"/nothing-{number}")
        client.request(f"BREW{number}", "/healthz")
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert "BREW" not in response.text
    grown = {name: value - before.get(name, 0) for name, value in samples(client).items()}
    requests = "sera_http_requests_total"
    assert grown[requests + '{method="POST",route="/v1/generate",status="200"}'] == 3
    assert grown[requests + '{method="GET",route="/v1/adapters/{tenant}/{name}",status="404"}'] == 3
    assert grown[requests + '{method="GET",route="unmatched",status="404"}'] == 3
    assert grown['sera_tokens_total{kind="prompt"}'] == 15
    assert grown['sera_tokens_total{kind="cached_prompt"}'] == 6
    # The generation whose time was over had one token.
    assert grown['sera_tokens_total{kind="completion"}'] == 7
    assert grown["sera_classified_inputs_total"] == 2
    refusals = {"overloaded": 1, "tenant_overloaded": 1, "deadline_exceeded": 2}
    for code, count in refusals.items():
        assert grown[f'sera_refusals_total{{code="{code}"}}'] == count
    assert not any("context_length" in name for name in grown)
    # Four requests of the stub entered a batch: three generations and a classification.
    assert grown["sera_wait_seconds_count"] == 4
    assert grown["sera_wait_seconds_sum"] == pytest.approx(0.75)
    assert grown["sera_first_token_seconds_sum"] == pytest.approx(1.5)
    now = samples(client)
    assert (now["sera_requests_in_flight"], now["sera_waiting"], now["sera_running"]) == (0, 3, 2)
    assert now["sera_preemptions_total"] == 3
    assert now['sera_training_jobs{status="running"}'] == 0
    assert (now['sera_cache_pages{state="in_use"}'], now['sera_cache_pages{state="total"}']) == (5, 8)


def test_a_stream_that_fails_of_itself_is_no_refusal(client: httpx.Client) -> None:
    def refusals() -> dict[str, float]:
        return {name: count for name, count in samples(client).items() if name.startswith("sera_refusals_total")}

    before = refusals()
    for prompt in (CRASHES_LATER, GONE_LATER):
        assert '"error"' in client.post("/v1/generate", json={"prompt": prompt, "stream": True}).text
    assert refusals() == before


def test_a_database_that_is_locked_holds_up_no_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_JOB_COUNTS_S", 0.05)
    locked = threading.Event()
    reads: list[int] = []

    def read() -> dict[JobStatus, int]:
        reads.append(1)
        locked.wait(20)
        return {"running": 2}

    jobs = metrics.JobMetrics(read)
    assert list(jobs.collect()) == list(jobs.collect()) == []
    assert len(reads) == 1, "one waits, however many ask"
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "job-counts")
    assert thread.daemon, "a disk that never answers must not keep the process from ending"
    locked.set()
    wait_until(lambda: bool(list(jobs.collect())))
    (family,) = jobs.collect()
    assert [(sample.labels, sample.value) for sample in family.samples] == [({"status": "running"}, 2)]


def test_a_json_body_over_the_limit_is_refused(client: httpx.Client) -> None:
    body = b'{"prompt": "' + b"a" * (1 << 20) + b'"}'
    response = client.post("/v1/generate", content=body, headers={"Content-Type": "application/json"})
    refused(response, 413, "body_too_large")


def test_a_chunked_body_over_the_limit_is_refused_during_reading(url: str) -> None:
    sent = 0
    with socket.create_connection(url.removeprefix("http://").split(":"), timeout=10) as connection:
        head = "POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        while sent < 17:
            connection.sendall(chunk)
            sent += 1
        answer = connection.recv(4096)
    assert b"413" in answer.split(b"\r\n")[0]


def test_a_large_content_length_is_refused_before_the_body_is_sent(url: str) -> None:
    with socket.create_connection(url.removeprefix("http://").split(":"), timeout=10) as connection:
        head = "POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        connection.sendall(f"{head}Content-Length: 1073741824\r\nExpect: 100-continue\r\n\r\n".encode())
        answer = connection.recv(4096)
    assert b"413" in answer.split(b"\r\n")[0]
    assert b'"code":"body_too_large"' in answer
