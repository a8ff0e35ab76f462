"""Servers with the real engine on a small random base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters_store import AdapterBundle
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.server import build_app
from support.factories import greedy, merged, random_adapter, random_decoder
from support.faulty_serving import NEW_TOKENS, PROMPT, WRITERS, FaultyStore, Serving, name
from support.live_server import live_server

SHAPES = [
    SeraConfig(32, 32, 64, "all-linear"),
    SeraConfig(8, 2, 16, ("q_proj", "v_proj")),
    SeraConfig(64, 8, 128, "all-linear"),
]


@pytest.fixture(scope="session")
def base() -> FrozenBase:
    return random_decoder()


@pytest.fixture(scope="session")
def writers(base: FrozenBase) -> dict[str, AdapterBundle]:
    return {name(i): random_adapter(base, SHAPES[i % len(SHAPES)], i, strength=0.5) for i in range(WRITERS)}


@pytest.fixture(scope="session")
def expected(base: FrozenBase, writers: dict[str, AdapterBundle]) -> dict[str | None, list[int]]:
    tokens = base.tokenizer(PROMPT)["input_ids"]
    answers: dict[str | None, list[int]] = {None: greedy(base, tokens, NEW_TOKENS)}
    answers |= {adapter: greedy(merged(base, bundle), tokens, NEW_TOKENS) for adapter, bundle in writers.items()}
    assert len({tuple(answer) for answer in answers.values()}) == WRITERS + 1
    return answers


@pytest.fixture
def serve(
    base: FrozenBase,
    writers: dict[str, AdapterBundle],
    expected: dict[str | None, list[int]],
    tmp_path: Path,
) -> Iterator[Callable[..., Serving]]:
    """Start servers. At the end of the test, a server whose engine still runs must hold nothing."""
    with ExitStack() as stack:
        started = []

        def start(**settings: Any) -> Serving:
            store = FaultyStore(tmp_path / "store")
            for adapter, bundle in writers.items():
                store.publish(bundle, adapter)
            chosen = {"pool_mib": 4, "kv_cache_tokens": 16384, "cpu_threads": 1, "store": store.root} | settings
            engine = ServingEngine(base, store, ServeSettings(**chosen))
            app = build_app(engine, store, engine.settings)
            url = stack.enter_context(live_server(app))
            client = stack.enter_context(httpx.Client(base_url=url, timeout=60))
            started.append(Serving(url, client, app, engine, store, expected))
            return started[-1]

        yield start
        for serving in started:
            if serving.engine.failure() is None:
                serving.settle()
