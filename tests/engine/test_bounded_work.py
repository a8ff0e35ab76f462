"""What one client asks of the engine does not keep the others waiting: long texts, a store that hangs, time limits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvloop

from adapters_store import AdapterBundle, AdapterStore, ResolvedAdapter
from adapters_store.errors import WrongBase
from sera_serve.base import FrozenBase
from sera_serve.base.preprocess import Preprocessor
from sera_serve.engine import BASE_PRINCIPAL, GenerateParams
from sera_serve.errors import (
    AdapterTooLarge,
    DeadlineExceeded,
    EngineUnavailable,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
)
from support.engine import SHAPE, GatedStore, Start, acting_for, classify, collect, generate, settled, until
from support.factories import random_adapter, random_decoder, random_encoder
from support.standstill import standstill

LONG = "x" * 1_000_000
# Tokens of the tests' tokenizer, which all have one character but for "<bos>", times the characters of "<bos>".
MOST_CHARACTERS = 256 * 5


class Held:
    """Makes a function wait for the test, and counts the calls that have begun and ended."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.opened = threading.Event()
        self.inside = self.begun = 0

    def __call__(self, *arguments: Any) -> Any:
        self.begun += 1
        self.inside += 1
        assert self.opened.wait(20)
        self.inside -= 1
        return self.function(*arguments)


class StuckStore(GatedStore):
    """A store whose look-ups of references wait for the test."""

    stuck: Held | None = None

    def resolve(self, ref: str) -> ResolvedAdapter:
        return super().resolve(ref) if self.stuck is None else self.stuck(ref)  # type: ignore[no-any-return]

    def hold(self) -> Held:
        self.stuck = Held(super().resolve)
        return self.stuck


@pytest.fixture(scope="module")
def published(decoder: FrozenBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a store that no test changes."""
    folder = tmp_path_factory.mktemp("published") / "store"
    store = AdapterStore(folder)
    store.publish(random_adapter(decoder, SHAPE, 1), "a/writer")
    labeler = random_adapter(decoder, SHAPE, 2, labels=["no", "yes"], pooling="mean", max_length=200)
    store.publish(labeler, "a/labels")
    many = random_adapter(decoder, SHAPE, 3, labels=[f"label {number}" for number in range(1000)])
    store.publish(many, "a/many")
    return folder


@pytest.fixture
def stuck(published: Path) -> StuckStore:
    return StuckStore(published)


def test_prompts_that_cannot_fit_are_never_tokenized(
    stuck: StuckStore, decoder: FrozenBase, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_engine(decoder, stuck)
    tokenized: list[int] = []
    prompt = Preprocessor.prompt

    def counted(self: Preprocessor, text: str | None, token_ids: list[int] | None, special: bool = True) -> list[int]:
        tokenized.append(len(text or token_ids or ()))
        return prompt(self, text, token_ids, special)

    monkeypatch.setattr(Preprocessor, "prompt", counted)

    async def main() -> None:
        params = [{"prompt": "7" * (1 << 20)}] * 16 + [{"token_ids": [5] * 300_000}, {"prompt": "x" * 1281}]
        ends = await asyncio.gather(*(collect(engine, **one) for one in params), return_exceptions=True)
        assert [type(end) for end in ends] == [PromptTooLong] * 18
        assert f"{1 << 20} characters" in str(ends[0]) and f"at most {MOST_CHARACTERS}" in str(ends[0])
        assert "300000 prompt tokens" in str(ends[16])
        assert [end.param for end in ends if isinstance(end, PromptTooLong)] == ["prompt"] * 16 + [
            "token_ids",
            "prompt",
        ]
        assert tokenized == []
        with pytest.raises(PromptTooLong, match="1280 prompt tokens"):
            await collect(engine, prompt="x" * MOST_CHARACTERS)
        assert tokenized == [MOST_CHARACTERS]

    asyncio.run(main())


def test_long_texts_take_two_threads_and_delay_nobody(
    stuck: StuckStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = random_decoder()
    base.tokenizer.add_tokens(["<" + "long" * 1000 + ">"])
    engine = start_engine(base, stuck)
    held = Held(lambda *arguments: [1])
    monkeypatch.setattr(Preprocessor, "prompt", _where_long(Preprocessor.prompt, held))
    monkeypatch.setattr(Preprocessor, "rows", _where_long(Preprocessor.rows, held))

    async def main() -> None:
        tasks = [asyncio.ensure_future(collect(engine, prompt=LONG, max_new_tokens=1)) for _ in range(6)]
        tasks += [asyncio.ensure_future(classify(engine, "a/labels", [LONG, "x"])) for _ in range(6)]  # type: ignore[arg-type]
        await until(lambda: held.inside == 2 and engine._tokenizing.calls() == 12)
        # Everyone else is served meanwhile: adapters are looked up, short texts tokenized, bases asked.
        assert (await collect(engine, prompt="abc", max_new_tokens=2)).completion_tokens == 2
        assert (await collect(engine, adapter="a/writer", prompt="abc", max_new_tokens=2)).completion_tokens == 2
        assert len((await classify(engine, "a/labels", ["abc"])).results) == 1
        assert held.begun == 2
        # A text whose client leaves is not tokenized.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert engine._tokenizing.calls() == 2
        held.opened.set()
        await settled(engine)
        await until(lambda: engine._tokenizing.calls() == 0)
        assert held.begun == 2

    asyncio.run(main())


def test_long_texts_of_one_tenant_keep_no_other_tenants_waiting(
    stuck: StuckStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_engine(random_decoder(), stuck)
    held = Held(lambda *arguments: [1])
    monkeypatch.setattr(Preprocessor, "prompt", _where_long(Preprocessor.prompt, held, "x" * 200))
    monkeypatch.setattr(Preprocessor, "rows", _where_long(Preprocessor.rows, held, "x" * 200))
    monkeypatch.setattr(Preprocessor, "is_long", lambda self, text, ids: text is not None and len(text) >= 200)

    async def main() -> None:
        many = [
            asyncio.ensure_future(collect(engine, adapter="a/writer", prompt="x" * 200, max_new_tokens=1))
            for _ in range(9)
        ]
        await until(lambda: held.inside == 1 and engine._tokenizing.calls() == 9)
        other = await asyncio.wait_for(collect(engine, prompt="y" * 201, max_new_tokens=2), 10)
        assert other.prompt_tokens == 201 and held.begun == 1
        held.opened.set()
        assert {(await one).completion_tokens for one in many} == {1}

    asyncio.run(main())


def _where_long(function: Callable[..., Any], held: Held, text: str = LONG) -> Callable[..., Any]:
    def wrapped(self: Preprocessor, first: Any, *others: Any, **options: Any) -> Any:
        is_long = first is not None and text in (first, first[0])
        return held(self, first, *others, **options) if is_long else function(self, first, *others, **options)

    return wrapped


def test_a_short_classification_changes_threads_once(
    stuck: StuckStore, decoder: FrozenBase, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_engine(decoder, stuck)
    threads: list[str] = []
    rows = Preprocessor.rows

    def noted(self: Preprocessor, *arguments: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return rows(self, *arguments, **options)

    monkeypatch.setattr(Preprocessor, "rows", noted)

    async def main() -> None:
        assert len((await classify(engine, "a/labels", ["x" * 4000])).results) == 1
        assert len((await classify(engine, "a/labels", ["x" * 2001] * 2)).results) == 2
        assert threads == ["resolving", "tokenizing"]

    asyncio.run(main())


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_the_clock_of_the_event_loop_is_that_of_the_server(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def main() -> None:
        await asyncio.sleep(0)
        assert abs(asyncio.get_running_loop().time() - time.monotonic()) < 1

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())


@pytest.mark.parametrize(
    ("settings", "timeout_s", "error"),
    [
        ({}, 0.2, DeadlineExceeded),
        ({"request_timeout_s": 0.2}, 20, Overloaded),
        ({"request_timeout_s": 0.2}, None, Overloaded),
    ],
)
def test_a_store_that_hangs_does_not_hold_a_request_beyond_its_time(
    stuck: StuckStore,
    decoder: FrozenBase,
    start_engine: Start,
    settings: dict[str, Any],
    timeout_s: float | None,
    error: type[Exception],
) -> None:
    engine = start_engine(decoder, stuck, **settings)

    async def main() -> None:
        held = stuck.hold()
        calls = [
            collect(engine, adapter="a/writer", prompt="x", timeout_s=timeout_s),
            classify(engine, "a/labels", ["x"], timeout_s=timeout_s),
            classify(engine, "a/labels", ["x" * 5000], timeout_s=timeout_s),
        ]
        calls += [collect(engine, adapter="a/writer", prompt="x", timeout_s=timeout_s) for _ in range(20)]
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(end) for end in ends] == [error] * 23
        # At most eight look-ups hang, and nothing waits behind them.
        assert held.inside == engine._resolving.calls() == 8
        assert engine.in_flight() == 0
        assert (await collect(engine, prompt="abc", max_new_tokens=2)).completion_tokens == 2
        held.opened.set()
        stuck.stuck = None
        assert (await collect(engine, adapter="a/writer", prompt="x", max_new_tokens=2)).completion_tokens == 2
        assert held.begun == 8
        await settled(engine)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("age_s", "timeout_s", "error"), [(5, 4, DeadlineExceeded), (100, None, Overloaded), (100, 200, Overloaded)]
)
def test_time_counts_from_the_first_byte(
    stuck: StuckStore,
    decoder: FrozenBase,
    start_engine: Start,
    age_s: float,
    timeout_s: float | None,
    error: type[Exception],
) -> None:
    engine = start_engine(decoder, stuck)

    async def main() -> None:
        received_at = time.monotonic() - age_s
        params = GenerateParams(adapter="a/writer", prompt="x", max_new_tokens=250, timeout_s=timeout_s)
        with pytest.raises(error):
            await engine.generate(params, acting_for("a/writer"), received_at)
        with pytest.raises(error):
            await engine.classify(
                "a/labels", ["x"], acting_for("a/labels"), timeout_s=timeout_s, received_at=received_at
            )
        await settled(engine)

    asyncio.run(main())


def test_a_time_limit_of_the_disk_is_no_deadline(stuck: StuckStore, decoder: FrozenBase, start_engine: Start) -> None:
    engine = start_engine(decoder, stuck)

    def timed_out(ref: str) -> ResolvedAdapter:
        raise TimeoutError("the disk did not answer")

    async def main() -> None:
        stuck.stuck = held = Held(timed_out)
        held.opened.set()
        with pytest.raises(TimeoutError, match="the disk"):
            await collect(engine, adapter="a/writer", prompt="x", timeout_s=5)
        await settled(engine)

    asyncio.run(main())


def test_stopping_ends_every_request_whatever_it_waits_for(
    stuck: StuckStore, decoder: FrozenBase, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_engine(decoder, stuck, max_sequences=1)
    long_text = "x" * 1000
    texts = Held(lambda *arguments: [1])
    monkeypatch.setattr(Preprocessor, "prompt", _where_long(Preprocessor.prompt, texts, long_text))
    monkeypatch.setattr(Preprocessor, "is_long", lambda self, text, ids: text == long_text)

    def begin(work: Any, count: int = 1) -> list[asyncio.Task[Any]]:
        return [asyncio.ensure_future(work()) for _ in range(count)]

    async def main() -> None:
        stuck.gate = threading.Event()
        digest = stuck.resolve("a/writer").digest
        with standstill():
            running = await generate(engine, GenerateParams(prompt="x", max_new_tokens=250))
            tasks = begin(lambda: collect(engine, adapter="a/writer", prompt="x"))
            tasks += begin(lambda: classify(engine, "a/labels", ["x"]))
            tasks += begin(lambda: engine.pin(digest))
            tasks += begin(lambda: collect(engine, prompt="x"), 3)
            await until(lambda: engine.waiting() == 5 and engine.residency.stats().loading == 2)
            held = stuck.hold()
            tasks += begin(lambda: collect(engine, adapter="a/writer", prompt="x"), 10)
            for adapter in (None, "a/writer"):
                tasks += begin(partial(collect, engine, adapter=adapter, prompt=long_text), 2)
            await until(lambda: held.inside == 8 and texts.inside == 2 and engine._tokenizing.calls() == 4)
            stops = [threading.Thread(target=engine.stop) for _ in range(2)]
            for stop in stops:
                stop.start()
            done, late = await asyncio.wait(tasks, timeout=10)
            assert not late
            assert {type(task.exception()) for task in done} == {EngineUnavailable}
        with pytest.raises(EngineUnavailable):
            await running.collect()
        for event in (stuck.gate, held.opened, texts.opened):
            event.set()
        await until(lambda: not any(stop.is_alive() for stop in stops))
        engine.stop()
        assert engine.in_flight() == engine.waiting() == engine.running() == 0
        with pytest.raises(EngineUnavailable):
            await engine.generate(GenerateParams(prompt="x"), BASE_PRINCIPAL)

    asyncio.run(main())


def test_pins_of_adapters_that_another_server_deleted_are_dropped(
    gated: GatedStore, decoder: FrozenBase, start_engine: Start
) -> None:
    engine = start_engine(decoder, gated)
    first, second = (gated.resolve(f"{tenant}/writer").digest for tenant in "ab")

    async def main() -> None:
        await engine.pin(first)
        engine.drop_deleted_pins()
        assert engine.residency.pinned_digests() == [first]
        gated.delete("a/writer")
        assert not gated.has(first) and gated.has(second)
        await engine.pin(second)
        assert engine.residency.pinned_digests() == [second]
        assert first not in engine.residency.resident_digests()
        gated.delete("b/writer")
        engine.drop_deleted_pins()
        assert engine.residency.pinned_digests() == []

    asyncio.run(main())


def test_a_bundle_is_checked_against_base_and_pool(stuck: StuckStore, start_engine: Start) -> None:
    base = random_decoder()
    engine = start_engine(base, stuck, pool_mib=1)
    engine.check_bundle(random_adapter(base, SHAPE, 1))
    large: AdapterBundle = random_adapter(base, SHAPE, 1, labels=[str(number) for number in range(5000)])
    with pytest.raises(AdapterTooLarge, match="raise pool_mib"):
        engine.check_bundle(large)
    other = random_encoder()
    with pytest.raises(WrongBase):
        engine.check_bundle(random_adapter(other, SHAPE, 1))


def test_an_answer_has_a_bounded_number_of_probabilities(
    stuck: StuckStore, decoder: FrozenBase, start_engine: Start
) -> None:
    engine = start_engine(decoder, stuck)

    async def main() -> None:
        for text in ("x", "x" * 5000):
            with pytest.raises(InvalidRequest, match="send at most 262 inputs") as refusal:
                await classify(engine, "a/many", [text] * 263)
            assert refusal.value.param == "inputs"
        assert len((await classify(engine, "a/many", ["x"] * 3)).results[0].probabilities) == 1000
        await settled(engine)

    asyncio.run(main())
