"""What a siege counts: pauses, answers that changed, how requests ended, and what holding means."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from adapters_store import AdapterStore
from benchmarks.siege.__main__ import main
from benchmarks.siege.attacks_on_parsing import pipelined
from benchmarks.siege.cases import CASES
from benchmarks.siege.each import report_each
from benchmarks.siege.mixed import NAMES, PARTS, held
from benchmarks.siege.probe import CLASSIFY, GENERATE, STREAM, Sample, figures, longest_pause, read_answer, same
from benchmarks.siege.server import Reading
from benchmarks.siege.shutdowns import how_ended
from benchmarks.siege.wire import Outcome, Reply, Sender, Target, read_reply
from sera_serve.config import ServeSettings
from sera_serve.server import build_app
from support.factories import random_decoder
from support.live_server import live_server
from support.stub_engine import StubEngine


def event(**content: Any) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def answered(data: bytes) -> Reply:
    async def read() -> Reply:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await read_reply(reader)

    return asyncio.run(read())


def test_a_pause_lasts_from_the_first_unanswered_request_to_the_next_answer() -> None:
    samples = [Sample(0, 1), Sample(2, 3, "refused"), Sample(4, 5, "refused"), Sample(6, 8), Sample(8, 9, "refused")]
    assert longest_pause(samples, 0) == 6
    assert longest_pause(samples[:1], 0) == 1
    # No answer any more: until the last failure.
    assert longest_pause([*samples, Sample(9, 20, "refused")], 0) == 12
    assert longest_pause(samples, 8.5) == 1


def test_figures_count_requests_under_way_and_compare_answers() -> None:
    samples = [Sample(0, 1, "", [1]), Sample(1, 5, "", [1]), Sample(5, 6, "503"), Sample(6, 7, "", [2]), Sample(9, 10)]
    seen = figures(samples, 2, 8, [1])
    assert (seen.answers, seen.wrong, seen.failures) == (2, 1, {"503": 1})
    assert (seen.p50, seen.p95, seen.longest) == (2.5, 4, 4)
    assert figures(samples, 20, 30, [1]).p95 is None


def test_probabilities_are_compared_to_rounding_and_token_ids_exactly() -> None:
    assert same({"a": 0.5, "b": 0.5}, {"a": 0.5004, "b": 0.4996})
    assert not same({"a": 0.5}, {"a": 0.51}) and not same({"a": 1.0}, {"b": 1.0})
    assert same([1, 2], [1, 2]) and not same([1, 2], [1, 3]) and not same(None, [1])


def test_answers_are_read_whole() -> None:
    assert read_answer(GENERATE, b'{"token_ids": [1, 2]}') == [1, 2]
    assert read_answer(CLASSIFY, b'{"results": [{"probabilities": {"a": 1}}]}') == {"a": 1}
    stream = event(token_ids=[1]) + event(token_ids=[2, 3])
    assert read_answer(STREAM, stream + b"data: [DONE]\n\n") == [1, 2, 3]
    for cut in (stream, stream + b"data: [DO"):
        with pytest.raises(ValueError):
            read_answer(STREAM, cut)


def test_replies_are_labelled_by_status_and_code() -> None:
    error = b'{"error": {"code": "overloaded"}}'
    head = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: %d\r\n\r\n"
    assert answered(head % len(error) + error).label == "503 overloaded"
    assert answered(head % 4 + b"oops").label == "503 plain text"
    assert answered(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n").label == "200, cut"
    with pytest.raises(asyncio.IncompleteReadError):
        answered(b"HTTP/1.1 200")


def test_the_ends_of_generations() -> None:
    events = event(token_ids=[1])
    ends = {
        "whole": Reply(200, "", b"{}", True),
        "error event": Reply(200, "", events + event(error={}), True),
        "cut": Reply(200, "", events, True),
        "503 engine_unavailable": Reply(503, "engine_unavailable", b"", True),
    }
    assert {label: how_ended(reply) for label, reply in ends.items()} == {label: label for label in ends}
    assert how_ended(Reply(200, "", events + b"data: [DONE]\n\n", True)) == "whole"
    assert how_ended(Reply(200, "", b"{", False)) == "cut"


def test_an_attacker_counts_what_it_cannot_reach(tmp_path: Path) -> None:
    outcome = Outcome()
    # Port 9 discards; nothing listens there.
    target = Target("127.0.0.1", 9, 0, tmp_path, tmp_path, ("127.0.1.1",), 1)
    assert asyncio.run(Sender(target).send([b"x"], outcome)) is None
    assert sum(outcome.counts.values()) == 1


def test_pipelined_requests_are_served_up_to_the_limit(tmp_path: Path) -> None:
    outcome = Outcome()
    settings = ServeSettings(store=tmp_path)
    with live_server(build_app(StubEngine(random_decoder()), AdapterStore(tmp_path), settings)) as url:
        port = int(url.rpartition(":")[2])
        target = Target("127.0.0.1", port, 0, tmp_path, tmp_path, ("127.0.1.1",), 20)
        asyncio.run(pipelined(target, 40, outcome))
    # One that is served, and those that may wait behind it.
    assert outcome.counts == {"200": 17, "closed": 1}


def test_the_names_of_cases_differ() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_readings_keep_the_greater_of_each() -> None:
    assert Reading(1, 5, 2) | Reading(3, 4, 2) == Reading(3, 5, 2)


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({}, True),
        ({"ratio": 2.1}, False),
        ({"ratio": None}, False),
        ({"wrong": 1}, False),
        ({"failures": {"x": 1}}, False),
    ],
)
def test_a_siege_is_held_when_nobody_noticed(changes: dict[str, Any], holds: bool) -> None:
    client = {"ratio": changes.get("ratio", 1.9), "siege": {"wrong": 0, "failures": {}} | changes}
    row = {"clients": {"stream": client}, "over_cap": False, "rss_start_mib": 1000.0, "rss_after_mib": 1049.0}
    assert held(row) == holds
    assert not held(row | {"rss_after_mib": 1051.0}) and not held(row | {"over_cap": True})


def test_attacks_and_clients_are_chosen_by_names_that_exist() -> None:
    app = typer.Typer()
    app.command()(main)
    for arguments, words in (
        (["--each", "5", "--only", "nothing"], "there is no attack 'nothing'"),
        (["--each", "5", "--client", "nobody"], "there is no client 'nobody'"),
        (["--only", "idle"], "--only needs --mixed or --each"),
        (["--mixed", "1", "--client", "classify"], "--client needs --each"),
        (["--mixed", "1", "--each", "5"], "two ways to run the attacks"),
    ):
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"})
        assert result.exit_code == 2 and words in result.output, result.output
    assert len(set(NAMES)) == len(PARTS)


def test_the_table_of_single_attacks_has_each_clients_ratio_and_the_memory() -> None:
    client = {"quiet": {"p95": 0.04}, "siege": {"p50": 0.03, "p95": 0.06}, "ratio": 1.5}
    memory = {"rss_start_mib": 1000.0, "rss_most_mib": 1060.5, "rss_after_mib": 1001.0}
    row = {"case": "half_bodies", "clients": {"classify": client}, "processor_share": 0.3} | memory
    output = io.StringIO()
    Console(file=output, width=200).print(report_each([row]))
    line = next(line for line in output.getvalue().splitlines() if "half_bodies" in line)
    assert line.replace("│", "").split() == ["half_bodies", "0.04", "0.03", "0.06", "1.5", "0.3", "+60.5", "+1.0"]
