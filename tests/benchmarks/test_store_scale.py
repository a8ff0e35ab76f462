"""The benchmark of large stores has what a list of the server needs."""

from __future__ import annotations

from pathlib import Path

from fastapi.testclient import TestClient

from adapters_store import AdapterStore
from benchmarks.store_scale import _listing_app, real_bundle


def test_lists_are_answered_without_an_engine(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    store.publish(real_bundle(1), "acme/one")
    with TestClient(_listing_app(store)) as client:
        answer = client.get("/v1/adapters", params={"limit": 10})
    assert [adapter["adapter"] for adapter in answer.json()["adapters"]] == ["acme/one"]
