"""The engine's thread dies of an error: every request in flight ends, and the server reports the error."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import LlamaForCausalLM

from sera_kernels import AdapterTables
from support.answers import events, refused
from support.faulty_serving import Serving, name
from support.live_server import wait_until

Serve = Callable[..., Serving]


@contextmanager
def failing_forward(armed: threading.Event, delay_s: float = 0) -> Iterator[None]:
    """Make every forward pass of a decoder take so much longer, and raise after `armed` is set."""

    def hook(module: nn.Module, inputs: Any) -> None:
        if not isinstance(module, LlamaForCausalLM):
            return
        time.sleep(delay_s)
        if armed.is_set():
            raise RuntimeError("an accelerator fell off the bus")

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_every_request_ends_when_the_engine_dies(serve: Serve) -> None:
    serving = serve()
    armed = threading.Event()
    with failing_forward(armed), ThreadPoolExecutor(12) as clients:
        plain = [clients.submit(serving.ask, name(i), max_new_tokens=200) for i in range(4)]
        streams = [clients.submit(serving.ask, name(i), max_new_tokens=200, stream=True) for i in range(4, 8)]
        wait_until(lambda: serving.engine.in_flight() == 8)
        with serving.client.stream(
            "POST", "/v1/generate", json={"prompt": "x", "max_new_tokens": 200, "stream": True}
        ) as watched:
            lines = watched.iter_lines()
            assert '"token_ids"' in next(lines)
            armed.set()
            rest = [line for line in lines if line]
        assert '"code":"engine_unavailable"' in rest[-1]
        assert "[DONE]" not in rest[-1]
        for answer in plain:
            refused(answer.result(30), 503, "engine_unavailable")
        for answer in streams:
            response = answer.result(30)
            if response.status_code == 200:
                assert events(response.text)[-1]["error"]["code"] == "engine_unavailable"
            else:
                refused(response, 503, "engine_unavailable")
    # The process lives, reports the error, and refuses new requests at once.
    assert serving.client.get("/healthz").status_code == 200
    refused(serving.client.get("/readyz"), 503, "engine_unavailable")
    for stream in (False, True):
        refused(serving.ask(name(0), stream=stream), 503, "engine_unavailable")
    assert serving.client.get("/v1/adapters").status_code == 200
    wait_until(lambda: serving.engine.in_flight() == 0 and serving.engine.residency.leases() == 0)
    serving.engine.residency.check_invariants()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_every_request_ends_where_no_slot_can_be_cleared(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that has failed refuses everything, also what the end of a lease asks of it."""
    armed = threading.Event()
    refusals: list[int] = []
    clear = AdapterTables.clear

    def failing_clear(tables: AdapterTables, slot: int) -> None:
        if armed.is_set():
            refusals.append(slot)
            raise RuntimeError("an illegal memory access was encountered")
        clear(tables, slot)

    monkeypatch.setattr(AdapterTables, "clear", failing_clear)
    serving = serve()
    with failing_forward(armed, delay_s=0.02), ThreadPoolExecutor(3) as clients:
        answers = [clients.submit(serving.ask, name(i), max_new_tokens=200) for i in range(3)]
        wait_until(lambda: serving.engine.running() == 3)
        for i in range(3):
            # It leaves the device with its last lease.
            assert serving.client.delete(f"/v1/adapters/{name(i)}").status_code < 300
        armed.set()
        for answer in answers:
            refused(answer.result(20), 503, "engine_unavailable")
    assert len(refusals) == 3
    refused(serving.client.get("/readyz"), 503, "engine_unavailable")
    wait_until(lambda: serving.engine.in_flight() == 0 and serving.engine.residency.leases() == 0)
