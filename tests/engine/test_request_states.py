"""The states of a request: which edges exist, and that a request ends once."""

from __future__ import annotations

import re
from itertools import pairwise, product

import pytest

from sera_serve.engine import request as request_module
from sera_serve.engine.request import (
    BASE_PRINCIPAL,
    TRANSITIONS,
    FinishReason,
    GenerationRequest,
    IllegalTransition,
    RequestState,
)

EDGES = [pair for pair in product(RequestState, RequestState) if pair[1] in TRANSITIONS[pair[0]]]
PAIRS = list(product(RequestState, RequestState))


def path_to(state: RequestState) -> list[RequestState]:
    """The states on a shortest way from WAITING, the first state of every request."""
    paths = [[RequestState.WAITING]]
    for path in paths:
        if path[-1] is state:
            return path
        paths += [[*path, target] for target in TRANSITIONS[path[-1]] if target not in path]
    raise AssertionError(f"no request can become {state.name}")


def request_in(state: RequestState) -> GenerationRequest:
    request = GenerationRequest(principal=BASE_PRINCIPAL, id="r")
    for source, target in pairwise(path_to(state)):
        assert request.state is source
        request.move(target)
    assert request.state is state
    return request


@pytest.mark.parametrize(("source", "target"), EDGES, ids=lambda state: state.name)
def test_every_edge_can_be_walked(source: RequestState, target: RequestState) -> None:
    request = request_in(source)
    if target is RequestState.FINISHED:
        error = ValueError("why")
        request.finish(FinishReason.FAILED, error)
        assert (request.finish_reason, request.error) == (FinishReason.FAILED, error)
    else:
        request.move(target)
        assert request.finish_reason is None
    assert request.state is target


@pytest.mark.parametrize(
    ("source", "target"), [pair for pair in PAIRS if pair not in EDGES], ids=lambda state: state.name
)
def test_no_other_edge_exists(source: RequestState, target: RequestState) -> None:
    request = request_in(source)
    with pytest.raises(IllegalTransition, match=f"'r' cannot go from {source.name} to {target.name}"):
        request.move(target)
    assert request.state is source, "a refused move changes nothing"


@pytest.mark.parametrize("reason", FinishReason)
@pytest.mark.parametrize("state", [state for state in RequestState if state is not RequestState.FINISHED])
def test_a_request_finishes_once(state: RequestState, reason: FinishReason) -> None:
    request = request_in(state)
    request.finish(reason)
    assert request.is_finished and not request.is_queued
    for other in FinishReason:
        with pytest.raises(IllegalTransition, match="finished already"):
            request.finish(other, ValueError("late"))
    assert (request.finish_reason, request.error) == (reason, None), "the first end counts"


def test_the_table_names_every_state_and_only_an_end_is_final() -> None:
    assert set(TRANSITIONS) == set(RequestState)
    assert [state for state, targets in TRANSITIONS.items() if not targets] == [RequestState.FINISHED]
    queued = {state for state in RequestState if request_in(state).is_queued}
    assert queued == {RequestState.WAITING, RequestState.LOADING, RequestState.PREEMPTED}


def test_the_drawing_is_the_table() -> None:
    """Lines of the docstring such as `WAITING ---> LOADING ---> WAITING   why`; `any` is every state but the last."""
    drawn = set()
    for line in (request_module.__doc__ or "").splitlines():
        if re.match(r" +(any|[A-Z]+) -+>", line):
            names = re.findall(r"\b(any|[A-Z]{5,})\b(?= -+>|  |$)", line)
            for source, target in pairwise(names):
                sources = [s for s in RequestState if TRANSITIONS[s]] if source == "any" else [RequestState[source]]
                drawn |= {(one, RequestState[target]) for one in sources}
    assert drawn == set(EDGES)
