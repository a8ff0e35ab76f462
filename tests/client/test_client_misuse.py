"""Wrong arguments and wrong uses of the Python clients: refused at once, before anything is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from sera_serve.client import AsyncSeraClient, RetryPolicy, SeraClient, SeraConnectionError

READY = {"status": "ready", "store": "writable"}


def never(request: httpx.Request) -> httpx.Response:
    raise AssertionError(f"{request.method} {request.url} was sent")


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda client: client.classify_each(["a"], adapters="acme/a"), "adapters is 'acme/a'; give a list"),
        (lambda client: client.classify_each(["a"], adapters=b"acme/a"), "adapters is b'acme/a'"),
        (lambda client: client.classify_each(["a"], adapters={"acme/a": 0.5}), "adapters is {"),
        (lambda client: client.classify_each(["a"], adapters=None), "adapters is None"),
        (lambda client: client.classify_each(["a"], adapters=["acme/a", 5]), "adapters is 5"),
        (lambda client: client.classify(["a"], adapter=b"acme/a"), "adapter is b'acme/a'"),
        (lambda client: client.classify(["a"], adapter=["acme/a"]), "adapter is \\['acme/a'\\]"),
        (lambda client: client.classify(["a"], adapter={b"acme/a": 1.0}), "adapter is b'acme/a'"),
        (lambda client: client.classify(bytearray(b"image"), adapter="acme/a"), "inputs is of type bytearray"),
        (lambda client: client.classify([memoryview(b"image")], adapter="acme/a"), "item of type memoryview"),
        (lambda client: client.classify(5, adapter="acme/a"), "inputs is of type int"),
        (lambda client: client.embed(["a"], model=b"acme/a"), "model is b'acme/a'"),
        (lambda client: client.embed(None, model="acme/a"), "inputs is of type NoneType"),
        (lambda client: client.generate("a", adapter=b"acme/a"), "adapter is b'acme/a'"),
        (lambda client: client.generate(None), "prompt is None"),
        (lambda client: client.generate({"prompt": 1}), "prompt is {"),
        (lambda client: client.adapters.get(b"acme/a"), "reference is b'acme/a'"),
        (lambda client: client.adapters.delete(None), "reference is None"),
        (lambda client: client.adapters.pin(Path("acme/a")), "reference is "),
        (lambda client: client.models.get(b"acme/a"), "model is b'acme/a'"),
        (lambda client: client.adapters.upload(b"acme/a", b"bundle"), "name is b'acme/a'"),
        (lambda client: client.adapters.upload(None, b"bundle"), "name is None"),
    ],
)
def test_an_argument_of_another_type_is_named(call: Callable[[Any], object], named: str) -> None:
    with SeraClient(transport=httpx.MockTransport(never)) as client, pytest.raises(TypeError, match=named):
        call(client)


def test_a_name_that_makes_too_long_an_address_is_a_value_error() -> None:
    with SeraClient(transport=httpx.MockTransport(never)) as client:
        with pytest.raises(ValueError, match=r"no address.*names"):
            client.adapters.get("acme/" + "a" * 70_000)
        with pytest.raises(ValueError, match=r"no address.*names"):
            client.adapters.list(after="a" * 70_000)


@pytest.mark.parametrize("kind", [SeraClient, AsyncSeraClient])
@pytest.mark.parametrize("retries", [3, 3.5, -1, "3", None])
def test_retries_that_are_no_policy_are_refused(kind: type[SeraClient | AsyncSeraClient], retries: Any) -> None:
    with pytest.raises(TypeError, match=r"RetryPolicy\(max_retries=3\)"):
        kind(retries=retries)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"max_retries": 3.5}, TypeError),
        ({"max_retries": True}, TypeError),
        ({"max_retries": "3"}, TypeError),
        ({"max_retries": -1}, ValueError),
        ({"max_total_s": "60"}, TypeError),
        ({"max_total_s": float("nan")}, ValueError),
        ({"first_delay_s": -5}, ValueError),
        ({"max_delay_s": None}, TypeError),
        ({"max_delay_s": float("nan")}, ValueError),
    ],
)
def test_a_policy_of_wrong_numbers_is_refused(fields: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(fields))):
        RetryPolicy(**fields)


@pytest.mark.parametrize("location", ["javascript:alert(1)", "mailto:a@b", "http://[::1", "x" * 70_000])
def test_a_redirection_to_no_address_is_an_error_of_the_client(location: str) -> None:
    def redirecting(request: httpx.Request) -> httpx.Response:
        return httpx.Response(302, headers={"Location": location})

    async def redirecting_async(request: httpx.Request) -> httpx.Response:
        return redirecting(request)

    async def awaited() -> None:
        async with AsyncSeraClient(transport=httpx.MockTransport(redirecting_async)) as client:
            await client.generate("a")

    transport = httpx.MockTransport(redirecting)
    with SeraClient(transport=transport) as client, pytest.raises(SeraConnectionError, match="location header"):
        client.generate("a")
    with pytest.raises(SeraConnectionError, match="location header"):
        asyncio.run(awaited())


def test_a_client_may_be_closed_twice_and_says_that_it_is_closed() -> None:
    client = SeraClient(transport=httpx.MockTransport(never))
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.ready()


def test_a_client_on_a_second_event_loop_is_refused() -> None:
    """The connection that it would take again belongs to a loop that has ended."""

    async def ready(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=READY)

    client = AsyncSeraClient(transport=httpx.MockTransport(ready))
    assert asyncio.run(client.ready()).status == "ready"
    for late in (client.ready, client.aclose):
        with pytest.raises(RuntimeError, match="make an AsyncSeraClient for each event loop"):
            asyncio.run(late())
