"""Forty clients that read their streams slowly or stop, against the real engine: no token is lost, nothing is held."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest

from adapters_store import AdapterStore
from benchmarks.slow_readers import is_correct, outcome, settings_for
from benchmarks.slow_reading import Reading, StreamRead, read_streams
from sera_serve import SeraConfig
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.server import build_app
from support.factories import random_adapter, random_decoder
from support.live_server import live_server, wait_until

# The systems of both sides buffer some 100 KiB of a stream, and the server 64: so many tokens are more than that.
STREAMS, TOKENS, LONG = 40, 48, 180
WRITE_TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServingEngine]:
    base = random_decoder()
    # Without an end token, each answer is as long as it may be.
    base.model.generation_config.eos_token_id = base.tokenizer.eos_token = None
    store = AdapterStore(tmp_path_factory.mktemp("slow") / "store")
    store.publish(random_adapter(base, SeraConfig(8, 4, 8.0, "all-linear"), 1, strength=0.5), "slow/reader")
    chosen = settings_for(STREAMS) | {"write_timeout_s": WRITE_TIMEOUT_S, "pool_mib": 4, "cpu_threads": 1}
    yield ServingEngine(base, store, ServeSettings(store=store.root, **chosen))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def reading(engine: ServingEngine) -> Iterator[Reading]:
    with live_server(build_app(engine, engine.store, engine.settings)) as url:
        host, port = url.removeprefix("http://").split(":")
        yield Reading(host, int(port), "slow/reader", STREAMS, TOKENS)


def test_slow_readers_lose_no_token(reading: Reading) -> None:
    fast, slow = (read_streams(replace(reading, pause_s=pause_s)) for pause_s in (0.0, 0.05))
    assert outcome(slow, fast, TOKENS) == outcome(fast, fast, TOKENS)
    assert outcome(fast, fast, TOKENS)["whole"] == STREAMS
    assert [(read.tokens, read.text) for read in slow] == [(read.tokens, read.text) for read in fast]


@pytest.mark.slow
def test_clients_that_stop_hold_tokens_alone_and_are_cut(reading: Reading, engine: ServingEngine) -> None:
    stopping = replace(reading, streams=10, new_tokens=LONG, stops=True, held_s=WRITE_TIMEOUT_S + 3)
    with ThreadPoolExecutor(1) as readers:
        stopped = readers.submit(read_streams, stopping)
        wait_until(lambda: engine.running() == 10, 30)
        wait_until(lambda: engine.waiting() == engine.running() == 0, 30)
        # All tokens are there, and most of them unread. They hold neither a place nor an adapter, and delay nobody.
        assert not stopped.done()
        assert (engine.in_flight(), engine.residency.leases()) == (0, 0)
        body = {"prompt": "Once", "max_new_tokens": 4}
        httpx.post(f"http://{reading.host}:{reading.port}/v1/generate", json=body, timeout=5).raise_for_status()
        reads = stopped.result(60)
    fast = read_streams(replace(reading, streams=10))
    assert outcome(reads, fast, LONG) == {"streams": 10, "whole": 0, "cut": 10, "refused": 0, "wrong": 0}


def test_faults_are_seen() -> None:
    good = [StreamRead(200, [1, 2, 3], "abc", complete=True)]
    figures = {
        "streams": 1,
        "fast": outcome(good, good, 3),
        "slow": outcome(good, good, 3),
        "stopped": outcome([StreamRead(200, [1], "a")], good, 3),
        "others": {"quiet": {"failures": {}}},
        "left": {"in_flight": 0},
    }
    assert is_correct(figures)
    for change in (
        {"slow": outcome([StreamRead(200, [1, 3], "ac", complete=True)], good, 3)},
        {"slow": outcome([StreamRead(200, [1, 2], "ab")], good, 3)},
        {"stopped": outcome(good, good, 3)},
        {"others": {"quiet": {"failures": {"503 overloaded": 1}}}},
        {"left": {"in_flight": 1}},
    ):
        assert not is_correct(figures | change)
