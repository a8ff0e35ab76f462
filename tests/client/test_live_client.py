"""Both clients against a real server with a small random base: each test runs with each client."""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from adapters_store import AdapterBundle, AdapterStore
from adapters_store.convert import peft_files
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.client import (
    AdapterNotFoundError,
    AsyncSeraClient,
    ContextLengthError,
    GenerateEvent,
    InvalidAdapterError,
    InvalidRequestError,
    SeraAPIError,
    SeraClient,
    async_client,
    sync_client,
    uploads,
)
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.server import build_app
from sera_serve.server.native.uploads import UploadSlots
from support.factories import random_adapter, random_decoder
from support.live_server import live_server, wait_until
from support.peft_checkpoints import CONFIG, WEIGHTS, save_checkpoint
from support.stub_engine import SLOW, StubEngine

PROMPT = "Once upon a time"
TEXTS = ["short", "a longer text, of some words", "☠"]


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    return random_decoder()


@pytest.fixture(scope="module")
def writer(base: FrozenBase) -> AdapterBundle:
    return random_adapter(base, SeraConfig(8, 4, 8.0, ("q_proj", "v_proj")), 1, strength=0.5)


@pytest.fixture(scope="module")
def engine(base: FrozenBase, writer: AdapterBundle, tmp_path_factory: pytest.TempPathFactory) -> ServingEngine:
    store = AdapterStore(tmp_path_factory.mktemp("client") / "store")
    shape = SeraConfig(8, 4, 8.0, ("q_proj", "v_proj"))
    store.publish(writer, "acme/writer")
    store.publish(random_adapter(base, shape, 4, strength=0.5), "acme/other")
    for seed, name in enumerate(("acme/labels", "acme/rude")):
        store.publish(random_adapter(base, shape, seed, labels=["no", "yes"], pooling="mean"), name)
    return ServingEngine(base, store, ServeSettings(store=store.root, pool_mib=4, kv_cache_tokens=1024))


@pytest.fixture(scope="module")
def app(engine: ServingEngine) -> FastAPI:
    return build_app(engine, engine.store, engine.settings)


@pytest.fixture(scope="module")
def address(app: FastAPI) -> Iterator[str]:
    with live_server(app) as url:
        yield url


@pytest.fixture(autouse=True)
def _nothing_left(engine: ServingEngine) -> Iterator[None]:
    yield
    wait_until(lambda: engine.in_flight() == 0 and engine.residency.leases() == 0)


class Driver:
    """Makes calls with a client of either kind."""

    def __init__(self, client: SeraClient | AsyncSeraClient, runner: asyncio.Runner) -> None:
        self.tenant = type(client).__name__.lower()
        self._client = client
        self._runner = runner
        self._kept: Iterator[GenerateEvent] | None = None

    def __call__(self, call: Callable[[Any], Any]) -> Any:
        made = call(self._client)
        if isinstance(made, Awaitable):
            return self._runner.run(self._awaited(made))
        if isinstance(made, AsyncIterator):
            return self._runner.run(self._collected(made))
        return list(made) if isinstance(made, Iterator) else made

    def stream(self, call: Callable[[Any], Any], most: int | None = None) -> list[GenerateEvent]:
        """The events of a stream that is left after so many."""

        async def awaited() -> list[GenerateEvent]:
            found: list[GenerateEvent] = []
            async with call(self._client) as events:
                async for event in events:
                    found.append(event)
                    if len(found) == most:
                        break
            return found

        if isinstance(self._client, AsyncSeraClient):
            return self._runner.run(awaited())
        found: list[GenerateEvent] = []
        with call(self._client) as events:
            # The iterator's own end would close the stream too.
            self._kept = events
            for event in events:
                found.append(event)
                if len(found) == most:
                    break
        return found

    @staticmethod
    async def _awaited(made: Awaitable[Any]) -> Any:
        return await made

    @staticmethod
    async def _collected(made: AsyncIterator[Any]) -> list[Any]:
        return [one async for one in made]


@pytest.fixture(params=["sync", "async"])
def drive(request: pytest.FixtureRequest, address: str) -> Iterator[Driver]:
    with asyncio.Runner() as runner:
        if request.param == "sync":
            with SeraClient(address) as client:
                yield Driver(client, runner)
        else:
            client = AsyncSeraClient(address)
            yield Driver(client, runner)
            runner.run(client.aclose())


def test_generate(drive: Driver) -> None:
    answer = drive(lambda client: client.generate(PROMPT, adapter="acme/writer", max_new_tokens=6, logprobs=2))
    assert (answer.adapter, answer.version) == ("acme/writer", 1)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), len(answer.token_ids))
    assert answer.logprobs is not None and [row.token_id for row in answer.logprobs] == answer.token_ids
    assert len(answer.choices) == 1 and answer.choices[0].text == answer.text
    base = drive(lambda client: client.generate(PROMPT, max_new_tokens=6))
    assert (base.adapter, base.version, base.logprobs) == (None, None, None)
    assert base.text != answer.text
    tokens = list(PROMPT.encode())
    again = drive(lambda client: client.generate(tokens, max_new_tokens=6, prompt_logprobs=0))
    assert again.prompt_logprobs[0].logprob is None and len(again.prompt_logprobs) == len(tokens)


def test_several_answers(drive: Driver) -> None:
    options = {"n": 3, "temperature": 1.0, "seed": 5, "max_new_tokens": 5, "ignore_eos": True}
    answer = drive(lambda client: client.generate(PROMPT, adapter="acme/writer", **options))
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) > 1
    assert answer.usage.completion_tokens == 15
    assert (answer.text, answer.finish_reason) == (answer.choices[0].text, "length")
    events = drive.stream(lambda client: client.stream(PROMPT, adapter="acme/writer", **options))
    for choice in answer.choices:
        own = [event for event in events if event.index == choice.index]
        assert [token for event in own for token in event.token_ids] == choice.token_ids


def test_a_weighted_sum(drive: Driver) -> None:
    parts = {"acme/writer": 0.5, "acme/other": -1}
    answer = drive(lambda client: client.generate(PROMPT, adapter=parts, max_new_tokens=3))
    assert answer.adapter == "0.5*acme/writer@v1 + -1*acme/other@v1"
    assert answer.version is None


def test_the_form_of_a_text(drive: Driver) -> None:
    class Pet(BaseModel):
        is_big: bool

    answer = drive(lambda client: client.generate(PROMPT, response_format=Pet, max_new_tokens=100))
    Pet.model_validate_json(answer.text)
    answer = drive(lambda client: client.generate(PROMPT, regex="(cat|dog)", max_new_tokens=20))
    assert answer.text in ("cat", "dog")


def test_a_stream_adds_up_to_the_answer(drive: Driver) -> None:
    options = {"adapter": "acme/writer", "max_new_tokens": 30, "logprobs": 1}
    whole = drive(lambda client: client.generate(PROMPT, **options))
    events = drive.stream(lambda client: client.stream(PROMPT, **options))
    assert "".join(event.text for event in events) == whole.text
    assert [token for event in events for token in event.token_ids] == whole.token_ids
    assert (events[-1].finish_reason, events[-1].usage) == (whole.finish_reason, whole.usage)
    assert [row for event in events for row in event.logprobs or []] == whole.logprobs


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_stream_left_early_frees_its_request(kind: str, base: FrozenBase, engine: ServingEngine) -> None:
    # This engine's text never ends by itself.
    stub = StubEngine(base)
    with live_server(build_app(stub, engine.store, engine.settings)) as url, asyncio.Runner() as runner:
        client = SeraClient(url) if kind == "sync" else AsyncSeraClient(url)
        drive = Driver(client, runner)
        for count in range(1, 4):
            events = drive.stream(lambda client: client.stream(SLOW), most=2)
            assert len(events) == 2 and events[-1].finish_reason is None
            # The client stays open, so that only the stream's own end can free the request.
            wait_until(lambda count=count: (stub.open_streams, stub.cancelled) == (0, count), seconds=3)
        if isinstance(client, SeraClient):
            client.close()
        else:
            runner.run(client.aclose())


def test_classify(drive: Driver) -> None:
    answer = drive(lambda client: client.classify(TEXTS, adapter="acme/labels"))
    assert (answer.adapter, answer.version) == ("acme/labels", 1)
    assert len(answer.results) == 3
    assert all(row.probabilities[row.label] == max(row.probabilities.values()) for row in answer.results)
    assert len(drive(lambda client: client.classify("one", adapter={"acme/labels": 1.0})).results) == 1
    adapters = ["acme/rude", "acme/labels"]
    both = drive(lambda client: client.classify_each(TEXTS, adapters=adapters, priority="high", timeout_s=30))
    assert [one.adapter for one in both] == adapters
    assert [row.label for row in both[1].results] == [row.label for row in answer.results]


def test_embed(drive: Driver, base: FrozenBase) -> None:
    answer = drive(lambda client: client.embed(TEXTS, model="acme/writer"))
    assert answer.model == "acme/writer"
    assert [len(vector) for vector in answer.vectors] == [base.hidden_size] * 3
    assert all(sum(number * number for number in vector) == pytest.approx(1, abs=1e-5) for vector in answer.vectors)
    assert answer.usage.prompt_tokens == sum(len(text.encode()) for text in TEXTS)
    tokens = [base.tokenizer.encode(text) for text in TEXTS]
    assert drive(lambda client: client.embed(tokens, model="acme/writer")).vectors == [
        pytest.approx(vector, abs=1e-6) for vector in answer.vectors
    ]
    plain = drive(lambda client: client.embed(TEXTS[0], model="random-llama", normalize=False, pooling="mean"))
    assert len(plain.vectors) == 1


def test_adapters(drive: Driver, engine: ServingEngine, writer: AdapterBundle) -> None:
    names = ["acme/labels", "acme/other", "acme/rude", "acme/writer"]
    page = drive(lambda client: client.adapters.list(limit=3))
    assert [one.adapter for one in page.adapters] == names[:3]
    assert page.next == names[2]
    assert [one.adapter for one in drive(lambda client: client.adapters.iterate(page_size=1))] == names
    assert drive(lambda client: client.adapters.iterate(tenant="nobody")) == []
    detail = drive(lambda client: client.adapters.get("acme/writer@v1"))
    assert (detail.task, detail.versions, detail.digest) == ("generate", [1], writer.digest)
    assert detail.config["base"]["name"] == "random-llama"
    pinned = drive(lambda client: client.adapters.pin("acme/writer"))
    assert (pinned.version, pinned.pinned, engine.stats().pinned) == (1, True, 1)
    assert not drive(lambda client: client.adapters.unpin("acme/writer")).pinned
    assert engine.stats().pinned == 0


def test_models_and_probes(drive: Driver) -> None:
    ids = ["random-llama", "acme/labels", "acme/other", "acme/rude", "acme/writer"]
    assert [model.id for model in drive(lambda client: client.models.iterate(page_size=2))] == ids
    page = drive(lambda client: client.models.list(limit=1))
    assert page.has_more and [model.id for model in page.data] == ids[:2]
    model = drive(lambda client: client.models.get("acme/writer@v1"))
    assert (model.root, model.parent, model.owned_by) == ("acme/writer@v1", "random-llama", "acme")
    assert drive(lambda client: client.health()).status == "alive"
    assert drive(lambda client: client.ready()).store == "writable"


@pytest.fixture(scope="module")
def checkpoint(base: FrozenBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_checkpoint(base.model, tmp_path_factory.mktemp("peft") / "adapter")
    # What training leaves: it is not sent.
    (folder / "optimizer.pt").write_bytes(bytes(1 << 20))
    (folder / "checkpoint-1").mkdir()
    return folder


def test_uploads(drive: Driver, engine: ServingEngine, writer: AdapterBundle, checkpoint: Path, tmp_path: Path) -> None:
    name = f"{drive.tenant}/one"
    writer.save(tmp_path / "bundle")
    writer.save_file(tmp_path / "one.safetensors")
    with zipfile.ZipFile(tmp_path / "peft.zip", "w") as archive:
        for file in (CONFIG, WEIGHTS):
            archive.write(checkpoint / file, file)
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in (CONFIG, WEIGHTS):
        (linked / file).symlink_to(checkpoint / file)
    bundles: list[tuple[Any, Any]] = [
        (tmp_path / "bundle", None),
        (str(tmp_path / "one.safetensors"), None),
        (writer.to_bytes(), None),
    ]
    checkpoints: list[tuple[Any, Any]] = [
        (checkpoint, None),
        (linked, None),
        (tmp_path / "peft.zip", None),
        (checkpoint / WEIGHTS, checkpoint / CONFIG),
        ((checkpoint / WEIGHTS).read_bytes(), (checkpoint / CONFIG).read_bytes()),
    ]
    digests = []
    for sources in (bundles, checkpoints):
        found = set()
        for source, config in sources:
            sent: list[tuple[int, int]] = []
            progress = lambda *counts, sent=sent: sent.append(counts)  # noqa: E731
            published = drive(
                lambda client, source=source, config=config, progress=progress: client.adapters.upload(
                    name, source, config=config, progress=progress
                )
            )
            assert (published.adapter, published.warnings) == (name, [])
            found.add(published.digest)
            # All bytes, in order, of a known whole.
            assert sent == sorted(sent) and sent[-1][0] == sent[-1][1]
            assert len({whole for _, whole in sent}) == 1
        assert len(found) == 1
        digests += found
    assert digests[0] == writer.digest != digests[1]
    assert drive(lambda client: client.adapters.get(name)).versions == [1, 2]
    assert drive(lambda client: client.generate(PROMPT, adapter=name, max_new_tokens=2)).version == 2
    assert drive(lambda client: client.adapters.delete(f"{name}@v1")).adapter == f"{name}@v1"
    assert drive(lambda client: client.adapters.delete(name)).deleted
    with pytest.raises(AdapterNotFoundError):
        drive(lambda client: client.adapters.get(name))


def test_uploads_that_are_refused(drive: Driver, writer: AdapterBundle, tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapterError) as caught:
        drive(lambda client: client.adapters.upload(f"{drive.tenant}/two", writer.to_bytes()[:-5]))
    assert caught.value.code == "truncated" and caught.value.request_id is not None
    with pytest.raises(InvalidRequestError) as refused:
        drive(lambda client: client.adapters.upload("no-tenant", writer.to_bytes()))
    assert refused.value.param == "name"
    with pytest.raises(FileNotFoundError):
        drive(lambda client: client.adapters.upload(f"{drive.tenant}/two", tmp_path / "nothing"))
    with pytest.raises(ValueError, match=CONFIG):
        drive(lambda client: client.adapters.upload(f"{drive.tenant}/two", tmp_path))
    os.mkfifo(tmp_path / "pipe")
    for no_file in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(ValueError, match="no regular file"):
            drive(lambda client, no_file=no_file: client.adapters.upload(f"{drive.tenant}/two", no_file))
    (tmp_path / CONFIG).write_text("{}")
    with pytest.raises(ValueError, match="safe_serialization"):
        drive(lambda client: client.adapters.upload(f"{drive.tenant}/two", tmp_path))
    path = tmp_path / "shrinks.safetensors"
    path.write_bytes(bytes(300_000))

    def shrink(sent: int, whole: int) -> None:
        path.write_bytes(bytes(100_000))

    with pytest.raises(OSError, match="became shorter"):
        drive(lambda client: client.adapters.upload(f"{drive.tenant}/two", path, progress=shrink))
    assert [one.adapter for one in drive(lambda client: client.adapters.iterate(tenant=drive.tenant))] == []


def test_an_upload_waits_for_its_turn(
    drive: Driver, engine: ServingEngine, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The server answers while the body is on its way, and closes the connection.
    monkeypatch.setattr("sera_serve.server.native.uploads._RETRY_AFTER_S", 0)
    slots = UploadSlots(1)
    monkeypatch.setattr(app.state, "upload_slots", slots, raising=False)
    taken = slots.take()
    taken.__enter__()
    begun: list[int] = []

    def progress(sent: int, whole: int) -> None:
        if sent == min(whole, 64 << 10):
            begun.append(whole)
        if len(begun) == 2:
            taken.__exit__(None, None, None)
            begun.append(0)

    with pytest.raises(InvalidAdapterError):
        drive(lambda client: client.adapters.upload(f"{drive.tenant}/big", bytes(8 << 20), progress=progress))
    assert len(begun) >= 3


def test_refusals(drive: Driver) -> None:
    def refused(call: Callable[[Any], Any]) -> SeraAPIError:
        with pytest.raises(SeraAPIError) as caught:
            drive(call)
        assert caught.value.request_id is not None and caught.value.request_id in str(caught.value)
        return caught.value

    error = refused(lambda client: client.generate(PROMPT, adapter="acme/nobody"))
    assert (type(error), error.status, error.code) == (AdapterNotFoundError, 404, "adapter_not_found")
    assert type(refused(lambda client: client.embed("a", model="acme/nobody"))) is AdapterNotFoundError
    assert type(refused(lambda client: client.models.get("acme/nobody"))) is AdapterNotFoundError
    error = refused(lambda client: client.generate("a" * 300))
    assert (type(error), error.status) == (ContextLengthError, 422)
    error = refused(lambda client: client.generate(PROMPT, temperature=3))
    assert (type(error), error.param) == (InvalidRequestError, "temperature")
    # A stream is refused like any other call.
    with pytest.raises(AdapterNotFoundError):
        drive.stream(lambda client: client.stream(PROMPT, adapter="acme/nobody"))


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_are_no_token_ids(drive: Driver, kind: Callable[[bytes], Any]) -> None:
    with pytest.raises(TypeError, match="decode it"):
        drive(lambda client: client.generate(kind(PROMPT.encode()), max_new_tokens=1))
    with pytest.raises(TypeError, match="decode it"):
        drive.stream(lambda client: client.stream(kind(PROMPT.encode()), max_new_tokens=1))


@pytest.mark.parametrize("name", ["acme", "acme/x/pin", "acme/..", "./x", "/x", "acme/", ""])
def test_a_name_cannot_lead_to_another_path(drive: Driver, name: str) -> None:
    for method in ("get", "delete", "pin", "unpin"):
        with pytest.raises(ValueError, match="tenant/name"):
            drive(lambda client, method=method: getattr(client.adapters, method)(name))


def test_odd_names_stay_names(drive: Driver) -> None:
    for name in ("acme/x?y=1", "acme/%2e%2e", "acme/a b", "acme/ä#b"):
        with pytest.raises(SeraAPIError) as caught:
            drive(lambda client, name=name: client.adapters.get(name))
        assert caught.value.code in ("invalid_adapter_name", "adapter_not_found")


def test_unknown_options_are_refused_before_anything_is_sent(drive: Driver) -> None:
    # `stream` would change the form of the answer.
    for options in ({"stream": True}, {"tempreature": 1}):
        with pytest.raises(TypeError, match="there is no option"):
            drive(lambda client, options=options: client.generate(PROMPT, **options))
    with pytest.raises(TypeError, match="timeout_s"):
        drive(lambda client: client.classify("a", adapter="acme/labels", adapters=["acme/rude"]))
    with pytest.raises(ValueError, match="JSON"):
        drive(lambda client: client.generate(PROMPT, temperature=float("nan")))


@pytest.mark.parametrize(
    "names", [("SeraClient", "AsyncSeraClient"), ("Adapters", "AsyncAdapters"), ("Models", "AsyncModels")]
)
def test_both_clients_have_the_same_methods(names: tuple[str, str]) -> None:
    def methods(kind: type) -> dict[str, list[tuple[str, Any, Any, Any]]]:
        return {
            name.replace("aclose", "close"): [
                (parameter.name, parameter.kind, parameter.default, parameter.annotation)
                for parameter in inspect.signature(method).parameters.values()
            ]
            for name, method in vars(kind).items()
            if not name.startswith("_")
        }

    found = methods(getattr(sync_client, names[0]))
    assert found == methods(getattr(async_client, names[1]))
    assert len(found) >= 3


def test_the_import_is_light() -> None:
    heavy = ["torch", "transformers", "numpy", "adapters_store", "sera_kernels", "fastapi", "tokenizers"]
    program = f"import sys, sera_serve.client; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout == "[]\n"


def test_an_import_reads_what_is_sent_of_a_directory() -> None:
    assert set(uploads.READ_BESIDE) == set(peft_files._READ_BESIDE)
    assert (uploads.CONFIG_FILE, uploads.MODEL_FILE) == (peft_files.CONFIG_FILE, peft_files.MODEL_FILE)
