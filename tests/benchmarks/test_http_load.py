"""The load client against scripted answers: what it counts, and from when."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from itertools import cycle
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from benchmarks.http_load import Answer, LoadClient
from benchmarks.server_process import adapter_figures
from benchmarks.service_figures import failures, fairness, latency, rates
from benchmarks.workload import TimedRequest
from support.live_server import live_server, wait_until

# The name of the adapter chooses what happens.
FINE, REFUSED, BREAKS, OTHER, ENDLESS = range(5)
NAMES = ["t/fine", "t/refused", "t/breaks", "t/other", "t/endless"]


def event(**content: Any) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()


class Script:
    """An app that answers as its adapter's name says."""

    def __init__(self) -> None:
        self.app = FastAPI()
        self.app.add_api_route("/v1/generate", self.generate, methods=["POST"])
        self.bodies: list[dict[str, Any]] = []
        self.open = 0
        self.most_open = 0

    async def generate(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        if body["adapter"] == NAMES[REFUSED]:
            error = {"message": "full", "type": "rate_limit_error", "param": None, "code": "overloaded"}
            return JSONResponse({"error": error}, 429, {"Retry-After": "3"})
        return StreamingResponse(self.events(body), media_type="text/event-stream")

    async def events(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            name = "t/who" if body["adapter"] == NAMES[OTHER] else body["adapter"]
            token = 0
            while token < body["max_new_tokens"] or body["adapter"] == NAMES[ENDLESS]:
                yield event(adapter=name, version=2, token_ids=[token, token + 1], text="")
                token += 2
                await asyncio.sleep(0.01)
                if body["adapter"] == NAMES[BREAKS]:
                    yield event(error={"code": "engine_unavailable"})
                    return
            yield event(adapter=name, version=2, token_ids=[], text="", finish_reason="length") + b"data: [DONE]\n\n"
        finally:
            self.open -= 1


@pytest.fixture(scope="module")
def script() -> Script:
    return Script()


@pytest.fixture(scope="module")
def client(script: Script) -> Iterator[LoadClient]:
    with live_server(script.app) as url:
        yield LoadClient("127.0.0.1", int(url.rsplit(":", 1)[1]), NAMES.__getitem__)


def request(adapter: int, due: float = 0.0, new_tokens: int = 6) -> TimedRequest:
    return TimedRequest(due, adapter, (5, 6, 7), new_tokens)


def test_what_is_sent_and_what_came(client: LoadClient, script: Script) -> None:
    fine, refused, broken, other = asyncio.run(client.open_loop(map(request, (FINE, REFUSED, BREAKS, OTHER))))
    assert {"adapter": "t/fine", "token_ids": [5, 6, 7], "max_new_tokens": 6, "stream": True} in script.bodies
    assert (fine.status, fine.complete, fine.tokens, fine.counts) == (200, True, [0, 1, 2, 3, 4, 5], [2, 2, 2])
    assert (fine.version, fine.right_length) == (2, True)
    assert (refused.status, refused.error, refused.retry_after, refused.tokens) == (429, "overloaded", "3", [])
    assert (broken.status, broken.error, broken.tokens, broken.complete) == (200, "engine_unavailable", [0, 1], False)
    # Whole, but another adapter's.
    assert other.complete and not other.right_length
    assert failures([fine, refused, broken]) == {"429 overloaded": 1, "200 engine_unavailable": 1}


def test_open_loop_waits_for_nobody_and_counts_from_when_it_was_due(client: LoadClient) -> None:
    trace = [request(FINE, due=0.02 * i, new_tokens=20) for i in range(5)]
    answers = asyncio.run(client.open_loop(trace))
    assert all(answer.right_length for answer in answers)
    # The last is sent before the first has ended, and none before it is due.
    assert answers[-1].sent < answers[0].ended
    for answer, timed in zip(answers, trace, strict=True):
        assert answer.due - answers[0].due == pytest.approx(timed.due)
        assert answer.due <= answer.sent < answer.times[0] == answer.due + answer.ttft


def test_closed_loop_keeps_so_many_under_way_and_cuts_the_rest_short(client: LoadClient, script: Script) -> None:
    script.most_open = 0
    answers = asyncio.run(client.closed_loop(cycle([request(FINE)]), clients=3, seconds=0.5))
    assert script.most_open == 3
    assert len(answers) > 6
    assert sum(not answer.complete for answer in answers) <= 3
    cut = asyncio.run(client.closed_loop(cycle([request(ENDLESS)]), clients=2, seconds=0.3))
    assert len(cut) == 2 and not any(answer.complete for answer in cut)
    assert all(answer.tokens for answer in cut)
    wait_until(lambda: script.open == 0)


def test_a_server_that_is_not_there_is_an_answer_too() -> None:
    nowhere = LoadClient("127.0.0.1", 1, NAMES.__getitem__)
    (answer,) = asyncio.run(nowhere.open_loop([request(FINE)]))
    assert answer.status == 0 and answer.error is not None and answer.error.startswith("connection: ")


def made(adapter: str, due: float, times: list[float], prompt: int = 3) -> Answer:
    asked = TimedRequest(0, 0, (1,) * prompt, 2 * len(times))
    counts, tokens = [2] * len(times), [0] * 2 * len(times)
    return Answer(asked, adapter, due, due, 200, times, counts, tokens, adapter, 1, complete=True, ended=times[-1])


def test_figures_of_known_answers() -> None:
    answers = [made("a/x", 10.0, [10.5, 11.0, 12.0]), made("b/x", 10.0, [11.5, 12.5], prompt=7)]
    found = latency(answers)
    assert (found["ttft_p50_s"], found["itl_p50_s"]) == (1.0, 1.0)
    assert found["ttft_p99_s"] == pytest.approx(1.49)
    # From 10.75 to 12.25: four tokens of the first, whose end is in it, and two of the second.
    assert rates(answers, 10.75, 12.25) == {"requests_per_s": round(1 / 1.5, 2), "tokens_per_s": 4.0}
    # The second's prompt began in it, and the first's did not: 4 tokens against 7 + 2.
    assert fairness(answers, 10.75, 12.25)["max_over_min"] == 2.25
    assert latency([])["ttft_p50_s"] is None


def test_tiers_are_those_of_the_time_between_two_readings() -> None:
    hits, load = 'sera_adapter_hits_total{tier="%s"}', 'sera_adapter_load_seconds_%s{tier="store"}'
    before = {hits % "device": 10.0, load % "sum": 1.0, load % "count": 5.0}
    after = {hits % "device": 16.0, hits % "host": 3.0, hits % "store": 1.0, load % "sum": 1.5, load % "count": 9.0}
    assert adapter_figures(before, after) == {
        "hit_rate": 0.6,
        "host_rate": 0.3,
        "store_rate": 0.1,
        "loads": 4.0,
        "load_mean_s": 0.125,
    }
    assert set(adapter_figures({}, {}).values()) == {None}
