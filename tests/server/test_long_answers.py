"""Long answers: written in slices, between which the event loop is free, and the same as if written at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from sera_serve import loop_turns
from sera_serve.base import Span
from sera_serve.engine import ClassifyResult, TokenLogprobs
from sera_serve.engine.results import HeadResult, LabelScores, LabelSet, Score, Spans
from sera_serve.loop_turns import LoopTurns
from sera_serve.server import long_answers
from sera_serve.server.long_answers import written
from sera_serve.server.native.sampling import _ENCODED_AT_ONCE, logprob_pieces
from sera_serve.server.native.schemas import ClassifyEachResponse, ClassifyResponse, pieces_of, pieces_of_each


@pytest.mark.parametrize(("count", "slices"), [(1, 1), (4, 1), (8, 1), (9, 2), (40, 9)])
def test_slices_of_two_milliseconds_with_others_between_them(
    count: int, slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(long_answers, "time", SimpleNamespace(monotonic=lambda: now))
    log: list[str] = []

    def pieces() -> Iterator[str]:
        nonlocal now
        for place in range(count):
            now += 0.0005
            log.append("piece")
            yield f"é{place},"

    async def others() -> None:
        while True:
            log.append("others")
            await asyncio.sleep(0)

    async def main() -> None:
        beside = asyncio.create_task(others())
        assert await written(pieces(), LoopTurns(), "a") == "".join(f"é{place}," for place in range(count)).encode()
        beside.cancel()

    asyncio.run(main())
    stretches = [stretch for stretch in " ".join(log).split("others") if "piece" in stretch]
    # The first turn comes at once.
    assert [stretch.count("piece") for stretch in stretches][:1] == [min(count, 8)]
    assert len(stretches) == slices and max(stretch.count("piece") for stretch in stretches[1:] or [""]) <= 4


def test_an_answer_waits_for_the_turns_of_others() -> None:
    log: list[str] = []

    def pieces(name: str) -> Iterator[str]:
        for _ in range(4):
            log.append(name)
            yield "x"

    async def main() -> None:
        turns = LoopTurns()
        await asyncio.gather(*(written(pieces(name), turns, name) for name in ("a", "b")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_answers, "_SLICE_S", 0.0)
        asyncio.run(main())
    assert log == ["a", "a", "b", "a", "b", "a", "b", "b"]


def test_many_answers_that_are_ready_at_once_are_not_begun_in_one_turn_of_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    for module in (long_answers, loop_turns):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    log: list[str] = []

    def pieces() -> Iterator[str]:
        nonlocal now
        now += 0.0019
        log.append("answer")
        yield "x"

    async def others() -> None:
        while True:
            log.append("others")
            await asyncio.sleep(0)

    async def main() -> None:
        turns = LoopTurns()
        beside = asyncio.create_task(others())
        await asyncio.gather(*(written(pieces(), turns, "a") for _ in range(30)))
        beside.cancel()

    asyncio.run(main())
    stretches = [stretch.count("answer") for stretch in " ".join(log).split("others")]
    assert (max(stretches), sum(stretches)) == (6, 30)


SPANS = Spans([Span(0, 4, "name", 0.5, "Zoë?"), Span(5, 9, 'pl"ace', 0.25, "a\nb")], True)
ROWS: dict[str, Sequence[HeadResult]] = {
    "labels": [LabelScores("é", {"é": 0.75, 'b"': 0.25})] * 2,
    "label sets": [LabelSet(["a"], {"a": 0.5, "b": 1e-9}), LabelSet([], {"a": 0.1, "b": 0.2})],
    "scores": [Score(1.0), Score(-2.5e30)],
    "spans": [SPANS, Spans([], False)],
}


def response_of(result: ClassifyResult) -> ClassifyResponse:
    def row(value: Any) -> dict[str, Any]:
        return {"spans": [vars(span) for span in value.spans], "truncated": value.truncated}

    rows = [row(value) if isinstance(value, Spans) else vars(value) for value in result.results]
    return ClassifyResponse.model_validate({"adapter": result.adapter, "version": result.version, "results": rows})


@pytest.mark.parametrize("kind", ROWS)
def test_a_classification_is_written_as_its_model_would_be(kind: str) -> None:
    result = ClassifyResult(adapter="acme/é", version=3, results=list(ROWS[kind]))
    assert "".join(pieces_of(result)) == response_of(result).model_dump_json()
    each = [result, ClassifyResult(adapter="acme/b", version=None, results=list(ROWS[kind])[:1])]
    whole = ClassifyEachResponse(adapters=list(map(response_of, each)))
    assert "".join(pieces_of_each(each)) == whole.model_dump_json()


def test_pieces_are_small_whatever_an_answer_has() -> None:
    many = Spans([Span(0, 4, "name", 0.5, "Zoes")] * 5000, False)
    result = ClassifyResult(adapter="acme/a", version=1, results=[many, *ROWS["labels"]])
    assert max(map(len, pieces_of(result))) < 200
    tokens = [TokenLogprobs(1, -0.5, ((1, -0.5),) * 20)] * 1000
    assert len(list(logprob_pieces(tokens))) >= 1000 // _ENCODED_AT_ONCE
    assert max(piece.count('"top"') for piece in logprob_pieces(tokens)) == _ENCODED_AT_ONCE <= 64
