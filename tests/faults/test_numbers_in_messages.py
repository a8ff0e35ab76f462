"""Refusals at a limit of one: their messages speak of one thing, and not of "1 things"."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.exceptions import RequestValidationError

from adapters_store import Held
from sera_serve.access import AccessDatabase, Quota, Quotas, Rates
from sera_serve.access.holdings import _excess
from sera_serve.engine.admission import AdmissionController
from sera_serve.engine.request import Principal, Request
from sera_serve.server.connections import ConnectionCounts
from sera_serve.server.errors import validation_problem
from sera_serve.server.native.uploads import UploadSlots


def admitted_twice(limit: int = 10, tenant_limit: int = 10, own_limit: int | None = None) -> None:
    controller = AdmissionController(limit, tenant_limit)
    for _ in range(2):
        controller.admit(Request(principal=Principal("acme", max_in_flight=own_limit)), lambda tenant: False)


def uploaded_twice(slots: UploadSlots) -> None:
    with slots.take("acme"), slots.take("acme"):
        pass


def asked_twice(quota: Quota) -> None:
    rates = Rates()
    rates.admit("acme", quota)
    rates.charge_tokens("acme", quota, 2)
    rates.admit("acme", quota)


def second_job(folder: Path) -> None:
    Quotas(AccessDatabase(folder), {"acme": {"training_jobs": 1}}).check_training_jobs("acme", 1)


def second_adapter(folder: Path) -> None:
    refused = _excess("acme", Quota(adapters=1), Held(1, 5), Held(1, 5))
    assert refused is not None
    raise refused


def second_connection(counts: ConnectionCounts) -> None:
    assert counts.add("10.0.0.9") is None
    raise ValueError(counts.add("10.0.0.9"))


def wrong_type(folder: Path) -> None:
    error = {"type": "string_type", "loc": ("body", "prompt"), "msg": "Input should be a string", "input": ["a"]}
    raise ValueError(validation_problem(RequestValidationError([error]))[0])


REFUSED: dict[str, Callable[[Path], None]] = {
    "server": lambda folder: admitted_twice(limit=1),
    "tenant": lambda folder: admitted_twice(tenant_limit=1),
    "quota": lambda folder: admitted_twice(own_limit=1),
    "uploads": lambda folder: uploaded_twice(UploadSlots(1)),
    "uploads of a tenant": lambda folder: uploaded_twice(UploadSlots(2)),
    "requests a minute": lambda folder: asked_twice(Quota(requests_per_minute=1)),
    "tokens a minute": lambda folder: asked_twice(Quota(tokens_per_minute=1)),
    "jobs": second_job,
    "adapters": second_adapter,
    "connections": lambda folder: second_connection(ConnectionCounts(1, 10)),
    "connections of an address": lambda folder: second_connection(ConnectionCounts(10, 1)),
    "list": wrong_type,
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_limit_of_one_speaks_of_one_thing(what: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"\b1 ") as refused:
        REFUSED[what](tmp_path)
    number = re.search(r"\b1 (unfinished training |open )?(\w+)", str(refused.value))
    assert number is not None and not number[2].endswith("s"), refused.value
