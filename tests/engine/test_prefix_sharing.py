"""Prompts that begin alike share their cache within one tenant's adapter and salt, and with no other."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from adapters_store import AdapterStore
from sera_serve import SeraConfig
from sera_serve.config import ServeSettings
from sera_serve.engine import GenerateParams, GenerationResult, Principal, ServingEngine
from sera_serve.engine.loop.hugging_face import PagedModel
from sera_serve.engine.loop.pages import PAGE_SIZE, chain_key, root_key
from support.engine import generate
from support.factories import random_adapter, random_decoder

# Three pages of 32 tokens, a token a byte, and what follows them.
SYSTEM = "You are a helpful assistant who answers in the words of sailors, whatever is asked of you. " * 2
QUESTIONS = ["Where is the moon?", "Who are you?"]


def test_keys_are_alike_for_one_chain_only() -> None:
    tokens = list(range(PAGE_SIZE))
    root = root_key("acme/a", b"secret")
    key = chain_key(root, tokens, b"secret")
    assert key == chain_key(root_key("acme/a", b"secret"), tokens, b"secret")
    others = [
        chain_key(root_key("acme/b", b"secret"), tokens, b"secret"),
        chain_key(root_key("acme/a", b"secret", side=1), tokens, b"secret"),
        chain_key(root_key("acme/a", b"other"), tokens, b"secret"),
        chain_key(root_key("acme/a", b"secret", adapter_from=1), tokens, b"secret"),
        chain_key(root, tokens, b"other"),
        chain_key(root, [*tokens[:-1], 99], b"secret"),
        chain_key(key, tokens, b"secret"),
    ]
    assert len({key, *others}) == 8
    assert all(len(k) == 16 for k in (key, *others))


@pytest.mark.parametrize(
    ("first", "second", "adapters", "shared"),
    [
        ("acme", "acme", (None, None), True),
        ("acme", "rival", (None, None), False),
        ("acme", "acme", ("acme/a", None), False),
        ("acme", "acme", ("acme/a", "acme/a"), True),
        # Shared by its tenant: each tenant that uses it has a cache of its own.
        ("acme", "rival", ("acme/a", "acme/a"), False),
    ],
)
def test_requests_with_keys_share_within_the_keys_tenant(
    first: str, second: str, adapters: tuple[str | None, str | None], shared: bool, tmp_path: Path
) -> None:
    base = random_decoder()
    store = AdapterStore(tmp_path / "store")
    store.publish(random_adapter(base, SeraConfig(8, 8, 16.0, "all-linear"), seed=0), "acme/a")
    settings = ServeSettings(store=store.root, pool_mib=4, kv_cache_tokens=2048, max_batch_tokens=512)
    engine = ServingEngine(base, store, settings)
    engine.start()

    async def cached() -> list[int]:
        found = []
        for tenant, adapter, question in zip((first, second), adapters, QUESTIONS, strict=True):
            params = GenerateParams(adapter=adapter, prompt=SYSTEM + question, max_new_tokens=2)
            stream = await engine.generate(params, Principal(tenant, f"key-of-{tenant}"))
            found.append((await stream.collect()).cached_tokens)
        return found

    try:
        assert asyncio.run(cached()) == [0, len(SYSTEM) // 32 * 32 if shared else 0]
    finally:
        engine.stop()


@pytest.mark.parametrize(
    ("first", "second", "salts", "shared"),
    [
        ("acme/a", "acme/a", (None, None), True),
        ("acme/a", "acme/b", (None, None), False),
        ("acme/a", "acme/copy", (None, None), True),
        ("acme/a", "rival/copy", (None, None), False),
        ("acme/a", None, (None, None), False),
        (None, None, (None, None), False),
        ("acme/a", "acme/a", ("ann", "ann"), True),
        ("acme/a", "acme/a", ("ann", "bob"), False),
        ("acme/a", "acme/a", (None, "ann"), False),
        (None, None, ("ann", "ann"), True),
        (None, None, ("ann", "bob"), False),
    ],
)
def test_only_prompts_of_one_tenant_adapter_and_salt_share(
    first: str | None,
    second: str | None,
    salts: tuple[str | None, str | None],
    shared: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = random_decoder()
    store = AdapterStore(tmp_path / "store")
    one, other = (random_adapter(base, SeraConfig(8, 8, 16.0, "all-linear"), seed=seed) for seed in range(2))
    for name, bundle in {"acme/a": one, "acme/b": other, "acme/copy": one, "rival/copy": one}.items():
        store.publish(bundle, name)
    passes: list[int] = []
    logits = PagedModel.logits

    def counted(self: PagedModel, ids: Tensor, *others: Any) -> Tensor:
        passes.append(ids.shape[1])
        return logits(self, ids, *others)

    monkeypatch.setattr(PagedModel, "logits", counted)

    def run(requests: list[tuple[str | None, str, str | None]]) -> list[GenerationResult]:
        async def all_of_them() -> list[GenerationResult]:
            results = []
            for adapter, prompt, salt in requests:
                params = GenerateParams(adapter=adapter, prompt=prompt, max_new_tokens=8, cache_salt=salt)
                stream = await generate(engine, params)
                results.append(await stream.collect())
            return results

        settings = ServeSettings(store=store.root, pool_mib=4, kv_cache_tokens=2048, max_batch_tokens=512)
        engine = ServingEngine(base, store, settings)
        engine.start()
        try:
            return asyncio.run(all_of_them())
        finally:
            engine.stop()

    requests = [(first, SYSTEM + QUESTIONS[0], salts[0]), (second, SYSTEM + QUESTIONS[1], salts[1])]
    together = run(requests)
    prefills = [tokens for tokens in passes if tokens > 1]
    assert len(prefills) == 2
    pages = len(SYSTEM) // 32 * 32
    assert prefills[1] == len(SYSTEM + QUESTIONS[1]) - (pages if shared else 0)
    assert [result.cached_tokens for result in together] == [0, pages if shared else 0]
    assert [result.token_ids for result in together] == [run([request])[0].token_ids for request in requests]
