"""Many short prompts that come at once: they are tokenized on the event loop, in turns, whatever long ones wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sera_serve import loop_turns
from sera_serve.base.preprocess import Preprocessor
from sera_serve.engine import GenerateParams
from sera_serve.engine.prompts import PromptMaker
from sera_serve.loop_turns import LoopTurns
from sera_serve.threads import BoundedExecutor

LONG = "a long text"


class Tokenizer:
    """Takes 4 ms for each prompt; a long one waits for the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.may_end = threading.Event()
        monkeypatch.setattr(loop_turns, "time", SimpleNamespace(monotonic=lambda: self.now))

    def max_characters(self, tokens: int) -> int:
        return tokens

    def is_long(self, text: str | None, token_ids: Sequence[int] | None) -> bool:
        return text == LONG

    def prompt(self, text: str | None, token_ids: Sequence[int] | None, *rest: Any) -> list[int]:
        is_loop = threading.current_thread() is threading.main_thread()
        assert is_loop == (text != LONG)
        if not is_loop:
            assert self.may_end.wait(20)
            return [1]
        self.now += 0.004
        self.log.append("prompt")
        return [1, 2]


@pytest.mark.parametrize("params", [GenerateParams(prompt="x"), GenerateParams(token_ids=[1] * 900)])
def test_short_prompts_take_turns_and_wait_for_no_long_one(
    params: GenerateParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer(monkeypatch)
    executor, turns = BoundedExecutor("tokenizing", 2, 1024), LoopTurns()
    maker = PromptMaker(cast(Preprocessor, tokenizer), executor, lambda: turns, 1000)

    async def others() -> None:
        while True:
            tokenizer.log.append("others")
            await asyncio.sleep(0)

    async def main() -> None:
        long = [asyncio.ensure_future(maker.tokens(GenerateParams(prompt=LONG), "acme")) for _ in range(4)]
        beside = asyncio.create_task(others())
        found = await asyncio.gather(*(maker.tokens(params, "acme") for _ in range(30)))
        assert [list(tokens) for tokens in found] == [[1, 2]] * 30
        beside.cancel()
        tokenizer.may_end.set()
        await asyncio.gather(*long)

    try:
        asyncio.run(main())
    finally:
        tokenizer.may_end.set()
        executor.close()
    stretches = [stretch.count("prompt") for stretch in " ".join(tokenizer.log).split("others")]
    # The first 10 ms, and then one in each turn of the event loop.
    assert sorted(stretches, reverse=True)[:2] == [3, 1] and sum(stretches) == 30
