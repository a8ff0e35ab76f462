"""Errors of the Python clients: they travel between processes whole."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from sera_serve.client import (
    AdapterNotFoundError,
    RateLimitError,
    SeraAPIError,
    SeraConnectionError,
    SeraError,
)

FIELDS = {
    "type": "some_error",
    "param": "adapter",
    "code": "some_code",
    "status": 429,
    "request_id": "req-1",
    "retry_after": 2.5,
}


def subclasses(kind: type[SeraError]) -> Iterator[type[SeraError]]:
    yield kind
    for subclass in kind.__subclasses__():
        yield from subclasses(subclass)


def made(kind: type[SeraError]) -> SeraError:
    if issubclass(kind, SeraAPIError):
        return kind("no", **FIELDS)
    return kind("no", sent=True) if issubclass(kind, SeraConnectionError) else kind("no")


def unpickled(error: SeraError, protocol: int) -> SeraError:
    found: SeraError = pickle.loads(pickle.dumps(error, protocol))  # noqa: S301 - the test's own
    return found


COPIES: dict[str, Callable[[SeraError], SeraError]] = {
    "pickle-0": lambda error: unpickled(error, 0),
    "pickle": lambda error: unpickled(error, pickle.HIGHEST_PROTOCOL),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("copied", list(COPIES.values()), ids=list(COPIES))
@pytest.mark.parametrize("kind", [*subclasses(SeraError)])
def test_a_copy_of_an_error_is_the_same(kind: type[SeraError], copied: Callable[[SeraError], SeraError]) -> None:
    error = made(kind)
    error.add_note("a note")
    found = copied(error)
    assert found is not error and type(found) is kind
    assert (str(found), found.args, vars(found)) == (str(error), error.args, vars(error))
    assert found.message == "no" and found.__notes__ == ["a note"]


def test_the_kinds_are_all_of_them() -> None:
    kinds = list(subclasses(SeraError))
    assert {SeraConnectionError, RateLimitError, AdapterNotFoundError} < set(kinds) and len(kinds) >= 16


def fail() -> None:
    raise made(RateLimitError)


def test_an_error_leaves_a_process_pool() -> None:
    # A spawned process: a fork of one with threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool, pytest.raises(RateLimitError) as caught:
        pool.submit(fail).result(60)
    assert {name: getattr(caught.value, name) for name in FIELDS} == FIELDS
