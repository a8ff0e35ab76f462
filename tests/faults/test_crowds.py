"""Load: thousands of requests, a tenant that floods, and disconnects. Every request gets a right response."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import LlamaForCausalLM

from support.answers import refused
from support.faulty_serving import NEW_TOKENS, WRITERS, Serving, body, name
from support.live_server import wait_until
from support.standstill import standstill

Serve = Callable[..., Serving]
CROWD = int(os.environ.get("SERA_TEST_CROWD", "600"))


@pytest.mark.parametrize("size", [CROWD, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_crowd_of_tiny_requests_at_once(serve: Serve, size: int) -> None:
    """Each request gets a right result, or a refusal with Retry-After. No request is lost, and the server goes on."""
    serving = serve(max_queue=64)
    adapters = [None if i % (WRITERS + 1) == WRITERS else name(i % WRITERS) for i in range(size)]
    limits = httpx.Limits(max_connections=None)

    async def crowd() -> list[httpx.Response]:
        transport = httpx.ASGITransport(serving.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", limits=limits) as client:
            asked = [
                asyncio.ensure_future(client.post("/v1/generate", json=body(adapter, max_new_tokens=NEW_TOKENS)))
                for adapter in adapters
            ]
            with standstill():
                # Nothing is served until the queue is full, however busy the machine is.
                await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            return await asyncio.gather(*asked)

    answers = asyncio.run(crowd())
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses[200] >= 64
    assert set(statuses) <= {200, 429, 503}
    assert statuses[200] < size, "the queue has a bound"
    for adapter, answer in zip(adapters, answers, strict=True):
        if answer.status_code == 200:
            assert answer.json()["token_ids"] == serving.expected[adapter]
        else:
            code = answer.json()["error"]["code"]
            assert "engine" not in code
            refused(answer, answer.status_code, code)
            assert int(answer.headers["retry-after"]) >= 1
    serving.settle()
    serving.assert_right(name(0))


def test_a_flood_does_not_delay_another_tenant(serve: Serve) -> None:
    """With a small batch, a request that arrives after a flood ends long before the flood ends."""
    serving = serve(max_sequences=4)
    flood, victims = 60, [name(1), name(2)]
    order: list[str] = []
    lock = threading.Lock()

    def ask(adapter: str) -> httpx.Response:
        answer = serving.ask(adapter, max_new_tokens=NEW_TOKENS if adapter in victims else 40)
        with lock:
            order.append(adapter)
        return answer

    with ThreadPoolExecutor(flood + 2) as clients:
        flooding = [clients.submit(ask, name(0)) for _ in range(flood)]
        wait_until(lambda: serving.engine.in_flight() > flood // 2)
        asked = {adapter: clients.submit(ask, adapter) for adapter in victims}
        for adapter, answer in asked.items():
            serving.assert_right(adapter, answer.result(60))
        answers = [answer.result(60) for answer in flooding]
    for adapter in victims:
        assert order.index(adapter) < flood // 2, f"{adapter} came out as number {order.index(adapter)}"
    for answer in answers:
        if answer.status_code != 200:
            refused(answer, answer.status_code, answer.json()["error"]["code"])
            assert answer.status_code in (429, 503)


def test_disconnects_in_mid_stream_do_not_disturb_other_requests(serve: Serve) -> None:
    serving = serve(max_sequences=4)
    leaving, stay = [name(i % WRITERS) for i in range(12)], [name(i % WRITERS) for i in range(18)]
    passes = 0

    def count(module: nn.Module, inputs: Any) -> None:
        nonlocal passes
        passes += isinstance(module, LlamaForCausalLM)

    def leave(adapter: str) -> None:
        with (
            httpx.Client(base_url=serving.url, timeout=60) as client,
            client.stream("POST", "/v1/generate", json=body(adapter, max_new_tokens=230, stream=True)) as stream,
        ):
            assert next(stream.iter_lines()).startswith("data: {")

    counting = register_module_forward_pre_hook(count)
    try:
        with ThreadPoolExecutor(30) as clients:
            left = [clients.submit(leave, adapter) for adapter in leaving]
            answers = list(clients.map(serving.ask, stay))
            for one in left:
                one.result(30)
        serving.settle()
    finally:
        counting.remove()
    for adapter, answer in zip(stay, answers, strict=True):
        serving.assert_right(adapter, answer)
    # Without cancellation, the streams would need at least 12 * 230 / 4 = 690 passes.
    assert passes < 400
