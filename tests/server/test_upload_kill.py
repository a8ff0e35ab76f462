"""kill -9 of the server during uploads: every version with a response 201 is complete in the store."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
import uvicorn

from adapters_store import AdapterBundle, AdapterStore
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.commands.serve import bound_socket
from sera_serve.config import ServeSettings
from sera_serve.server import build_app
from support.factories import random_adapter, random_decoder
from support.stub_engine import StubEngine

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("SERA_TEST_KILLS", "8"))
CLIENTS = 3
# The bundles are made before the test, so that the time between kills goes into uploads.
VARIETY = 24


def serve(listener: socket.socket, root: Path) -> None:
    """Run the server process: the real app and the real store, with the stub engine."""
    settings = ServeSettings(store=root, max_upload_mib=4)
    app = build_app(StubEngine(random_decoder()), AdapterStore(root), settings)
    uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none")).run(sockets=[listener])


class Uploader(threading.Thread):
    """Uploads versions of one adapter until `stop` is set, and records the acknowledged versions."""

    def __init__(self, url: str, name: str, bodies: list[bytes], stop: threading.Event) -> None:
        super().__init__()
        self.url, self.adapter, self.bodies, self.stop = url, name, bodies, stop
        self.acknowledged: list[tuple[str, int, str]] = []

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=10) as client:
            while not self.stop.is_set():
                body = random.choice(self.bodies)
                try:
                    answer = client.post("/v1/adapters", files={"bundle": ("b", body)}, data={"name": self.adapter})
                except httpx.TransportError:  # the server was killed, or does not listen yet
                    time.sleep(0.01)
                    continue
                assert answer.status_code == 201, answer.text
                said = answer.json()
                self.acknowledged.append((said["adapter"], said["version"], said["digest"]))


def bundles(base: FrozenBase) -> list[AdapterBundle]:
    shape = SeraConfig(8, 4, 16.0, ("q_proj", "v_proj"))
    return [random_adapter(base, shape, seed) for seed in range(VARIETY)]


def test_acknowledged_uploads_survive_kills_at_random_moments(tmp_path: Path) -> None:
    root = tmp_path / "store"
    AdapterStore(root)
    bodies = [bundle.to_bytes() for bundle in bundles(random_decoder())]
    # The fork server imports once. Each server is then a fork that starts in a fraction of a second.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "support.factories", "sera_serve.server"])
    kept: dict[tuple[str, int], str] = {}
    for _ in range(KILLS):
        with bound_socket("127.0.0.1", 0) as listener:
            listener.listen()
            server = context.Process(target=serve, args=(listener, root))
            server.start()
            stop = threading.Event()
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            clients = [Uploader(url, f"acme/a{i}", bodies, stop) for i in range(CLIENTS)]
            for client in clients:
                client.start()
            deadline = time.monotonic() + 30
            while not any(client.acknowledged for client in clients):
                assert server.is_alive() and time.monotonic() < deadline, "the server did not come up"
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.25))
            assert server.pid is not None
            os.kill(server.pid, signal.SIGKILL)
            stop.set()
            server.join(10)
        for client in clients:
            client.join(20)
            assert not client.is_alive()
            kept |= {(adapter, version): digest for adapter, version, digest in client.acknowledged}
        opened = AdapterStore(root, create=False)
        opened.check_integrity()
        for (adapter, version), digest in kept.items():
            assert opened.resolve(f"{adapter}@v{version}").digest == digest
    assert len(kept) > KILLS
    for digest in set(kept.values()):
        assert opened.load(digest).digest == digest
