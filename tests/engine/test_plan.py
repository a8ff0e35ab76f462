"""The planner alone: random arrivals, cancels and ends on a small pool, without a model and without threads."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from sera_serve.engine.fair_queue import OUTPUT_WEIGHT, PROMPT_WEIGHT
from sera_serve.engine.loop.pages import PAGE_SIZE
from sera_serve.engine.request import GenerateParams, RequestState
from support.plan_world import ask, world


@pytest.mark.parametrize("seed", range(50))
def test_random_arrivals_cancels_and_ends(seed: int) -> None:
    dice = random.Random(seed)
    pages = dice.randint(4, 16)
    longest = pages * PAGE_SIZE
    bench = world(
        pages,
        budget=dice.randint(2, 160),
        rows=dice.randint(1, 12),
        threshold=dice.choice([None, None, dice.randint(20, 90)]),
        most_static=dice.choice([0, dice.randint(2, 120)]),
        still_loading=lambda request: request.adapter is None and dice.random() < 0.1,
    )
    heads = [[dice.randrange(9) for _ in range(dice.randint(1, 100))] for _ in range(3)]
    born: dict[str, int] = {}
    for step in range(400):
        while len(born) < 60 and dice.random() < 0.25:
            tokens = dice.choice(heads)[: dice.randint(1, 100)] + [
                dice.randrange(9) for _ in range(dice.randint(0, 40))
            ]
            tokens = tokens[: longest - 1]
            request = ask(
                f"r{len(born)}",
                tokens,
                min(dice.randint(1, 60), longest - len(tokens)),
                tenant := dice.choice("abc"),
                f"{tenant}/{dice.choice('xy')}" if dice.random() < 0.8 else None,
            )
            request.priority = dice.choice([0, 0, 1])
            born[request.id] = step
            bench.add(request)
        if bench.live and dice.random() < 0.05:
            bench.cancel(dice.choice(bench.live))
        bench.step(lambda: dice.randrange(9))
        bench.waiting.arrive()
    # No starvation: what is left ends in a number of steps that its tokens bound, recomputation included.
    patience = 40 * sum(request.limit for request in bench.live) + 200
    while bench.live:
        assert patience, f"{len(bench.live)} requests never end"
        patience -= 1
        bench.step(lambda: dice.randrange(9))
        bench.waiting.arrive()
    pool = bench.planner.pages
    assert pool.available() == pool.count and not bench.planner.running and not len(bench.waiting.queue)
    for request in bench.finished:
        assert bench.waiting.charged[request.id] == len(request.tokens), "a token was charged twice, or not at all"


@pytest.mark.parametrize("seed", range(30))
def test_steps_planned_ahead_of_their_tokens(seed: int) -> None:
    """As a device that is always one step behind: newcomers enter beside decodes whose tokens are not known."""
    dice = random.Random(seed)
    pages = dice.randint(4, 30)
    bench = world(
        pages,
        budget=dice.randint(8, 160),
        rows=dice.randint(1, 12),
        threshold=dice.choice([None, None, dice.randint(20, 90)]),
        still_loading=lambda request: dice.random() < 0.1,
    )
    most = dice.randint(1, 90)
    planned = None
    joined = ahead = number = 0
    while number < 60 or bench.live:
        if number < 60 and dice.random() < 0.3:
            tokens = [dice.randrange(2) for _ in range(dice.randint(1, min(100, pages * PAGE_SIZE - 40)))]
            bench.add(ask(f"r{number}", tokens, dice.randint(1, 40), tenant := dice.choice("abc"), f"{tenant}/x"))
            number += 1
        plan = planned or bench.plan()
        if plan is not None:
            planned = None
            if all(request.computed + count == len(request.tokens) for request, count in plan.chunks):
                planned, entered = bench.plan_ahead(plan, lambda ahead: not ahead.chunks or ahead.tokens <= most)
                ahead += planned is not None
                joined += len(entered)
            bench.do(plan, lambda: dice.randrange(9))
        bench.waiting.arrive()
    assert ahead > 10 and (joined > 15 or seed not in (1, 9, 11)), "nobody entered a step planned ahead"
    assert bench.planner.pages.available() == pages and not bench.planner.running
    assert all(bench.waiting.charged[request.id] == len(request.tokens) for request in bench.finished)


def test_steps_are_planned_ahead_while_a_newcomer_waits_for_pages() -> None:
    bench = world(6, budget=300, rows=8)
    prompt = 2 * PAGE_SIZE + 1
    for number, new in enumerate((20, 24, 3)):
        bench.add(ask(f"r{number}", [number] * prompt, new, "a", "a/x"))
    third = bench.live[2]
    planned = None
    ahead: list[bool] = []
    while third.row < 0:
        plan = planned or bench.plan()
        assert plan is not None
        planned, _ = bench.plan_ahead(plan, lambda ahead: True)
        ahead.append(planned is not None)
        bench.do(plan)
    # It is let try once meanwhile, and enters beside the second request once the first one has ended.
    assert ahead.index(False) == 16 and ahead.count(False) == 1 and len(ahead) > 18, ahead
    assert [request.id for request in bench.finished] == ["r0"]


def test_prompts_that_come_at_once_are_parted_into_static_steps() -> None:
    bench = world(400, budget=2048, rows=64, most_static=512)
    for number in range(64):
        bench.add(ask(f"r{number}", [number] * 40, 8))
    plans = [bench.step() for _ in range(6)]
    assert all(plan is not None and plan.tokens <= 512 for plan in plans)
    assert [len(plan.entered) for plan in plans if plan is not None] == [12, 12, 12, 11, 11, 6]


def test_a_long_prompt_waits_for_one_static_step_at_most() -> None:
    bench = world(400, budget=2048, rows=64, most_static=512)
    early, long = bench.add(ask("early", [1] * 40)), bench.add(ask("long", [2] * 3000))
    late = [bench.add(ask(f"late{number}", [number] * 40, 50)) for number in range(3, 30)]
    first, second, third = bench.step(), bench.step(), bench.step()
    assert first is not None and first.chunks == [(early, 40)]
    assert second is not None and second.chunks == [(long, 2047)] and second.decodes == [early]
    # What runs packed anyway takes as many tokens as a step may have.
    assert third is not None and [request for request, _ in third.chunks] == [long, *late[:27]]


def test_tokens_in_the_prefix_cache_do_not_count_for_a_static_step() -> None:
    bench = world(400, budget=2048, rows=64, most_static=512)
    head = list(range(900))
    bench.add(ask("first", head, 2, prefix_key="a/x"))
    while bench.live:
        bench.step()
    many = [bench.add(ask(f"r{number}", [*head, number], 3, prefix_key="a/x")) for number in range(60)]
    plan = bench.plan()
    # Of 901 tokens, 896 are in full pages.
    assert plan is not None and len(plan.entered) == 60 and plan.tokens == 60 * 5
    bench.do(plan)
    ahead = bench.add(ask("ahead", [*head, 99], 3, prefix_key="a/x"))
    plan = bench.plan()
    assert plan is not None and plan.entered == [ahead] and plan.decodes == many
    bench.do(plan)
    bench.add(ask("short", [7], 3))
    plan = bench.plan()
    late = bench.add(ask("late", [*head, 98], 3, prefix_key="a/x"))
    assert plan is not None
    joined, entered = bench.plan_ahead(plan, bench.runs_static)
    assert joined is not None and entered == [late]


def test_a_row_that_was_given_up_for_a_prompt_is_its_own_though_the_step_is_no_longer_static() -> None:
    bench = world(400, budget=100, rows=2, most_static=60)
    other = ask("other", [2], 200)
    other.priority = -1
    bench.add(other)
    bench.step()
    halves = bench.add(ask("halves", [1] * 149, 200))
    bench.step()
    newcomer = bench.add(ask("new", [3] * 30, 9, tenant="b"))
    plan = bench.step()
    assert plan is not None and plan.chunks == [(halves, 50), (newcomer, 30)]
    assert other.state is RequestState.PREEMPTED


def test_the_random_worlds_are_wild_enough() -> None:
    """Preemption, prefix hits, chunks beside decodes: all of them happen in the world that the test above looks at."""
    dice = random.Random(1)
    bench = world(6, budget=40, rows=8)
    preempted = hits = mixed = 0
    head = list(range(70))
    for number in range(30):
        bench.add(ask(f"r{number}", head[: dice.randint(40, 70)], 50, "ab"[number % 2], f"{'ab'[number % 2]}/x"))
    while bench.live:
        plan = bench.step()
        preempted += len(bench.waiting.preempted)
        mixed += plan is not None and bool(plan.decodes) and bool(plan.chunks)
    hits = sum(request.cached_tokens > 0 for request in bench.finished)
    assert preempted > 3 and hits > 3 and mixed > 3


def test_rows_change_hands_in_random_worlds() -> None:
    dice = random.Random(2)
    bench = world(40, rows=6)
    for number in range(40):
        bench.add(ask(f"r{number}", [dice.randrange(9)] * dice.randint(1, 30), dice.randint(1, 40), "a"))
        if number % 3 == 0:
            bench.add(ask(f"s{number}", [dice.randrange(9)] * dice.randint(1, 30), dice.randint(1, 10), "b"))
        bench.step(lambda: dice.randrange(9))
    while bench.live:
        bench.step(lambda: dice.randrange(9))
    assert bench.waiting.yielded > 3


def test_a_tenant_below_its_share_gets_pages_that_others_would_grow_into() -> None:
    bench = world(64, rows=32, budget=128)
    many = [bench.add(ask(f"many{number}", [number] * 8, 200)) for number in range(60)]
    waits: list[int] = []
    for number in range(40):
        other = bench.add(ask(f"other{number}", [50, number], 6, tenant="b"))
        begun = bench.waiting.steps
        while not other.is_finished:
            bench.step()
            assert other.state is not RequestState.PREEMPTED, "it was put back with less than its share"
            if other.generated == 1:
                waits.append(bench.waiting.steps - begun)
    assert any(request.state is RequestState.PREEMPTED for request in many), "there were pages for all"
    assert max(waits) <= 2 and len(waits) == 40


def test_as_few_requests_yield_pages_to_a_tenant_below_its_share_as_are_enough() -> None:
    bench = world(6, budget=128)
    many = [bench.add(ask(f"many{number}", [number] * 40, 30)) for number in range(3)]
    bench.step()
    other = bench.add(ask("other", [50] * 60, 3, tenant="b"))
    while other not in bench.planner.running:
        bench.step()
    assert bench.waiting.preempted == many[2:]


def test_the_first_in_the_order_keeps_its_pages_from_a_tenant_below_its_share() -> None:
    bench = world(32, rows=8, budget=64)
    long = bench.add(ask("long", [1] * 900, 100))
    for number in range(4):
        bench.add(ask(f"short{number}", [2] * 200, 30, tenant="b"))
    bench.waiting.queue.charge_output("b", 10_000)
    while not long.is_finished:
        bench.step()
    assert long not in bench.waiting.preempted and bench.waiting.charged["long"] == 1000
    while bench.live:
        bench.step()


def test_a_tenant_below_its_share_gets_a_row_of_a_full_batch() -> None:
    bench = world(64, rows=8)
    many = [bench.add(ask(f"many{number}", [number], 100)) for number in range(20)]
    bench.step()
    other = bench.add(ask("other", [50], 5, tenant="b"))
    bench.step()
    assert other.state is RequestState.RUNNING and len(other.tokens) == 2
    assert sum(request.state is RequestState.RUNNING for request in many) == 7
    assert many[7].state is RequestState.PREEMPTED, "the last of the order yields"
    for number in range(6):
        bench.add(ask(f"more{number}", [60 + number], 100, tenant="b"))
    for _ in range(20):
        bench.step()
    assert sum(request.tenant == "b" for request in bench.planner.running) == 4, "no more than an equal share"
    assert bench.waiting.yielded == 4


def test_a_row_that_was_given_up_is_not_taken_back() -> None:
    bench = world(64, rows=4, still_loading=lambda request: request.id == "cold")
    # It keeps its tenant in the order, so that what the tenant has not used of its turn is not lost.
    bench.add(ask("cold", [9] * 8, 50))
    for number in range(4):
        bench.add(ask(f"many{number}", list(range(100 * number, 100 * number + 20)), 200))
    bench.step()
    bench.waiting.queue.charge_output("b", 400)
    other = bench.add(ask("other", [7] * 10, 50, tenant="b"))
    bench.step()
    assert bench.waiting.queue.counter("b") > bench.waiting.queue.counter("a"), "the row is taken out of the order"
    assert other.state is RequestState.RUNNING
    for _ in range(40):
        bench.step()
    assert bench.waiting.yielded == 1 and other.state is RequestState.RUNNING


def test_no_row_is_yielded_to_a_request_whose_adapter_is_not_there() -> None:
    bench = world(64, rows=8, still_loading=lambda request: request.id == "cold")
    many = [bench.add(ask(f"many{number}", [number], 100)) for number in range(8)]
    bench.step()
    cold, warm = (bench.add(ask(name, [50], 5, tenant="b")) for name in ("cold", "warm"))
    bench.step()
    assert cold.state is RequestState.LOADING and warm.state is RequestState.RUNNING
    assert sum(request.state is RequestState.RUNNING for request in many) == 7
    bench.waiting.add(other := ask("cold", [50], 5, tenant="c"))
    bench.step()
    assert other.state is RequestState.LOADING and not bench.waiting.preempted


def test_rows_are_shared_by_weight() -> None:
    bench = world(64, rows=8)
    bench.waiting.queue.set_weights({"a": 3.0})
    for number in range(20):
        bench.add(ask(f"many{number}", [number], 100))
    bench.step()
    for number in range(6):
        bench.add(ask(f"other{number}", [60 + number], 100, tenant="b"))
    for _ in range(8):
        bench.step()
    assert Counter(request.tenant for request in bench.planner.running) == {"a": 6, "b": 2}


def test_one_tenant_alone_keeps_its_rows() -> None:
    bench = world(64, rows=4)
    for number in range(20):
        bench.add(ask(f"r{number}", [number], 30))
    for _ in range(20):
        bench.step()
        assert not bench.waiting.preempted


def test_a_request_without_room_waits_and_those_that_run_go_on() -> None:
    bench = world(4)
    first = bench.add(ask("first", [1] * 33, 40))
    bench.step()
    second = bench.add(ask("second", [2] * 65, 10))
    for _ in range(30):
        bench.step()
    assert second.state is RequestState.WAITING and len(first.tokens) == 33 + 31
    while not first.is_finished:
        bench.step()
    bench.step()
    assert second.state is RequestState.RUNNING


@pytest.mark.parametrize(("running", "left", "enters"), [(3, 1, True), (4, 1, False), (4, 2, True), (8, 2, False)])
def test_a_newcomer_leaves_a_page_for_every_fourth_that_runs(running: int, left: int, enters: bool) -> None:
    bench = world(running + left, rows=16)
    for number in range(running):
        bench.add(ask(f"r{number}", [1], 20))
        bench.step()
    newcomer = bench.add(ask("new", [1], 5))
    bench.step()
    assert (newcomer.state is RequestState.RUNNING) == enters


@pytest.mark.parametrize(("left", "enters"), [(4, True), (3, False)])
def test_a_preempted_request_comes_back_where_a_page_is_left_for_each(left: int, enters: bool) -> None:
    """It needs one page; three others run."""
    bench = world(3 + left, rows=16)
    preempted = ask("preempted", [1] * 5, 9)
    preempted.started_at = 0.0
    preempted.move(RequestState.RUNNING)
    preempted.move(RequestState.PREEMPTED)
    for number in range(3):
        bench.add(ask(f"r{number}", [1], 20))
    bench.step()
    bench.add(preempted)
    bench.step()
    assert (preempted.state is RequestState.RUNNING) == enters
    assert preempted.cached_tokens == 0, "hits are counted when a request first runs"
    while bench.live:
        bench.step()
    assert bench.waiting.charged["preempted"] == 9, "its prompt is not charged again"


def test_pages_are_taken_from_the_request_with_the_lowest_claim_and_its_stream_goes_on() -> None:
    bench = world(4)
    for tenant in "ab":
        bench.add(ask(tenant, [1] * 20, 100, tenant))
    bench.waiting.queue.charge_output("b", 500)
    # Both have 64 tokens, in two pages each, and each needs a third.
    while not bench.waiting.preempted:
        bench.step()
    (loser,) = bench.waiting.preempted
    (winner,) = bench.planner.running
    assert (loser.tenant, winner.tenant) == ("b", "a")
    tokens = list(loser.tokens)
    while bench.live:
        bench.step()
    assert loser.tokens[: len(tokens)] == tokens and len(loser.tokens) == loser.limit
    assert bench.waiting.queue.counter("b") == 500 * OUTPUT_WEIGHT + 20 * PROMPT_WEIGHT + 100 * OUTPUT_WEIGHT


def test_pages_are_taken_from_a_tenant_with_more_than_its_share_before_the_last_in_the_order() -> None:
    bench = world(6, budget=160)
    for tenant, tokens, served in (("a", 60, 0), ("b", 70, 1000), ("c", 5, 5000)):
        bench.add(ask(tenant, [1] * tokens, 30, tenant))
        bench.waiting.queue.charge_output(tenant, served)
    while not bench.waiting.preempted:
        bench.step()
    assert [request.tenant for request in bench.waiting.preempted] == ["b"], "it has three pages of six"


def test_a_request_without_room_to_grow_gives_its_own_pages_up_if_its_claim_is_the_lowest() -> None:
    bench = world(3)
    old = bench.add(ask("old", [1] * 40, 20))
    young = bench.add(ask("young", [1] * 30, 20))
    while not bench.waiting.preempted:
        bench.step()
    assert bench.waiting.preempted == [young] and len(young.tokens) == 33
    assert old in bench.planner.running
    while bench.live:
        bench.step()
    assert [request.id for request in bench.finished] == ["old", "young"]


def test_a_request_that_needs_the_whole_pool_runs_alone_to_its_end() -> None:
    bench = world(3)
    large = bench.add(ask("large", [1] * 60, 36))
    for number in range(3):
        bench.add(ask(f"small{number}", [2] * 30, 30, "b"))
    steps = 0
    while bench.live:
        bench.step()
        steps += 1
    assert len(large.tokens) == 96 and steps < 300


def test_prompts_within_the_token_budget_beside_every_decode() -> None:
    bench = world(8, budget=16, rows=4)
    decoding = bench.add(ask("decoding", [1], 30))
    bench.step()
    bench.add(ask("long", [2] * 40, 5))
    plans = [bench.step() for _ in range(3)]
    assert [[count for _, count in plan.chunks] for plan in plans if plan] == [[15], [15], [10]]
    assert all(plan and plan.decodes == [decoding] for plan in plans)


def test_a_prompts_last_token_alone_is_a_decode() -> None:
    bench = world(8, budget=16)
    request = bench.add(ask("r", [1] * 17, 5))
    plans = [bench.step() for _ in range(2)]
    assert plans[0] and plans[0].chunks == [(request, 16)]
    assert plans[1] and plans[1].decodes == [request] and not plans[1].chunks


def test_prefix_pages_are_found_and_released() -> None:
    bench = world(8)
    pool = bench.planner.pages
    first = bench.add(ask("first", list(range(70)), 3, prefix_key="a/x"))
    bench.step()
    bench.step()
    again = bench.add(ask("again", [*range(64), 99], 3, prefix_key="a/x"))
    strangers = [bench.add(ask(f"no{key}", list(range(70)), 1, prefix_key=key)) for key in ("b/x", None)]
    # It begins as the second page does: the key of a page is of all tokens before it too.
    strangers.append(bench.add(ask("shifted", list(range(32, 102)), 1, prefix_key="a/x")))
    bench.step()
    assert again.pages[:2] == first.pages[:2] and again.cached_tokens == 64
    while bench.live:
        bench.step()
    assert [request.cached_tokens for request in strangers] == [0, 0, 0]
    assert pool.available() == pool.count
    # Both pages of the prefix are idle now, and found once more; the last token is computed in any case.
    exact = bench.add(ask("exact", list(range(64)), 1, prefix_key="a/x"))
    plan = bench.step()
    assert plan and plan.chunks == [(exact, 32)] and exact.cached_tokens == 32


def test_pages_that_chunks_and_decodes_fill_are_found() -> None:
    bench = world(8, budget=20)
    first = bench.add(ask("first", list(range(40)), 30, prefix_key="a/x"))
    while bench.live:
        bench.step()
    again = bench.add(ask("again", first.tokens, 1, prefix_key="a/x"))
    bench.step()
    assert len(first.tokens) == 70 and again.cached_tokens == 64


def test_pages_that_were_found_are_released_where_the_request_cannot_enter() -> None:
    bench = world(5, still_loading=lambda request: request.id == "loading")
    first = bench.add(ask("first", list(range(64)), 64, prefix_key="a/x"))
    bench.step()
    # Two of its pages are found, and three more are needed: two are left, one of them for the first request.
    large = bench.add(ask("large", [*range(64), *[7] * 65], 2, prefix_key="a/x"))
    bench.step()
    assert large.state is RequestState.WAITING and not large.pages
    bench.cancel(large)
    loading = bench.add(ask("loading", list(range(66)), 2, prefix_key="a/x"))
    bench.step()
    assert loading.state is RequestState.LOADING and not loading.pages
    bench.cancel(first)
    assert bench.planner.pages.available() == 5


def test_a_prompt_whose_log_probabilities_are_asked_for_is_computed_whole() -> None:
    bench = world(8)
    bench.add(ask("first", list(range(70)), 1, prefix_key="a/x"))
    while bench.live:
        bench.step()
    asking = ask("asking", list(range(70)), 1, prefix_key="a/x")
    asking.params = GenerateParams(prompt_logprobs=0)
    bench.add(asking)
    plan = bench.step()
    assert plan and plan.chunks == [(asking, 64)] and asking.cached_tokens == 0


@pytest.mark.parametrize(("rows", "most"), [(4, 64), (100, 100)])
def test_the_logits_of_prompts_are_as_many_as_memory_is_counted_for(rows: int, most: int) -> None:
    bench = world(40, budget=300, rows=rows)
    asking = [ask(f"asking {number}", [number] * 150, 2) for number in range(2)]
    for request in asking:
        request.params = GenerateParams(prompt_logprobs=0)
        bench.add(request)
    bench.add(ask("plain", [5] * 120, 2))
    plan = bench.step()
    assert plan and [count for _, count in plan.chunks] == [most, 1, 120]
    while bench.live:
        plan = bench.plan()
        assert plan and plan.prompt_logits <= most + 1
        bench.do(plan, lambda: 1)


def test_crossing_the_rotary_threshold_computes_from_the_first_token_with_other_keys() -> None:
    bench = world(8, threshold=70)
    request = bench.add(ask("r", list(range(66)), 40, prefix_key="a/x"))
    while len(request.tokens) < 71:
        bench.step(lambda: 5)
    short_keys = list(request.page_keys)
    assert request.rotary_side == 0 and request.computed == 70 and len(short_keys) == 2
    plan = bench.step(lambda: 5)
    # The pages of the short side are idle and have the same tokens: they must not be found.
    assert bench.waiting.preempted == [request]
    assert plan and plan.entered == [request] and plan.chunks == [(request, 64)]
    assert request.rotary_side == 1 and not set(request.page_keys) & set(short_keys)
    while bench.live:
        bench.step(lambda: 5)
        assert not bench.waiting.preempted, "it crosses once"
    assert len(request.tokens) == 106
    # A long prompt is on the long side from the start, and finds the pages of that side.
    long = bench.add(ask("long", [*range(66), *[5] * 20], 1, prefix_key="a/x"))
    bench.step()
    assert (long.rotary_side, long.cached_tokens) == (1, 64)


def test_a_loading_adapter_does_not_hold_the_next_request_up() -> None:
    bench = world(8, still_loading=lambda request: request.id == "loading")
    bench.add(ask("loading", [1] * 5))
    other = bench.add(ask("other", [1] * 5))
    plan = bench.step()
    assert plan and plan.entered == [other]


def test_check_invariants_notices_a_planted_fault() -> None:
    bench = world(8)
    request = bench.add(ask("r", [1] * 40))
    bench.step()
    planner = bench.planner
    planner.check_invariants()
    request.tokens += [1] * 40
    with pytest.raises(RuntimeError, match="lacks pages"):
        planner.check_invariants()
    del request.tokens[request.computed :]
    with pytest.raises(RuntimeError, match="has nothing to run"):
        planner.check_invariants()
    planner._rows.pop()
    with pytest.raises(RuntimeError, match="a row is lost"):
        planner.check_invariants()
