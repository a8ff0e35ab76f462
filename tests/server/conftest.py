"""A server over the stub engine and a store with two adapters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import httpx
import pytest

from adapters_store import AdapterBundle, AdapterStore
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.server import build_app
from support.factories import random_adapter, random_decoder
from support.live_server import live_server, wait_until
from support.stub_engine import StubEngine

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from support.browser import Tab

RANK, SPLIT = 8, 4


@pytest.fixture(scope="session")
def base() -> FrozenBase:
    return random_decoder()


@pytest.fixture(scope="session")
def writer(base: FrozenBase) -> AdapterBundle:
    return random_adapter(base, SeraConfig(RANK, SPLIT, 16, ("q_proj", "v_proj")), seed=1)


@pytest.fixture(scope="session")
def sorter(base: FrozenBase) -> AdapterBundle:
    config = SeraConfig(RANK, SPLIT, 16, ("q_proj",))
    return random_adapter(base, config, seed=2, labels=["spam", "ham"])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, writer: AdapterBundle, sorter: AdapterBundle) -> AdapterStore:
    store = AdapterStore(tmp_path_factory.mktemp("server") / "store")
    store.publish(writer, "demo/writer")
    store.publish(sorter, "demo/sorter")
    return store


@pytest.fixture(scope="module")
def stub(base: FrozenBase) -> StubEngine:
    return StubEngine(base)


@pytest.fixture
def engine(stub: StubEngine) -> StubEngine:
    stub.begin_record()
    return stub


@pytest.fixture(scope="module")
def module_url(stub: StubEngine, store: AdapterStore) -> Iterator[str]:
    settings = ServeSettings(store=store.root, max_upload_mib=1)
    with live_server(build_app(stub, store, settings)) as address:
        yield address
    assert not stub.started


@pytest.fixture
def url(module_url: str, engine: StubEngine) -> Iterator[str]:
    yield module_url
    # After every test, the engine must hold nothing.
    wait_until(lambda: engine.open_streams == 0)


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=10) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Playwright is imported by the tests in a browser alone.
    from support import browser as browsers

    with browsers.browser() as started:
        yield started


@pytest.fixture
def tab(browser: Browser, url: str) -> Iterator[Tab]:
    """The console, in a browser context of its own."""
    from support import browser as browsers

    with browsers.tab(browser, url) as opened:
        yield opened
