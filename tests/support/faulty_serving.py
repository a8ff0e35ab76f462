"""A server with the real engine, and a store whose reads can be slow or fail."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from adapters_store import AdapterBundle, AdapterStore
from sera_serve.engine import ServingEngine
from support.live_server import wait_until

WRITERS = 9
PROMPT = "Once upon a time"
NEW_TOKENS = 8


class FaultyStore(AdapterStore):
    """A store that calls `before_load` with the digest before every read of a bundle."""

    before_load: Callable[[str], None] = staticmethod(lambda digest: None)

    def loading(self, digest: str) -> AbstractContextManager[AdapterBundle]:
        self.before_load(digest)
        return super().loading(digest)


@dataclass
class Serving:
    """A running server, and the expected tokens of each of its adapters."""

    url: str
    client: httpx.Client
    app: FastAPI
    engine: ServingEngine
    store: FaultyStore
    expected: dict[str | None, list[int]]

    def ask(self, adapter: str | None, **fields: Any) -> httpx.Response:
        """Send one request on its own connection, so that any thread may call this method."""
        return httpx.post(f"{self.url}/v1/generate", json=body(adapter, **fields), timeout=60)

    def assert_right(self, adapter: str | None, response: httpx.Response | None = None) -> None:
        """Check that the response comes from the adapter's own weights."""
        response = response or self.ask(adapter)
        assert response.status_code == 200, response.text
        assert response.json()["token_ids"] == self.expected[adapter]

    def path_of(self, adapter: str) -> Path:
        """Return the file of an adapter's bundle."""
        return self.store.root / "bundles" / f"{self.store.resolve(adapter).digest}.safetensors"

    def settle(self) -> None:
        """Wait until no request is in flight, and check that the engine holds nothing."""
        wait_until(lambda: self.engine.in_flight() == 0 and self.engine.residency.leases() == 0, 30)
        self.engine.residency.check_invariants()


def body(adapter: str | None, **fields: Any) -> dict[str, Any]:
    return {"adapter": adapter, "prompt": PROMPT, "max_new_tokens": NEW_TOKENS} | fields


def name(index: int) -> str:
    return f"t{index}/writer"
