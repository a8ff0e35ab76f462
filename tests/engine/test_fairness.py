"""The fair order, step by step: no threads, no model."""

from __future__ import annotations

import random

import pytest

from sera_serve.engine.fair_queue import OUTPUT_WEIGHT, PROMPT_WEIGHT, FairQueue, Ticket


def take(queue: FairQueue[Ticket]) -> Ticket:
    ticket = queue.first()
    assert ticket is not None
    queue.take(ticket)
    return ticket


def fill(queue: FairQueue[Ticket], tenant: str, count: int, tokens: int = 10) -> list[Ticket]:
    tickets = [Ticket(tenant, tokens) for _ in range(count)]
    for ticket in tickets:
        queue.push(ticket)
    return tickets


def test_a_tenant_alone_is_served_in_the_order_it_came() -> None:
    queue = FairQueue[Ticket]()
    tickets = fill(queue, "a", 5)
    assert [take(queue) for _ in range(5)] == tickets
    assert queue.first() is None
    assert len(queue) == 0


def test_tenants_take_turns_however_many_they_send() -> None:
    queue = FairQueue[Ticket]()
    fill(queue, "flood", 100)
    fill(queue, "b", 3)
    fill(queue, "c", 3)
    served = [take(queue).tenant for _ in range(9)]
    assert all(served.count(tenant) == 3 for tenant in ("flood", "b", "c"))
    assert {take(queue).tenant for _ in range(97)} == {"flood"}


def test_service_is_by_tokens_and_by_weight() -> None:
    queue = FairQueue[Ticket]({"heavy": 3.0})
    fill(queue, "heavy", 900, tokens=10)
    fill(queue, "long", 300, tokens=40)
    fill(queue, "short", 900, tokens=5)
    tokens = {"heavy": 0, "long": 0, "short": 0}
    for _ in range(600):
        ticket = take(queue)
        tokens[ticket.tenant] += ticket.prompt_tokens
    assert tokens["heavy"] == pytest.approx(3 * tokens["short"], abs=2 * 40)
    assert tokens["long"] == pytest.approx(tokens["short"], abs=2 * 40)


def test_output_is_charged_as_it_comes() -> None:
    queue = FairQueue[Ticket]()
    fill(queue, "writes", 3)
    fill(queue, "reads", 30)
    assert take(queue).tenant == "writes"
    queue.charge_output("writes", 50)
    assert queue.counter("writes") == 10 * PROMPT_WEIGHT + 50 * OUTPUT_WEIGHT
    assert [take(queue).tenant for _ in range(11)] == ["reads"] * 11
    assert take(queue).tenant == "writes"


def test_idling_saves_up_no_claim() -> None:
    queue = FairQueue[Ticket]()
    fill(queue, "busy", 100)
    for _ in range(50):
        take(queue)
    fill(queue, "late", 50)
    assert queue.counter("late") == queue.counter("busy") == 500
    served = [take(queue).tenant for _ in range(20)]
    assert served.count("late") == served.count("busy") == 10


def test_what_a_tenant_was_served_beyond_others_is_not_forgotten_while_it_idles() -> None:
    queue = FairQueue[Ticket]()
    (first,) = fill(queue, "a", 1, tokens=1000)
    fill(queue, "b", 200)
    queue.take(first)
    fill(queue, "a", 1)
    assert [take(queue).tenant for _ in range(100)] == ["b"] * 100


def test_an_empty_queue_remembers_the_level_of_the_last_that_left() -> None:
    queue = FairQueue[Ticket]()
    fill(queue, "a", 1, tokens=100)
    take(queue)
    queue.charge_output("a", 20)
    fill(queue, "new", 1)
    assert queue.counter("new") == queue.counter("a") == 140


def test_priority_is_within_a_tenant() -> None:
    queue = FairQueue[Ticket]()
    low, normal, high = Ticket("a", 10), Ticket("a", 10, priority=1), Ticket("a", 10, priority=2)
    for ticket in (low, normal, high):
        queue.push(ticket)
    fill(queue, "b", 3)
    served = [take(queue) for _ in range(6)]
    assert [ticket for ticket in served if ticket.tenant == "a"] == [high, normal, low]
    assert [ticket.tenant for ticket in served].count("b") == 3
    assert "b" in {ticket.tenant for ticket in served[:2]}, "the others' turn comes all the same"


def test_a_ticket_set_aside_holds_nobody_up_and_keeps_its_place() -> None:
    queue = FairQueue[Ticket]()
    first, second, third = fill(queue, "a", 3)
    (other,) = fill(queue, "b", 1)
    queue.set_aside(first)
    assert queue.first() is second
    queue.set_aside(second)
    queue.set_aside(third)
    assert queue.first() is other
    queue.set_aside(other)
    assert queue.first() is None and len(queue) == 4
    for ticket in (third, other, first):
        queue.put_back(ticket)
    served = [take(queue) for _ in range(3)]
    assert [ticket for ticket in served if ticket.tenant == "a"] == [first, third]
    assert queue.last_of("a") is second
    queue.remove(second)
    assert len(queue) == 0 and queue.last_of("a") is None


def test_a_tenant_whose_tickets_are_all_aside_still_holds_the_level() -> None:
    queue = FairQueue[Ticket]()
    (waits,) = fill(queue, "loading", 1)
    queue.set_aside(waits)
    fill(queue, "busy", 50)
    for _ in range(50):
        take(queue)
    fill(queue, "busy", 10)
    queue.put_back(waits)
    assert queue.first() is waits


def test_many_tenants_that_come_and_go_leave_little_behind() -> None:
    queue = FairQueue[Ticket]()
    for number in range(20_000):
        fill(queue, f"t{number}", 1)
        take(queue)
    assert len(queue._counters) < 5000
    assert len(queue._tenants._heap) < 5000 and len(queue._on_offer._heap) < 5000


def test_the_services_of_backlogged_tenants_stay_within_the_bound() -> None:
    """A hostile mix: floods, long prompts, long answers, loads, withdrawals, tenants that come and go, priorities."""
    chance = random.Random(7)
    longest, places, most = 60, 8, 40
    bound = 2 * max(PROMPT_WEIGHT * longest, OUTPUT_WEIGHT * places * most)
    queue = FairQueue[Ticket]({"heavy": 2.0})
    always = {"heavy": 2.0, "long": 1.0, "plain": 1.0, "flood": 1.0}
    served = dict.fromkeys(always, 0.0)
    running: list[tuple[Ticket, int]] = []
    aside: list[Ticket] = []
    came: dict[Ticket, int] = {}
    longest_wait = step = 0

    def push(tenant: str, tokens: int) -> None:
        ticket = Ticket(tenant, tokens, priority=chance.randrange(3) if tenant == "flood" else 0)
        queue.push(ticket)
        came[ticket] = step

    for step in range(6000):
        for tenant in always:
            # One more on offer than may be taken in a step: these are backlogged throughout.
            while sum(t.tenant == tenant and t not in aside for t in queue.tickets()) < places + 1:
                push(tenant, longest if tenant == "long" else chance.randint(1, longest))
        if chance.random() < 0.03:
            push(f"guest{chance.randrange(40)}", chance.randint(1, longest))
        if aside and chance.random() < 0.3:
            loaded = aside.pop(chance.randrange(len(aside)))
            queue.put_back(loaded)
            came[loaded] = step
        while len(running) < places and (ticket := queue.first()) is not None:
            if ticket.tenant.startswith("guest") and chance.random() < 0.3:
                queue.set_aside(ticket)
                aside.append(ticket)
                continue
            queue.take(ticket)
            if ticket.tenant in served:
                served[ticket.tenant] += PROMPT_WEIGHT * ticket.prompt_tokens / always[ticket.tenant]
            else:
                longest_wait = max(longest_wait, step - came.pop(ticket))
            running.append((ticket, most if ticket.tenant == "long" else chance.randint(1, most)))
        for index, (ticket, left) in enumerate(running):
            queue.charge_output(ticket.tenant, 1)
            if ticket.tenant in served:
                served[ticket.tenant] += OUTPUT_WEIGHT / always[ticket.tenant]
            running[index] = (ticket, left - 1)
        running = [(ticket, left) for ticket, left in running if left]
        assert max(served.values()) - min(served.values()) <= bound, step
    assert min(served.values()) > 5 * bound
    # Each backlogged tenant may go before a guest once, and a place comes free within `most` steps.
    assert 0 < longest_wait <= 2 * most
