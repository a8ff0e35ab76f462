"""What the answers to a tenant's calls of rows may take together, until they are written."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import pytest

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.engine import Principal, ServingEngine
from sera_serve.engine.row_calls import _SMALL_ANSWER
from sera_serve.engine.tenant_memory import TenantMemory
from sera_serve.errors import EngineUnavailable, TenantOverloaded
from sera_serve.server.native.schemas import pieces_of
from sera_serve.server.openai.embeddings import _pieces
from support.engine import Start, settled
from support.factories import random_adapter
from support.head_tasks import SHAPE, span_finder

LABELS = [f'the "{number}"th label' for number in range(40)]
TEXTS = [f"{number} words" for number in range(100)]
# Many of its bytes are spans.
LONG = ["Ann saw Bob in Rome, " * 3] * 20
# All have more than _SMALL_ANSWER.
ANSWERS: dict[str, tuple[list[str], Callable[[Any], Iterable[str]]]] = {
    "embed": (TEXTS, lambda result: _pieces("{}", result.vectors, "float", "{}")),
    "acme/labels": (TEXTS, pieces_of),
    "acme/spans": (LONG, pieces_of),
}
FIELDS = {"embed": "input", "acme/labels": "inputs", "acme/spans": "inputs"}


@pytest.fixture
def engine(decoder: FrozenBase, store: AdapterStore, start_engine: Start) -> ServingEngine:
    store.publish(random_adapter(decoder, SHAPE, 1, LABELS, 0.5), "acme/labels")
    store.publish(span_finder(decoder, 2), "acme/spans")
    return start_engine(decoder, store)


async def asked(engine: ServingEngine, kind: str, counted: ExitStack | None = None, tenant: str = "acme") -> Any:
    inputs, _ = ANSWERS[kind]
    if kind == "embed":
        return await engine.embed(None, inputs, Principal(tenant), counted=counted)
    return await engine.classify(kind, inputs, Principal(tenant), counted=counted)


def reserved(engine: ServingEngine) -> int:
    return sum(one.nbytes for one in engine._answer_memory._reservations)


@pytest.mark.parametrize("kind", ANSWERS)
def test_an_answer_takes_no_more_than_is_counted_for_it(engine: ServingEngine, kind: str) -> None:
    async def main() -> None:
        await asked(engine, kind)
        gc.collect()
        with ExitStack() as counted:
            tracemalloc.start()
            try:
                result = await asked(engine, kind, counted)
                gc.collect()
                kept = tracemalloc.get_traced_memory()[0]
            finally:
                tracemalloc.stop()
            nbytes = kept + len("".join(ANSWERS[kind][1](result)).encode())
            assert nbytes < reserved(engine) < 3 * nbytes
        assert not reserved(engine)

    asyncio.run(main())


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_call_beside_too_many_unwritten_answers_is_refused(
    engine: ServingEngine, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TenantMemory, "tenant_bytes", _SMALL_ANSWER)

    async def main() -> None:
        with ExitStack() as counted:
            # Alone, it may have more than its share.
            await asked(engine, kind, counted)
            with pytest.raises(TenantOverloaded, match="tenant 'acme' under way take too much memory") as refusal:
                await asked(engine, kind)
            assert refusal.value.param == FIELDS[kind]
            # What is small is not counted.
            await engine.embed(None, TEXTS[:2], Principal("acme"))
        # Neither after the answer is written, nor after a call that nobody writes an answer to, is anything counted.
        for _ in range(2):
            await asked(engine, kind)
        await settled(engine)
        assert not reserved(engine)

    asyncio.run(main())


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_call_that_fails_counts_no_more(engine: ServingEngine, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> Any:
        seen.append(reserved(engine))
        raise RuntimeError("the pass failed")

    seen: list[int] = []
    monkeypatch.setattr(engine.runners["classify"], "_classify", fails)

    async def main() -> None:
        errors = [await asyncio.gather(asked(engine, kind), return_exceptions=True)]
        assert isinstance(errors[0][0], EngineUnavailable) and seen[0]
        # The error is kept, and with it the frames that it went through.
        assert not reserved(engine)
        await settled(engine)

    asyncio.run(main())


def test_tenants_have_room_of_their_own(engine: ServingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        with ExitStack() as counted:
            await asked(engine, "embed", counted)
            monkeypatch.setattr(TenantMemory, "tenant_bytes", reserved(engine))
            await asked(engine, "embed", tenant="globex")
            with pytest.raises(TenantOverloaded):
                await asked(engine, "embed")
        await settled(engine)

    asyncio.run(main())
