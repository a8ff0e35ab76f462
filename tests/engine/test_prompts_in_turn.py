"""Many short prompts that come at once: some are tokenized on the event loop, and the others on threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any, cast

import pytest

from sera_serve.base.preprocess import LONG_CHARACTERS, Preprocessor
from sera_serve.engine import GenerateParams
from sera_serve.engine.prompts import PromptMaker
from sera_serve.threads import BoundedExecutor


class Tokenizer:
    """Notes the thread of each call."""

    longest_token = 10

    def __init__(self) -> None:
        self.on_loop: list[bool] = []

    def max_characters(self, tokens: int) -> int:
        return self.longest_token * tokens

    def is_long(self, text: str | None, token_ids: Sequence[int] | None) -> bool:
        return False

    def prompt(self, *arguments: Any) -> list[int]:
        self.on_loop.append(threading.current_thread() is threading.main_thread())
        return [1, 2]


@pytest.mark.parametrize(("characters", "most"), [(1, 39), (900, 4), (LONG_CHARACTERS // 2, 1), (LONG_CHARACTERS, 1)])
def test_one_turn_of_the_loop_tokenizes_no_more_than_one_long_text_takes(characters: int, most: int) -> None:
    tokenizer = Tokenizer()
    executor = BoundedExecutor("tokenizing", 2, 1024)
    maker = PromptMaker(cast(Preprocessor, tokenizer), executor, 1000)
    params = GenerateParams(prompt="x" * characters, max_new_tokens=1)

    async def main() -> None:
        for _ in range(2):
            tokenizer.on_loop.clear()
            found = await asyncio.gather(*(maker.tokens(params, "acme") for _ in range(60)))
            assert [list(tokens) for tokens in found] == [[1, 2]] * 60
            assert tokenizer.on_loop.count(True) == most
            # The next turn begins anew.
            await asyncio.sleep(0)

    asyncio.run(main())
    executor.close()


def test_token_ids_are_checked_on_the_loop() -> None:
    tokenizer = Tokenizer()
    maker = PromptMaker(cast(Preprocessor, tokenizer), BoundedExecutor("tokenizing", 2, 0), 1000)
    params = GenerateParams(token_ids=[1] * 900, max_new_tokens=1)

    async def main() -> None:
        await asyncio.gather(*(maker.tokens(params, "acme") for _ in range(60)))

    asyncio.run(main())
    assert tokenizer.on_loop == [True] * 60
