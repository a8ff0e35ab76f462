"""What the log-probabilities of a tenant's calls may take together, and who is refused for it."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.engine import GenerateParams, GenerationResult, Principal, ServingEngine, choices
from sera_serve.engine.tenant_memory import _AT_ONCE, LOGPROB_BYTES, LogprobRoom, TenantMemory
from sera_serve.errors import InvalidRequest, TenantOverloaded
from support.engine import Start, settled

BLOCK = _AT_ONCE * LOGPROB_BYTES
# 105 log-probabilities a step, so that a block is full after 20.
ASKED: dict[str, Any] = {"prompt": "hello", "logprobs": 20, "max_new_tokens": 60, "ignore_eos": True, "n": 5}


async def asked(engine: ServingEngine, tenant: str, **options: Any) -> list[GenerationResult]:
    params = GenerateParams(**ASKED | options)
    streams = await engine.generate_choices(params, Principal(tenant))
    try:
        return [await stream.collect() for stream in streams]
    finally:
        for stream in streams:
            await stream.aclose()


def test_a_call_that_outgrows_its_tenants_share_ends_alone(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_engine(decoder, store)
    monkeypatch.setattr(TenantMemory, "tenant_bytes", 4 * BLOCK)

    async def main() -> None:
        # Each of them needs four blocks in the end.
        calls = [asked(engine, "a"), asked(engine, "a"), asked(engine, "b"), asked(engine, "a", logprobs=None)]
        *of_a, of_b, plain = await asyncio.gather(*calls, return_exceptions=True)
        refused = [error for error in of_a if isinstance(error, TenantOverloaded)]
        assert refused and all(error.param == "logprobs" and error.status == 429 for error in refused)
        assert "fewer requests with logprobs" in refused[0].message
        for answered in (of_b, plain):
            assert isinstance(answered, list) and all(len(result.token_ids) == 60 for result in answered)
        del refused, of_a
        # An error that was raised has the frames that it went through. The HTTP layer forgets them.
        await asyncio.sleep(0)
        gc.collect()
        await settled(engine)
        # Their room is there again.
        assert len(await asked(engine, "a")) == 5
        await settled(engine)

    asyncio.run(main())


def test_where_a_tenant_has_too_many_nothing_begins(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_engine(decoder, store)
    monkeypatch.setattr(TenantMemory, "tenant_bytes", BLOCK)
    held = LogprobRoom(engine._logprob_memory, "a")
    assert held.take(1)

    async def main() -> None:
        for param in ("logprobs", "prompt_logprobs"):
            with pytest.raises(TenantOverloaded, match=f"with {param} at a time") as refusal:
                await asked(engine, "a", **{"logprobs": None, param: 0})
            assert refusal.value.param == param
        assert len(await asked(engine, "a", logprobs=None)) == 5
        await settled(engine)

    asyncio.run(main())


def test_room_ends_with_whoever_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TenantMemory, "tenant_bytes", 3 * BLOCK)
    memory = TenantMemory()
    first, second = LogprobRoom(memory, "a"), LogprobRoom(memory, "a")
    assert first.take(2 * _AT_ONCE) and second.take(_AT_ONCE)
    assert not second.take(1)
    assert LogprobRoom(memory, "b").take(3 * _AT_ONCE)
    del first
    assert second.take(2 * _AT_ONCE)


@pytest.mark.parametrize("options", [{"logprobs": 3}, {"prompt_logprobs": 3}], ids=["answers", "prompts"])
def test_all_prompts_and_answers_of_a_call_count_together(
    options: dict[str, int],
    decoder: FrozenBase,
    store: AdapterStore,
    start_engine: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = start_engine(decoder, store)
    # Of four prompts of 5 tokens with two answers of 5 each.
    most = 4 * 5 * 2 * 4
    prompts = [GenerateParams(token_ids=[1, 2, 3, 4, 5], max_new_tokens=5, n=2, **options) for _ in range(4)]

    async def main() -> None:
        monkeypatch.setattr(choices, "_MAX_LOGPROBS", most - 1)
        with pytest.raises(InvalidRequest, match=f"up to {most} log-probabilities") as refusal:
            await engine.generate_prompts(prompts, Principal("a"))
        assert refusal.value.param == next(iter(options))
        monkeypatch.setattr(choices, "_MAX_LOGPROBS", most)
        streams = await engine.generate_prompts(prompts, Principal("a"))
        assert len([await stream.collect() for stream in streams]) == 8
        await settled(engine)

    asyncio.run(main())
