"""Limits on the requests in flight, and the rows of a batch, by a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sera_serve.engine.admission import AdmissionController
from sera_serve.engine.request import Principal, Request
from sera_serve.errors import Overloaded, TenantOverloaded


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def nobody_waits(tenant: str) -> bool:
    return False


def admit(controller: AdmissionController, tenant: str, shed: Callable[[str], bool] = nobody_waits) -> Request:
    request = Request(principal=Principal(tenant))
    controller.admit(request, shed)
    return request


def test_a_tenant_with_too_many_is_told_429_and_others_come_in() -> None:
    controller = AdmissionController(limit=10, tenant_limit=3, clock=Clock())
    requests = [admit(controller, "flood") for _ in range(3)]
    with pytest.raises(TenantOverloaded) as refusal:
        admit(controller, "flood")
    assert (refusal.value.status, refusal.value.code) == (429, "tenant_overloaded")
    admit(controller, "other")
    controller.release(requests[0])
    controller.release(requests[0])
    assert controller.in_flight() == 3
    admit(controller, "flood")


def test_a_full_server_refuses_with_503() -> None:
    controller = AdmissionController(limit=4, tenant_limit=10, clock=Clock())
    for tenant in ("a", "a", "b", "b"):
        admit(controller, tenant)
    for tenant in ("a", "b", "c"):
        with pytest.raises(Overloaded) as refusal:
            admit(controller, tenant)
        assert type(refusal.value) is Overloaded and refusal.value.status == 503
    assert controller.in_flight() == 4


def test_a_full_server_sheds_one_of_the_tenant_with_the_most() -> None:
    controller = AdmissionController(limit=6, tenant_limit=10, clock=Clock())
    waiting: dict[str, list[Request]] = {}

    def shed(tenant: str) -> bool:
        controller.release(waiting[tenant].pop())
        return True

    for tenant in ["flood"] * 5 + ["b"]:
        waiting.setdefault(tenant, []).append(admit(controller, tenant, shed))
    for tenant in ("c", "d", "b"):
        waiting.setdefault(tenant, []).append(admit(controller, tenant, shed))
        assert controller.in_flight() == 6
    assert {tenant: len(requests) for tenant, requests in waiting.items()} == {"flood": 2, "b": 2, "c": 1, "d": 1}
    # Nobody has two more than these: if they shed each other in turn, no request would be served.
    for tenant in ("c", "flood"):
        with pytest.raises(Overloaded, match="6 requests in flight"):
            admit(controller, tenant, shed)


def test_retry_after_is_what_the_present_requests_will_take() -> None:
    clock = Clock()
    controller = AdmissionController(limit=40, tenant_limit=20, clock=clock)

    def retry_after(tenant: str) -> int:
        with pytest.raises(Overloaded) as refusal:
            admit(controller, tenant)
        return refusal.value.retry_after

    def serve(every: float, times: int) -> None:
        for turn in range(times):
            clock.now += every
            controller.release(requests[turn % 40], served=True)
            requests[turn % 40] = admit(controller, requests[turn % 40].tenant)

    requests = [admit(controller, tenant) for tenant in ["a", "b"] * 20]
    assert retry_after("a") == 1, "nothing is known yet"
    serve(every=0.25, times=200)
    assert retry_after("c") == 10
    assert retry_after("a") == 10, "a half of the rate for a half of the requests"
    # A quiet hour tells nothing about the rate.
    for request in requests:
        controller.release(request)
    clock.now += 3600
    requests = [admit(controller, tenant) for tenant in ["a", "b"] * 20]
    serve(every=0.25, times=1)
    assert retry_after("c") == 10
    # Nor is anybody sent away for longer than a minute.
    serve(every=100, times=20)
    assert retry_after("c") == 60
