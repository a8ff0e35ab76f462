"""How many connections there may be, and the address for operators."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.commands.serve import bound_sockets, http_config
from sera_serve.config import ServeSettings
from sera_serve.errors import InvalidConfiguration
from sera_serve.server import build_app
from sera_serve.server.connections import ConnectionCounts, client_of, within_descriptors
from sera_serve.server.graceful import GracefulServer
from sera_serve.server.metrics_address import parse_address
from support.live_server import live_server, wait_until
from support.raw_http import RawClient
from support.stub_engine import StubEngine

ASK = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def serve(base: FrozenBase, store: AdapterStore) -> Callable[..., ServeSettings]:
    def settings(**chosen: object) -> ServeSettings:
        return ServeSettings(store=store.root, **chosen)

    return settings


def test_further_connections_are_refused_until_one_ends(base: FrozenBase, store: AdapterStore) -> None:
    settings = ServeSettings(store=store.root, max_connections=6, max_connections_per_address=4)
    app = build_app(StubEngine(base), store, settings)
    with live_server(app) as url:
        ours = [RawClient(url) for _ in range(4)]
        for client in ours:
            client.send(ASK)
            assert client.response().status == 200
        for _ in range(300):
            with RawClient(url) as further:
                further.send(ASK)
                error = further.response().refused(503, "too_many_connections")
                assert "max_connections_per_address" in error["message"]
                assert further.ended()
        # Another address still gets in, until the server is full.
        others = [RawClient(url, source="127.0.0.2") for _ in range(2)]
        for client in others:
            client.send(ASK)
            assert client.response().status == 200
        with RawClient(url, source="127.0.0.3") as further:
            error = further.response().refused(503, "too_many_connections")
            assert "raise max_connections" in error["message"]
        for client in (*ours, *others):
            client.socket.close()

        def answers() -> bool:
            with RawClient(url) as client:
                client.send(ASK)
                return client.response().status == 200

        wait_until(answers)
        refusals = [
            line for line in httpx.get(f"{url}/metrics").text.splitlines() if 'code="too_many_connections"' in line
        ]
        assert any(float(line.split()[-1]) >= 301 for line in refusals)


def test_a_crowd_of_refused_connections_is_closed_at_once(base: FrozenBase, store: AdapterStore) -> None:
    settings = ServeSettings(store=store.root, max_connections=1)
    with live_server(build_app(StubEngine(base), store, settings)) as url, RawClient(url) as first:
        first.send(ASK)
        assert first.response().status == 200
        crowd = [RawClient(url) for _ in range(200)]
        for client in crowd:
            client.response().refused(503, "too_many_connections")
            client.socket.close()
        first.send(ASK)
        assert first.response().status == 200


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_an_ipv6_client_is_its_network(address: str, client: str) -> None:
    assert client_of(address) == client


def test_a_connection_that_ends_leaves_room_for_one() -> None:
    counts = ConnectionCounts(3, 2)
    for address in ("10.0.0.1", "10.0.0.1", "10.0.0.2"):
        assert counts.add(address) is None
    for _ in range(2):
        assert "the server has 3 open connections" in str(counts.add("10.0.0.3"))
        counts.remove("10.0.0.1")
        assert counts.add("10.0.0.1") is None
    counts.remove("10.0.0.2")
    assert "10.0.0.1 has 2 open connections" in str(counts.add("10.0.0.1"))
    assert counts.add("10.0.0.3") is None and counts.add("10.0.0.4") is not None


@pytest.mark.parametrize(
    ("limits", "connections", "raised"),
    [
        ((1024, 1 << 20), 1000, (1256, 1 << 20)),
        ((1024, 1100), 844, (1100, 1100)),
        ((1024, resource.RLIM_INFINITY), 1000, (1256, resource.RLIM_INFINITY)),
        ((4096, 4096), 1000, None),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 1000, None),
        ((64, 64), 1, None),
    ],
)
def test_open_files_are_raised_to_what_connections_need(
    limits: tuple[int, int],
    connections: int,
    raised: tuple[int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda kind, values: asked.append(values))
    settings = within_descriptors(ServeSettings(max_connections=1000))
    assert settings.max_connections == connections
    assert asked == ([] if raised is None else [raised])
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (connections < 1000) and all("max_connections" in line for line in warnings)


def test_operators_have_an_address_of_their_own(base: FrozenBase, store: AdapterStore) -> None:
    settings = ServeSettings(store=store.root, port=0, metrics_address="127.0.0.1:0", max_connections=1)
    app = build_app(StubEngine(base), store, settings)
    with bound_sockets(settings) as sockets:
        ports = [one.getsockname()[1] for one in sockets]
        config = http_config(app, settings, app.state.metrics.count_refusal, ports[1], log_level="warning")
        server = GracefulServer(config, 1, app.state.engine.stop)
        thread = threading.Thread(target=server.run, kwargs={"sockets": sockets})
        thread.start()
        try:
            wait_until(lambda: server.started)
            main, operators = (f"http://127.0.0.1:{port}" for port in ports)
            with httpx.Client(base_url=main) as client:
                assert client.get("/healthz").status_code == client.get("/v1/adapters").status_code == 200
                hidden = client.get("/metrics")
                assert (hidden.status_code, hidden.json()["error"]["code"]) == (404, "not_found")
                assert hidden.headers["x-request-id"].startswith("req-")
                # Clients' connections are used up now; the operators' are not.
                for path in ("/metrics", "/healthz", "/readyz"):
                    assert httpx.get(operators + path).status_code == 200
                for path in ("/v1/adapters", "/openapi.json", "/metrics/"):
                    assert httpx.get(operators + path).status_code == 404
        finally:
            server.should_exit = True
            thread.join(20)


def test_an_address_is_read() -> None:
    assert parse_address("127.0.0.1:9100") == ("127.0.0.1", 9100)
    assert parse_address("[::1]:0") == ("::1", 0)


@pytest.mark.parametrize(
    "text", ["", "9100", "localhost", ":9100", "localhost:", "localhost:x", "a:1:2", "a:99999", "http://a:1", "a:1/x"]
)
def test_a_wrong_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidConfiguration, match="metrics_address") as caught:
        parse_address(text)
    assert caught.value.param == "metrics_address"


def test_an_address_in_use_is_refused(tmp_path: Path) -> None:
    with bound_sockets(ServeSettings(store=tmp_path, port=0)) as taken:
        port = taken[0].getsockname()[1]
        taken[0].listen()
        with (
            pytest.raises(InvalidConfiguration, match=f"port {port}.*--metrics-address") as caught,
            bound_sockets(ServeSettings(store=tmp_path, port=0, metrics_address=f"127.0.0.1:{port}")),
        ):
            pass
        assert caught.value.param == "metrics_address"


def test_the_servers_own_port_is_refused(tmp_path: Path) -> None:
    with bound_sockets(ServeSettings(store=tmp_path, port=0)) as taken:
        port = taken[0].getsockname()[1]
    with (
        pytest.raises(InvalidConfiguration, match="metrics_address"),
        bound_sockets(ServeSettings(store=tmp_path, port=port, metrics_address=f"127.0.0.2:{port}")),
    ):
        pass
