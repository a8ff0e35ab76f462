"""An adapter that acts from a position on: the tokens before it are the base model's."""

from __future__ import annotations

import asyncio

import torch

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.engine import BASE_PRINCIPAL
from sera_serve.engine.request import GenerationRequest
from support.engine import SHAPE, Start, settled, until
from support.factories import continued, greedy, merged, random_adapter

PROMPT = list(range(1, 41))
NEW = 12


def test_an_adapter_acts_from_its_position_on(decoder: FrozenBase, store: AdapterStore, start_engine: Start) -> None:
    bundle = random_adapter(decoder, SHAPE, 1)
    store.publish(bundle, "acme/a")
    engine = start_engine(decoder, store, max_batch_tokens=16)
    runner = engine.runners["generate"]
    resolved = store.resolve("acme/a")
    positions = [0, 20, len(PROMPT), 1000]
    requests = [
        GenerationRequest(
            principal=BASE_PRINCIPAL,
            id=f"from {position}",
            tokens=list(PROMPT),
            prompt_tokens=len(PROMPT),
            limit=len(PROMPT) + NEW,
            adapter=resolved,
            prefix_key="acme/a",
            adapter_from=position,
        )
        for position in positions
    ]

    async def main() -> None:
        for _ in range(2):  # The second time, each finds the pages of its own chain alone.
            runner.scheduler.submit(requests)
            await until(lambda: all(request.is_finished for request in requests))
            await settled(engine)
            got = dict(zip(positions, [request.tokens[len(PROMPT) :] for request in requests], strict=True))
            assert got[0] == greedy(merged(decoder, bundle), PROMPT, NEW)
            assert got[1000] == greedy(decoder, PROMPT, NEW)
            assert got[20] == mixed(decoder, merged(decoder, bundle), 20)
            assert got[len(PROMPT)] == mixed(decoder, merged(decoder, bundle), len(PROMPT))
            assert len({tuple(tokens) for tokens in got.values()}) >= 3
            requests[:] = [again(request) for request in requests]

    asyncio.run(main())


def again(request: GenerationRequest) -> GenerationRequest:
    return GenerationRequest(
        principal=request.principal,
        id=request.id,
        tokens=list(PROMPT),
        prompt_tokens=len(PROMPT),
        limit=request.limit,
        adapter=request.adapter,
        prefix_key=request.prefix_key,
        adapter_from=request.adapter_from,
    )


def mixed(base: FrozenBase, adapted: FrozenBase, position: int) -> list[int]:
    """Greedy tokens where the base model computes the first tokens, and the adapted one the rest, over one cache."""
    tokens = list(PROMPT)
    with torch.no_grad():
        first = base.model(torch.tensor([tokens[:position]]), use_cache=True)
        cache, logits = first.past_key_values, first.logits
        rest = tokens[position:]
        while len(tokens) < len(PROMPT) + NEW:
            if rest:
                out = continued(adapted, rest, cache)
                cache, logits = out.past_key_values, out.logits
            rest = [int(logits[0, -1].argmax())]
            tokens += rest
    return tokens[len(PROMPT) :]
