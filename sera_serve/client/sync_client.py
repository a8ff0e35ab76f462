"""The client for code without an event loop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeVar, Unpack

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


class SeraClient:
    """Talks to one server. Threads may share a client. Close it, or use it as a context.

    Refused requests (429 and 503) are sent again, after the time that the server names; so are requests for which no
    connection was made, and lists and look-ups whose connection broke. No other request is: one whose answer was lost
    may have had its effects. An upload, a deletion or a pin is sent again only where the server says that it has begun
    nothing.

    Every method raises `SeraError`: `SeraAPIError` for a refusal, `SeraConnectionError` where there is no whole answer,
    and `InvalidAnswerError` where the answer is of another form. An option that does not exist is a TypeError,
    and so is an argument of another type.

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
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Set up; nothing is sent.

        Args:
            base_url: Address of the server, without `/v1`. A user and password in it are sent, as a proxy may want.
            api_key: The key of a tenant; None is that of the environment variable SERA_API_KEY, if there is one and
                neither `headers` nor `base_url` has a key or a password.
            timeout: Longest time for one read or write of a connection, seconds, above 0 and up to 1,000,000; also the
                longest wait for one of the client's connections to become free. An answer that is no stream comes in
                one piece at its end, so the whole generation must fit. `timeout_s` of a call limits the server.
            retries: When refused requests are sent again.
            headers: Headers of every request, such as those of a proxy that authenticates.
            max_connections: Most connections at once; a stream holds one until it is closed, and further calls wait.
                The server has limits too (`max_connections_per_address`, 500 by default).
            transport: A transport of httpx, in place of the network; it has its own `max_connections`.

        Raises:
            TypeError: `timeout` or `max_connections` is no number, or `retries` is no `RetryPolicy`.
            ValueError: `base_url` is no address, the key is no key, or there are two; a header or a number has no value
                that could be sent.
        """
        arguments = connection(base_url, api_key, timeout, headers, max_connections)
        self._http = httpx.Client(**arguments, transport=transport)
        self._retries = checked_policy(retries)
        self.adapters = Adapters(self._call)
        self.models = Models(self._call)

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def generate(
        self, prompt: Prompt, *, adapter: Adapter | None = None, **options: Unpack[GenerateOptions]
    ) -> answers.Generation:
        """Continue a prompt.

        Args:
            prompt: A text, or token ids.
            adapter: A reference, or a weighted sum `{"acme/formal": 0.7, "acme/brief": 0.3}`; None is the base model.
            options: See `GenerateOptions`. `response_format` may be a model of pydantic.
        """
        return self._call(calls.generate(prompt, adapter, options))

    @contextmanager
    def stream(
        self, prompt: Prompt, *, adapter: Adapter | None = None, **options: Unpack[GenerateOptions]
    ) -> Iterator[Iterator[answers.GenerateEvent]]:
        """Continue a prompt, and give the events as they come. Arguments are as in `generate`.

        The end of the context closes the stream: a generation that is not finished ends on the server too.

            with client.stream("Once upon a time") as events:
                for event in events:
                    print(event.text, end="")
        """
        call = calls.stream(prompt, adapter, options)
        response = self._exchange(call)
        try:
            yield self._events(response, call)
        finally:
            response.close()

    def classify(
        self,
        inputs: str | bytes | Path | Sequence[ClassifyInput],
        *,
        adapter: Adapter,
        **options: Unpack[ClassifyOptions],
    ) -> answers.Classified:
        """Classify texts, sentence pairs or images by an adapter with a head, or by a weighted sum of such adapters.

        An image is the bytes of its file, or a `Path`: a `str` is a text. A pair is a tuple in a list of inputs.
        """
        return self._call(calls.classify(inputs, adapter, options))

    def classify_each(
        self,
        inputs: str | bytes | Path | Sequence[ClassifyInput],
        *,
        adapters: Sequence[str],
        **options: Unpack[ClassifyOptions],
    ) -> Sequence[answers.Classified]:
        """Classify inputs, as in `classify`, by each of several adapters of one tenant; one answer for each adapter."""
        return self._call(calls.classify_each(inputs, adapters, options))

    def embed(
        self,
        inputs: str | bytes | Path | Sequence[EmbedInput],
        *,
        model: str,
        **options: Unpack[EmbedOptions],
    ) -> answers.Embeddings:
        """Return a vector for each input: texts and images (bytes, or a `Path`), or lists of token ids.

        Args:
            inputs: What to embed.
            model: An adapter's reference, or the base's name as `models.list` has it.
            options: See `EmbedOptions`.
        """
        return self._call(calls.embed(inputs, model, options))

    def health(self) -> answers.Health:
        """Tell that the server's process answers. It is asked once."""
        return self._call(calls.health())

    def ready(self) -> answers.Readiness:
        """Tell that the server takes requests. Raises UnavailableError, with the reason, if not. It is asked once."""
        return self._call(calls.ready())

    def _call(self, call: Call[T]) -> T:
        return call.read(self._exchange(call).content)

    def _exchange(self, call: Call[T]) -> httpx.Response:
        tries = Tries(call, self._retries)
        failure: SeraError
        while True:
            with call.request() as arguments:
                request = build_request(self._http, arguments)
                try:
                    with lost_connections(call):
                        response = self._http.send(request, stream=call.streams)
                        if response.is_success:
                            return response
                        response.read()
                    failure = refusal(response)
                except SeraConnectionError as error:
                    failure = error
            time.sleep(tries.delay_s(failure))

    def _events(self, response: httpx.Response, call: Call[None]) -> Iterator[answers.GenerateEvent]:
        reader = EventReader(response.headers.get("x-request-id"))
        with lost_connections(call):
            for data in response.iter_bytes():
                yield from reader.feed(data)
        reader.finish()


class _Send(Protocol):
    """Sends a call, and reads its answer."""

    def __call__(self, call: Call[T]) -> T: ...


class Adapters:
    """The adapters of the server's store."""

    def __init__(self, send: _Send) -> None:
        self._send = send

    def list(self, *, limit: int = 100, after: str | None = None, tenant: str | None = None) -> answers.AdapterPage:
        """One page of the adapters, ordered by name.

        Args:
            limit: Adapters on the page, 1 to 1,000.
            after: `next` of the page before.
            tenant: Only adapters of this tenant.
        """
        return self._send(calls.list_adapters(limit, after, tenant))

    def iterate(self, *, tenant: str | None = None, page_size: int = 100) -> Iterator[answers.AdapterSummary]:
        """All adapters, ordered by name. A page is asked for when it is needed."""
        after: str | None = None
        while True:
            page = self.list(limit=page_size, after=after, tenant=tenant)
            yield from page.adapters
            if page.next is None:
                return
            after = page.next

    def get(self, reference: str) -> answers.AdapterDetail:
        """One version with its whole configuration. `reference` may carry `@alias`, `@v3` or `@digest`."""
        return self._send(calls.get_adapter(reference))

    def delete(self, reference: str) -> answers.DeletedAdapter:
        """Delete an adapter, or with `@` one version of it. If the answer is lost, the call is not sent again."""
        return self._send(calls.delete_adapter(reference))

    def pin(self, reference: str) -> answers.PinnedAdapter:
        """Keep a version on the device. If the answer is lost, the call is not sent again."""
        return self._send(calls.pin_adapter(reference))

    def unpin(self, reference: str) -> answers.PinnedAdapter:
        """Let a version leave the device again. If the answer is lost, the call is not sent again."""
        return self._send(calls.unpin_adapter(reference))

    def upload(
        self,
        name: str,
        source: str | Path | bytes,
        *,
        config: str | Path | bytes | None = None,
        progress: Progress | None = None,
    ) -> answers.PublishedAdapter:
        """Publish a bundle or a PEFT checkpoint as the next version of an adapter.

        If the answer is lost, the upload is not sent again: it may have been published, and perhaps something else
        after it. `get` tells.

        Args:
            name: `tenant/name`.
            source: A `.safetensors`, `.tar` or `.zip` file, its bytes, or a directory. Of a directory,
                `adapter_config.json`, each `.safetensors`, the chat template and the small files that an import reads
                are sent, and no others.
            config: `adapter_config.json`, where `source` is the `adapter_model.safetensors` of a PEFT checkpoint.
            progress: Gets the bytes that were sent and the bytes of the adapter, at every 64 KiB. A retry begins anew.

        Raises:
            InvalidAdapterError: The server refuses the adapter; the error names the fault.
            OSError, ValueError: `source` cannot be read, or is no adapter.
        """
        return self._send(calls.upload_adapter(name, source, config, progress))


class Models:
    """The base and the adapters, as OpenAI's API lists them."""

    def __init__(self, send: _Send) -> None:
        self._send = send

    def list(self, *, limit: int = 100, after: str | None = None) -> answers.ModelPage:
        """One page: first the base, then the adapters, ordered by name. `after` is `last_id` of the page before."""
        return self._send(calls.list_models(limit, after))

    def iterate(self, *, page_size: int = 100) -> Iterator[answers.Model]:
        """The base, and then all adapters. A page is asked for when it is needed."""
        after: str | None = None
        while True:
            page = self.list(limit=page_size, after=after)
            yield from page.data
            if not page.has_more:
                return
            after = page.last_id

    def get(self, model: str) -> answers.Model:
        """The base by its name, or an adapter by its reference."""
        return self._send(calls.get_model(model))
