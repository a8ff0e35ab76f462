"""Batches for static steps: requests of every kind, and the shapes of the adapters that they name."""

from __future__ import annotations

import asyncio
from typing import Any

from sera_serve import SeraConfig
from sera_serve.engine import ConstraintSpec, GenerateParams, GenerationResult, ServingEngine
from support.engine import generate, settled

MAX_RANK = 16
SHAPES = [
    SeraConfig(16, 16, 8.0, "all-linear"),
    SeraConfig(8, 1, 8.0, ("q_proj", "v_proj"), use_mixer=False),
    SeraConfig(12, 4, 8.0, ("k_proj", "o_proj", "down_proj")),
]
ADAPTERS = [f"acme/a{number}" for number in range(6)]


def ask(number: int, new_tokens: int = 9, **options: Any) -> GenerateParams:
    """Prompts of 1 to 94 tokens."""
    prompt = "".join(chr(97 + (number + place * place) % 26) for place in range(1 + number * 7 % 94))
    return GenerateParams(prompt=prompt, max_new_tokens=new_tokens + number % 5, **options)


def limits(number: int) -> dict[str, Any]:
    choices: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9},
        {"temperature": 1.1, "top_k": 30},
        {"temperature": 1.0, "top_p": 0.8, "top_k": 90},
    ]
    return choices[number % 4]


# Their tokens are chosen by operations beside the step.
CHOSEN: list[dict[str, Any]] = [
    {"logprobs": 2},
    {"repetition_penalty": 1.4, "presence_penalty": 0.5, "temperature": 0.7, "seed": 3},
    {"logit_bias": {101: 4.0, 102: 3.5}, "frequency_penalty": 0.8, "logprobs": 0},
    {"constraint": ConstraintSpec("regex", "([a-f]{2} ?){1,9}"), "temperature": 1.0, "seed": 5, "top_k": 40},
    {"min_tokens": 7, "logprobs": 1},
]


def chosen(number: int) -> dict[str, Any]:
    """Every fourth one is plain."""
    return CHOSEN[number % 5] if number % 4 else {}


BATCHES: dict[str, list[GenerateParams]] = {
    "base": [ask(number) for number in range(7)],
    "adapters": [ask(number, 30, adapter=[*ADAPTERS, None][number % 7]) for number in range(14)],
    "fewer rows": [ask(number, adapter=ADAPTERS[-number]) for number in range(3)],
    "sampled": [ask(number, temperature=0.8, seed=number) for number in range(5)],
    "limited": [ask(number, adapter=ADAPTERS[number % 3], seed=number, **limits(number)) for number in range(11)],
    "chosen by the host": [
        ask(number, adapter=[*ADAPTERS, None][number % 7], **chosen(number)) for number in range(16)
    ],
    "adapters again": [ask(number, adapter=ADAPTERS[5 - number % 6]) for number in range(9)],
}


async def all_at_once(engine: ServingEngine, batch: list[GenerateParams]) -> list[GenerationResult]:
    async def one(params: GenerateParams) -> GenerationResult:
        return await (await generate(engine, params)).collect()

    results = await asyncio.gather(*map(one, batch))
    await settled(engine)
    return results
