"""Prompts that begin alike share their cache within one tenant's adapter, and with no other."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from adapters_store import AdapterStore
from sera_serve import SeraConfig
from sera_serve.config import ServeSettings
from sera_serve.engine import GenerateParams, GenerationResult, ServingEngine
from sera_serve.engine.continuous import ContinuousBatch
from sera_serve.engine.prefix_salts import PrefixSalts
from support.factories import random_adapter, random_decoder

# Three pages of 32 tokens, a token a byte, and what follows them.
SYSTEM = "You are a helpful assistant who answers in the words of sailors, whatever is asked of you. " * 2
QUESTIONS = ["Where is the moon?", "Who are you?"]


def test_salted_tokens_are_alike_for_one_key_only() -> None:
    salts, other = PrefixSalts(4), PrefixSalts(4)
    tokens = [5, 5, 5, 5, 5, 7]
    salted = salts.salted(tokens, "a")
    assert salted == salts.salted(tokens, "a")
    assert salted[:5] == salts.salted([*tokens[:5], 9], "a")[:5] and salted[5] != salts.salted([*tokens[:5], 9], "a")[5]
    assert len(set(salted[:4])) == 4
    for stranger in (salts.salted(tokens, "b"), other.salted(tokens, "a")):
        assert not set(salted) & set(stranger)
    assert all(0 <= token < 2**31 for token in salted)


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ("acme/a", "acme/a", True),
        ("acme/a", "acme/b", False),
        ("acme/a", "acme/copy", True),
        ("acme/a", "rival/copy", False),
        ("acme/a", None, False),
        (None, None, False),
    ],
)
def test_only_prompts_of_one_tenant_and_adapter_share(
    first: str | None, second: str | None, shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = random_decoder()
    store = AdapterStore(tmp_path / "store")
    one, other = (random_adapter(base, SeraConfig(8, 8, 16.0, "all-linear"), seed=seed) for seed in range(2))
    for name, bundle in {"acme/a": one, "acme/b": other, "acme/copy": one, "rival/copy": one}.items():
        store.publish(bundle, name)
    passes: list[int] = []
    enter = ContinuousBatch._enter_pass

    def counted(self: ContinuousBatch, module: Any, args: Any, kwargs: Any) -> Any:
        passes.append(kwargs["input_ids"].shape[1])
        return enter(self, module, args, kwargs)

    monkeypatch.setattr(ContinuousBatch, "_enter_pass", counted)

    def run(requests: list[tuple[str | None, str]]) -> list[GenerationResult]:
        async def all_of_them() -> list[GenerationResult]:
            results = []
            for adapter, prompt in requests:
                stream = await engine.generate(GenerateParams(adapter=adapter, prompt=prompt, max_new_tokens=8))
                results.append(await stream.collect())
            return results

        settings = ServeSettings(store=store.root, pool_mib=4, kv_cache_tokens=2048, max_batch_tokens=512)
        engine = ServingEngine(base, store, settings)
        engine.start()
        try:
            return asyncio.run(all_of_them())
        finally:
            engine.stop()

    requests = [(first, SYSTEM + QUESTIONS[0]), (second, SYSTEM + QUESTIONS[1])]
    together = run(requests)
    prefills = [tokens for tokens in passes if tokens > 1]
    assert len(prefills) == 2
    pages = len(SYSTEM) // 32 * 32
    assert prefills[1] == len(SYSTEM + QUESTIONS[1]) - (pages if shared else 0)
    assert [result.cached_tokens for result in together] == [0, pages if shared else 0]
    assert [result.token_ids for result in together] == [run([request])[0].token_ids for request in requests]
