"""What is asked of an engine under random orders of events: generations and calls of rows, for a few adapters."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from sera_serve import SeraConfig
from sera_serve.engine import GenerateParams, Principal, ServingEngine
from sera_serve.engine.constraint import ConstraintSpec
from sera_serve.engine.request import WeightedAdapter

SHAPES = [
    SeraConfig(32, 32, 8.0, "all-linear"),
    SeraConfig(48, 16, 8.0, "all-linear"),
    SeraConfig(16, 1, 8.0, ("q_proj", "v_proj", "down_proj"), use_mixer=False),
]
WRITERS = ["a/one", "a/two", "b/one", "b/two"]
LABELS = ["a/yes", "b/many", "b/more"]
OVERFLOWING = {"c/writer", "c/labels"}
SUM = [WeightedAdapter("a/one", 0.6), WeightedAdapter("b/two", 0.4)]
DEADLINE = 20.0


def generations(count: int = 40) -> list[GenerateParams]:
    """Prompts that begin alike, and all that a step may do for a request."""
    dice = random.Random(5)
    heads = ["once upon a time there was a cat, and it was", "sail on, sail on, sail on, silver girl, sail on by"]
    options: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9},
        {"logprobs": 2},
        {"prompt_logprobs": 1, "temperature": 1.0},
        {"n": 3, "temperature": 1.0},
        {"n": 2, "logprobs": 0, "prompt_logprobs": 0, "temperature": 1.0},
        {"constraint": ConstraintSpec("regex", r"[a-z]{4,20}-\d{2,9}")},
        {"constraint": ConstraintSpec("json_schema", '{"enum": ["yes", "no", 12345]}'), "n": 2, "temperature": 1.0},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "ignore_eos": True},
        {"stop": ["e", "\n"], "min_tokens": 3},
        {"timeout_s": DEADLINE},
        {"timeout_s": DEADLINE, "n": 2, "temperature": 1.2},
        {"cache_salt": "salt", "priority": "high"},
    ]
    adapters = [*WRITERS, None, SUM, "c/writer", "b/two"]
    return [
        GenerateParams(
            adapter=adapters[number % len(adapters)],
            prompt=dice.choice(heads)[: dice.randint(1, 50)] + " again" * dice.randint(0, 5),
            max_new_tokens=dice.choice([3, 5, 20, 45]),
            seed=number,
            **options[number % len(options)],
        )
        for number in range(count)
    ]


@dataclass(frozen=True)
class RowsAsked:
    """A call of rows: to classify with one or several adapters, or to embed."""

    kind: str
    adapter: Any
    inputs: tuple[str, ...]
    timeout_s: float | None = None


def row_calls(count: int = 24) -> list[RowsAsked]:
    dice = random.Random(6)
    asked = []
    for number in range(count):
        inputs = tuple("word " * dice.randint(1, 12) + str(place) for place in range(dice.choice([1, 2, 5, 9])))
        kind = ("classify", "embed", "classify each", "classify")[number % 4]
        adapter: Any = [*LABELS, "c/labels"][number // 4 % 4]
        if kind == "embed":
            adapter = [None, "a/one", "b/many", SUM, "c/writer", "a/yes"][number // 4 % 6]
        elif kind == "classify each":
            adapter = [LABELS, LABELS[1:], ["a/yes", "c/labels"]][number // 4 % 3]
        asked.append(RowsAsked(kind, adapter, inputs, DEADLINE if number % 5 == 0 else None))
    return asked


GENERATIONS, ROW_CALLS = generations(), row_calls()


def names_of(adapter: Any) -> list[str]:
    if adapter is None:
        return []
    if isinstance(adapter, str):
        return [adapter]
    return [part if isinstance(part, str) else part.adapter for part in adapter]


def ask_rows(engine: ServingEngine, asked: RowsAsked, principal: Principal, **options: Any) -> Any:
    """The coroutine of a call of rows."""
    options["timeout_s"] = asked.timeout_s
    if asked.kind == "embed":
        return engine.embed(asked.adapter, list(asked.inputs), principal, **options)
    if asked.kind == "classify":
        return engine.classify(asked.adapter, list(asked.inputs), principal, **options)
    return engine.classify_each(asked.adapter, list(asked.inputs), principal, **options)
