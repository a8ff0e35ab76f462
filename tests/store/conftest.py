"""The fork server for tests of concurrency and kills, and the store they start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from bundle_factory import bundle_path, make_bundle
from store_jobs import NAME, JobServer

from adapters_store import AdapterStore


@pytest.fixture(scope="session")
def jobs() -> Iterator[JobServer]:
    server = JobServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def two_versions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store to copy: versions v1 and v2 of NAME, alias stable on v1; a bundle that nothing needs."""
    root = tmp_path_factory.mktemp("template") / "store"
    store = AdapterStore(root)
    store.publish(make_bundle(1), NAME)
    store.publish(make_bundle(2), NAME)
    store.set_alias(NAME, "stable", f"{NAME}@v1")
    store.publish(make_bundle(5), "acme/gone")
    unneeded = bundle_path(store, make_bundle(5).digest)
    data = unneeded.read_bytes()
    store.delete("acme/gone")
    # As a kill leaves it: deleting removes the bundle itself.
    unneeded.write_bytes(data)
    return root


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")
