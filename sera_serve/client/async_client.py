"""The client for code with an event loop: asyncio or trio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeVar, Unpack

import anyio
import anyio.lowlevel
import httpx

from sera_serve.client import answers, calls
from sera_serve.client.calls import (
    Adapter,
    Call,
    ClassifyInput,
    ClassifyOptions,
    EmbedInput,
    EmbedOptions,
    GenerateOptions,
    Prompt,
)
from sera_serve.client.connection import DEFAULT_MAX_CONNECTIONS, DEFAULT_TIMEOUT_S, connection
from sera_serve.client.errors import SeraConnectionError, SeraError
from sera_serve.client.events import EventReader
from sera_serve.client.exchange import RetryPolicy, Tries, build_request, checked_policy, lost_connections, refusal
from sera_serve.client.uploads import Progress

T = TypeVar("T")


class AsyncSeraClient:
    """`SeraClient`, to be awaited: the same methods, arguments, answers, errors and retries.

    Tasks may share a client. Close it with `aclose`, or use it as a context. A call that is cancelled ends on the
    server too, unless it is an upload, a deletion or a pin that has begun.

    A client belongs to the event loop of its first call, as its connections do. Another one gets a RuntimeError.

    Attributes:
        adapters: The adapters of the server's store.
        models: The base and the adapters, as OpenAI's API lists them.
    """

    def __init__(
        self,
        base_url: str = "http://localhost:8000",
        *,
        api_key: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
        retries: RetryPolicy = RetryPolicy(),  # noqa: B008 - it is frozen
        headers: Mapping[str, str] | None = None,
        max_connections: int = DEFAULT_MAX_CONNECTIONS,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Set up; nothing is sent. Arguments are as in `SeraClient`."""
        arguments = connection(base_url, api_key, timeout, headers, max_connections)
        self._http = httpx.AsyncClient(**arguments, transport=transport)
        self._retries = checked_policy(retries)
        self._loop: object = None
        self.adapters = AsyncAdapters(self._call)
        self.models = AsyncModels(self._call)

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        self._check_loop()
        await self._http.aclose()

    async def generate(
        self, prompt: Prompt, *, adapter: Adapter | None = None, **options: Unpack[GenerateOptions]
    ) -> answers.Generation:
        """Continue a prompt. See `SeraClient.generate`."""
        return await self._call(calls.generate(prompt, adapter, options))

    @asynccontextmanager
    async def stream(
        self, prompt: Prompt, *, adapter: Adapter | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncIterator[AsyncIterator[answers.GenerateEvent]]:
        """Continue a prompt, and give the events as they come. Arguments are as in `generate`.

        The end of the context closes the stream: a generation that is not finished ends on the server too.

            async with client.stream("Once upon a time") as events:
                async for event in events:
                    print(event.text, end="")
        """
        call = calls.stream(prompt, adapter, options)
        response = await self._exchange(call)
        try:
            yield self._events(response, call)
        finally:
            # A task that is cancelled must close its connection too.
            with anyio.CancelScope(shield=True):
                await response.aclose()

    async def classify(
        self,
        inputs: str | bytes | Path | Sequence[ClassifyInput],
        *,
        adapter: Adapter,
        **options: Unpack[ClassifyOptions],
    ) -> answers.Classified:
        """Classify texts, sentence pairs or images by an adapter with a head, or by a weighted sum of such adapters.

        An image is the bytes of its file, or a `Path`: a `str` is a text. A pair is a tuple in a list of inputs.
        """
        return await self._call(calls.classify(inputs, adapter, options))

    async def classify_each(
        self,
        inputs: str | bytes | Path | Sequence[ClassifyInput],
        *,
        adapters: Sequence[str],
        **options: Unpack[ClassifyOptions],
    ) -> Sequence[answers.Classified]:
        """Classify inputs, as in `classify`, by each of several adapters of one tenant; one answer for each adapter."""
        return await self._call(calls.classify_each(inputs, adapters, options))

    async def embed(
        self,
        inputs: str | bytes | Path | Sequence[EmbedInput],
        *,
        model: str,
        **options: Unpack[EmbedOptions],
    ) -> answers.Embeddings:
        """Return a vector for each input. See `SeraClient.embed`."""
        return await self._call(calls.embed(inputs, model, options))

    async def health(self) -> answers.Health:
        """Tell that the server's process answers. It is asked once."""
        return await self._call(calls.health())

    async def ready(self) -> answers.Readiness:
        """Tell that the server takes requests. Raises UnavailableError, with the reason, if not. It is asked once."""
        return await self._call(calls.ready())

    async def _call(self, call: Call[T]) -> T:
        response = await self._exchange(call)
        return call.read(response.content)

    async def _exchange(self, call: Call[T]) -> httpx.Response:
        self._check_loop()
        tries = Tries(call, self._retries)
        failure: SeraError
        while True:
            with call.request() as arguments:
                request = build_request(self._http, arguments)
                try:
                    with lost_connections(call):
                        response = await self._http.send(request, stream=call.streams)
                        if response.is_success:
                            return response
                        await response.aread()
                    failure = refusal(response)
                except SeraConnectionError as error:
                    failure = error
            await anyio.sleep(tries.delay_s(failure))

    def _check_loop(self) -> None:
        loop = anyio.lowlevel.current_token()
        if self._loop is None:
            self._loop = loop
        elif self._loop != loop:
            raise RuntimeError(
                "this client was used on another event loop; make an AsyncSeraClient for each event loop"
            )

    async def _events(self, response: httpx.Response, call: Call[None]) -> AsyncIterator[answers.GenerateEvent]:
        reader = EventReader(response.headers.get("x-request-id"))
        with lost_connections(call):
            async for data in response.aiter_bytes():
                for event in reader.feed(data):
                    yield event
        reader.finish()


class _Send(Protocol):
    """Sends a call, and reads its answer."""

    async def __call__(self, call: Call[T]) -> T: ...


class AsyncAdapters:
    """The adapters of the server's store. See `Adapters` for the arguments."""

    def __init__(self, send: _Send) -> None:
        self._send = send

    async def list(
        self, *, limit: int = 100, after: str | None = None, tenant: str | None = None
    ) -> answers.AdapterPage:
        """One page of the adapters, ordered by name."""
        return await self._send(calls.list_adapters(limit, after, tenant))

    async def iterate(
        self, *, tenant: str | None = None, page_size: int = 100
    ) -> AsyncIterator[answers.AdapterSummary]:
        """All adapters, ordered by name. A page is asked for when it is needed."""
        after: str | None = None
        while True:
            page = await self.list(limit=page_size, after=after, tenant=tenant)
            for adapter in page.adapters:
                yield adapter
            if page.next is None:
                return
            after = page.next

    async def get(self, reference: str) -> answers.AdapterDetail:
        """One version with its whole configuration. `reference` may carry `@alias`, `@v3` or `@digest`."""
        return await self._send(calls.get_adapter(reference))

    async def delete(self, reference: str) -> answers.DeletedAdapter:
        """Delete an adapter, or with `@` one version of it. If the answer is lost, the call is not sent again."""
        return await self._send(calls.delete_adapter(reference))

    async def pin(self, reference: str) -> answers.PinnedAdapter:
        """Keep a version on the device. If the answer is lost, the call is not sent again."""
        return await self._send(calls.pin_adapter(reference))

    async def unpin(self, reference: str) -> answers.PinnedAdapter:
        """Let a version leave the device again. If the answer is lost, the call is not sent again."""
        return await self._send(calls.unpin_adapter(reference))

    async def upload(
        self,
        name: str,
        source: str | Path | bytes,
        *,
        config: str | Path | bytes | None = None,
        progress: Progress | None = None,
    ) -> answers.PublishedAdapter:
        """Publish a bundle or a PEFT checkpoint as the next version of an adapter. See `Adapters.upload`.

        The files are read on the event loop, 64 KiB at a time, and `progress` is called there.
        """
        return await self._send(calls.upload_adapter(name, source, config, progress))


class AsyncModels:
    """The base and the adapters, as OpenAI's API lists them. See `Models` for the arguments."""

    def __init__(self, send: _Send) -> None:
        self._send = send

    async def list(self, *, limit: int = 100, after: str | None = None) -> answers.ModelPage:
        """One page: first the base, then the adapters, ordered by name."""
        return await self._send(calls.list_models(limit, after))

    async def iterate(self, *, page_size: int = 100) -> AsyncIterator[answers.Model]:
        """The base, and then all adapters. A page is asked for when it is needed."""
        after: str | None = None
        while True:
            page = await self.list(limit=page_size, after=after)
            for model in page.data:
                yield model
            if not page.has_more:
                return
            after = page.last_id

    async def get(self, model: str) -> answers.Model:
        """The base by its name, or an adapter by its reference."""
        return await self._send(calls.get_model(model))
