"""A prompt that its answers share reads as a list of each answer would."""

from __future__ import annotations

import asyncio
import random
from array import array

import pytest

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.engine import BASE_PRINCIPAL, GenerateParams
from sera_serve.engine.answer_tokens import AnswerTokens
from support.engine import Start, settled


def test_every_slice_and_place_is_that_of_a_list() -> None:
    dice = random.Random(3)
    for _ in range(200):
        prompt = [dice.randrange(1 << 20) for _ in range(dice.randrange(6))]
        tokens, plain = AnswerTokens(array("i", prompt)), list(prompt)
        for token in range(dice.randrange(6)):
            tokens.append(token)
            plain.append(token)
        assert (len(tokens), list(tokens)) == (len(plain), plain)
        for _ in range(20):
            first, last = (dice.choice([None, *range(-14, 14)]) for _ in range(2))
            assert list(tokens[first:last]) == plain[first:last]
        assert [tokens[place] for place in range(-len(plain), len(plain))] == [*plain, *plain]
        for place in (len(plain), -len(plain) - 1):
            with pytest.raises(IndexError):
                tokens[place]


def test_tokens_are_read_in_a_row() -> None:
    with pytest.raises(TypeError, match="in a row"):
        AnswerTokens(array("i", [1, 2]))[::2]


def test_many_answers_have_one_prompt(decoder: FrozenBase, store: AdapterStore, start_engine: Start) -> None:
    engine = start_engine(decoder, store)
    prompt = [index % 250 for index in range(200)]

    async def main() -> None:
        params = GenerateParams(token_ids=prompt, n=64, max_new_tokens=2, temperature=1.0, ignore_eos=True)
        streams = await engine.generate_choices(params, BASE_PRINCIPAL)
        prompts = {id(stream.request.tokens._prompt) for stream in streams}
        results = await asyncio.gather(*(stream.collect() for stream in streams))
        assert len(prompts) == 1 and len(results) == 64
        assert all(list(stream.request.tokens) == [*prompt, *stream.result.token_ids] for stream in streams)
        await settled(engine)

    asyncio.run(main())
