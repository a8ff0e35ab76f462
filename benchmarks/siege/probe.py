"""Healthy clients in processes of their own: what each asked, when each answer came, and whether it was right."""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Any

# Longest wait for one answer: a server that stalls for longer counts as this.
PATIENCE_S = 90.0
_PERIOD_S = 0.02
Address = tuple[str, int]
Answer = Any


@dataclass(frozen=True)
class Sample:
    """One request; times are of `time.monotonic`, which all processes of a machine share.

    Attributes:
        failure: What came in place of an answer; empty where it is an answer.
        answer: Token ids, or probabilities.
    """

    begun: float
    ended: float
    failure: str = ""
    answer: Answer = None


@dataclass(frozen=True)
class Question:
    """A request that is asked again and again; its answer must always be the same."""

    path: str
    body: dict[str, Any] | None = None


HEALTH = Question("/healthz")
_BODY = {"prompt": "The little cat found a map", "max_new_tokens": 16, "temperature": 0.8, "seed": 7}
GENERATE = Question("/v1/generate", _BODY | {"adapter": "siege/writer"})
OTHER = Question("/v1/generate", _BODY | {"adapter": "siege/other"})
STREAM = Question("/v1/generate", _BODY | {"adapter": "siege/writer", "max_new_tokens": 32, "stream": True})
CLASSIFY = Question("/v1/classify", {"adapter": "siege/sorter", "inputs": ["My parcel is late."]})


class Watcher:
    """A client in a process of its own, from a loopback address of its own; a question at a time until `stop`."""

    def __init__(self, address: Address, source: str, question: Question, pause: float = 0.005) -> None:
        """Start at once; between an answer and the next request are `pause` seconds, and 20 ms between requests."""
        context = multiprocessing.get_context("spawn")
        self._end = context.Event()
        self._answered = context.Value("d", 0.0)
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_watch, args=(address, source, question, pause, self._end, self._answered, sender), daemon=True
        )
        self._process.start()
        sender.close()

    def answered_since(self, moment: float) -> bool:
        """Whether a request that was begun after a moment has had its answer."""
        return bool(self._answered.value > moment)

    def stop(self) -> list[Sample]:
        """All samples. The server must answer or be gone: the last request is waited for."""
        self._end.set()
        samples: list[Sample] = self._receiver.recv()
        self._process.join()
        return samples


def _watch(
    address: Address,
    source: str,
    question: Question,
    pause: float,
    end: Event,
    answered: Any,
    sender: Connection,
) -> None:
    samples = []
    # The health is asked over one connection, as by an operator's prober; the rest as by ever new clients.
    ask = _asker(address, source, question)
    while not end.is_set():
        begun = time.monotonic()
        failure, answer = ask()
        ended = time.monotonic()
        samples.append(Sample(begun, ended, failure, answer))
        if not failure:
            answered.value = begun
        time.sleep(max(pause, _PERIOD_S - (ended - begun)))
    sender.send(samples)


def _asker(address: Address, source: str, question: Question) -> Callable[[], tuple[str, Answer]]:
    connection = HTTPConnection(*address, timeout=PATIENCE_S, source_address=(source, 0))
    body = None if question.body is None else json.dumps(question.body)
    headers = {} if body is None else {"Content-Type": "application/json", "Connection": "close"}

    def ask() -> tuple[str, Answer]:
        try:
            connection.request("GET" if body is None else "POST", question.path, body, headers)
            response = connection.getresponse()
            content = response.read()
        except (OSError, HTTPException) as error:
            connection.close()
            return type(error).__name__, None
        try:
            if response.status == 200:
                return "", read_answer(question, content)
            return f"{response.status} {json.loads(content)['error']['code']}", None
        except (ValueError, KeyError, TypeError):
            return f"{response.status} unreadable", None

    return ask


def read_answer(question: Question, content: bytes) -> Answer:
    """What must be the same in every answer to a question.

    Raises:
        ValueError, KeyError: The content is no whole answer.
    """
    if question.body is None:
        return None
    if question.body.get("stream"):
        *events, done, end = [part.removeprefix(b"data: ") for part in content.split(b"\n\n")]
        if done != b"[DONE]" or end:
            raise ValueError("the stream was cut")
        return [token for event in events for token in json.loads(event)["token_ids"]]
    value = json.loads(content)
    return value["token_ids"] if "token_ids" in value else value["results"][0]["probabilities"]


def same(one: Answer, other: Answer) -> bool:
    """Whether two answers are one: token ids exactly, probabilities to rounding."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(math.isclose(one[key], other[key], abs_tol=1e-3) for key in one)
    return bool(one == other)


def longest_pause(samples: Sequence[Sample], since: float) -> float:
    """Seconds of the longest time from an unanswered request to the next answer, of requests that ended after `since`.

    Where none came any more, until the last sample ended.
    """
    longest, waiting = 0.0, None
    for sample in samples:
        if sample.ended < since:
            continue
        waiting = sample.begun if waiting is None else waiting
        longest = max(longest, sample.ended - waiting)
        if not sample.failure:
            waiting = None
    return round(longest, 3)


@dataclass(frozen=True)
class Figures:
    """What one client saw within some time, in seconds."""

    p50: float | None
    p95: float | None
    longest: float | None
    answers: int
    failures: dict[str, int]
    wrong: int


def figures(samples: Sequence[Sample], start: float, end: float, reference: Answer) -> Figures:
    """Of requests that were under way between two moments; a request counts with its whole time."""
    chosen = [sample for sample in samples if sample.ended > start and sample.begun < end]
    answered = [sample for sample in chosen if not sample.failure]
    times = sorted(sample.ended - sample.begun for sample in answered)
    return Figures(
        p50=round(statistics.median(times), 4) if times else None,
        p95=round(times[math.ceil(0.95 * len(times)) - 1], 4) if times else None,
        longest=longest_pause([s for s in samples if s.begun < end], start) if chosen else None,
        answers=len(answered),
        failures=dict(Counter(sample.failure for sample in chosen if sample.failure)),
        wrong=sum(not same(sample.answer, reference) for sample in answered),
    )
