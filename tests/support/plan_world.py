"""A planner of steps without a model: the requests that wait, and a world that checks and does what it plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from sera_serve.engine.fair_queue import FairQueue
from sera_serve.engine.loop.pages import PAGE_SIZE, PagePool
from sera_serve.engine.loop.plan import StepPlan, StepPlanner
from sera_serve.engine.request import FinishReason, GenerationRequest, Principal, RequestState

Cell = tuple[str | None, int, int]
"""Whose keys lie at a place of the pool: prefix key, rotary side, and a hash of the tokens up to and with this one."""
Claim = tuple[float, tuple[int, int]]


class Waiting:
    """The waiting requests in the fair order, as the scheduler keeps them; an adapter may need some time to load."""

    def __init__(self, still_loading: Callable[[GenerationRequest], bool] = lambda request: False) -> None:
        self.queue: FairQueue[GenerationRequest] = FairQueue()
        self.parked: list[GenerationRequest] = []
        self.preempted: list[GenerationRequest] = []
        self.running: list[GenerationRequest] = []
        self.claims_then: list[dict[str, Claim]] = []
        self.charged: Counter[str] = Counter()
        self.ready: list[GenerationRequest] = []
        self.yielded = 0
        self.steps = 0
        self._still_loading = still_loading

    def add(self, request: GenerationRequest) -> None:
        self.queue.push(request)

    def first(self) -> GenerationRequest | None:
        return self.queue.first()

    def start(self, request: GenerationRequest) -> bool:
        if request not in self.ready and not self._has_adapter(request):
            return False
        self.queue.remove(request)
        request.move(RequestState.RUNNING)
        if request.started_at is None:
            request.started_at = float(self.steps)
            self.queue.charge_prompt(request)
            self.charged[request.id] += request.prompt_tokens
        return True

    def make_ready(self, request: GenerationRequest) -> bool:
        is_ready = self._has_adapter(request)
        if is_ready:
            self.ready.append(request)
        return is_ready

    def _has_adapter(self, request: GenerationRequest) -> bool:
        assert request is self.queue.first(), "only the first of the order may start"
        if self._still_loading(request):
            self.queue.park(request)
            self.parked.append(request)
            request.move(RequestState.LOADING)
            return False
        return True

    def preempt(self, request: GenerationRequest) -> None:
        assert request.pages == [] and request.computed == 0 and request.row < 0
        request.move(RequestState.PREEMPTED)
        self.claims_then.append({one.id: self.queue.priority_key(one) for one in [*self.running, request]})
        self.queue.push(request)
        self.preempted.append(request)

    def priority_key(self, request: GenerationRequest) -> Claim:
        return self.queue.priority_key(request)

    def weight(self, tenant: str) -> float:
        return self.queue.weight(tenant)

    def arrive(self) -> None:
        """Every adapter that was loading is there."""
        for request in self.parked:
            if not request.is_finished:
                request.move(RequestState.WAITING if request.started_at is None else RequestState.PREEMPTED)
                self.queue.unpark(request)
        self.parked.clear()


def is_writable(pages: PagePool, page: int) -> bool:
    """Whether one request alone may write to a page."""
    return pages._users[page] == 1 and pages._key_of[page] is None


@dataclass
class World:
    """A planner, what waits for it, and the contents of its pages as a model would have written them."""

    planner: StepPlanner
    waiting: Waiting
    budget: int
    side: Callable[[int], int] = lambda length: 0
    most_static: int = 0
    content: dict[tuple[int, int], Cell] = field(default_factory=dict)
    hashes: dict[str, list[int]] = field(default_factory=dict)
    live: list[GenerationRequest] = field(default_factory=list)
    finished: list[GenerationRequest] = field(default_factory=list)

    def add(self, request: GenerationRequest) -> GenerationRequest:
        self.waiting.add(request)
        self.live.append(request)
        return request

    def cancel(self, request: GenerationRequest) -> None:
        self.live.remove(request)
        if request.state is RequestState.RUNNING:
            self.planner.remove(request)
        else:
            self.waiting.queue.remove(request)
        request.finish(FinishReason.CANCELLED)

    def step(self, new_token: Callable[[], int] = lambda: 1) -> StepPlan | None:
        """Plan, check, and do what a model would do."""
        plan = self.plan()
        if plan is not None:
            self.do(plan, new_token)
        return plan

    def plan(self) -> StepPlan | None:
        """The next step, checked."""
        waiting, planner = self.waiting, self.planner
        waiting.steps += 1
        before = list(planner.running)
        held: Counter[str] = Counter()
        for request in before:
            # Each of a tenant's requests may grow by a page before another one yields.
            held[request.tenant] += len(request.pages) + 1
        claims = {request.id: waiting.priority_key(request) for request in before}
        crossed = [request for request in before if self.side(len(request.tokens)) != request.rotary_side]
        waiting.preempted.clear()
        waiting.claims_then.clear()
        waiting.ready.clear()
        first = waiting.first()
        plan = planner.plan(self.runs_static)
        planner.check_invariants()
        if not crossed and len(before) == planner.num_rows and first is not None:
            # Where the adapter of the first is not there, one that is after it may get a row.
            is_parked = first in waiting.parked
            if not is_parked or waiting.ready:
                before = self._check_yielded_row(before, waiting.ready[0] if is_parked else first, claims)
        for request in set(planner.running) - set(before):
            held[request.tenant] += len(request.pages)
        self._check_preemptions(before, crossed, claims, held)
        if plan is None:
            assert not planner.running
            return None
        self._check_plan(plan, before, claims)
        return plan

    def runs_static(self, plan: StepPlan) -> bool:
        """Of prompts alone, as the runner says it: whole ones, and few tokens."""
        are_whole = all(request.computed + count == len(request.tokens) for request, count in plan.chunks)
        return are_whole and plan.tokens <= self.most_static

    def plan_ahead(
        self, plan: StepPlan, runs_on_device: Callable[[StepPlan], bool]
    ) -> tuple[StepPlan | None, list[GenerationRequest]]:
        """The step after `plan`, checked, and who has entered the batch for it; nothing of `plan` is done yet."""
        waiting, planner = self.waiting, self.planner
        before, first, pages = list(planner.running), waiting.first(), planner.pages.available()
        waiting.preempted.clear()
        ahead = planner.plan_ahead(plan, [], runs_on_device)
        planner.check_invariants()
        assert not waiting.preempted, "somebody yielded what a step under way uses"
        entered = [request for request in planner.running if request not in before]
        if ahead is None:
            assert not entered and planner.pages.available() == pages and waiting.first() is first
            return None, []
        assert 0 < ahead.tokens <= self.budget
        assert entered == ahead.entered == [request for request, _ in ahead.chunks]
        assert all(request in plan.requests() for request in ahead.decodes)
        for request in ahead.requests():
            new = request in ahead.decodes
            assert len(request.tokens) + new <= len(request.pages) * PAGE_SIZE
            assert self.side(len(request.tokens) + new) == request.rotary_side
        return ahead, entered

    def do(self, plan: StepPlan, new_token: Callable[[], int] = lambda: 1) -> None:
        """What a model would do in a step."""
        waiting, planner = self.waiting, self.planner
        assert all(request.is_decoding for request in plan.decodes)
        ran = [(request, 1) for request in plan.decodes] + plan.chunks
        self._write(ran)
        self._read(ran)
        for request, count in ran:
            planner.advance(request, count)
        for request, _ in ran:
            if request.computed == len(request.tokens):
                request.tokens.append(new_token())
                waiting.queue.charge_output(request.tenant, 1)
                waiting.charged[request.id] += 1
                if len(request.tokens) == request.limit:
                    planner.remove(request)
                    request.finish(FinishReason.LENGTH)
                    self.live.remove(request)
                    self.finished.append(request)
        planner.check_invariants()

    def _check_yielded_row(
        self, before: list[GenerationRequest], first: GenerationRequest, claims: dict[str, Claim]
    ) -> list[GenerationRequest]:
        """A full batch: a tenant below its share gets a row of one above it. Returns the requests that go on."""
        held = Counter(request.tenant for request in before)
        tenants = {*held, first.tenant}
        unit = self.planner.num_rows / sum(map(self.waiting.weight, tenants))
        share = {tenant: unit * self.waiting.weight(tenant) for tenant in tenants}
        above = [request for request in before if held[request.tenant] > share[request.tenant]]
        if held[first.tenant] + 1 > share[first.tenant] or not above:
            return before
        last = max(above, key=lambda one: claims[one.id])
        assert self.waiting.preempted[0] is last, "a row that is due was not given up"
        self.waiting.yielded += 1
        del self.waiting.preempted[0], self.waiting.claims_then[0]
        return [request for request in before if request is not last]

    def _check_preemptions(
        self,
        before: list[GenerationRequest],
        crossed: list[GenerationRequest],
        claims: dict[str, Claim],
        held: Counter[str],
    ) -> None:
        """A request that was put back has crossed the rotary threshold, or had the lowest claim of all that ran, or of
        those whose tenants have more than their share of the pages.
        """
        assert all(request in self.waiting.preempted for request in crossed)
        preempted = [
            (request, then)
            for request, then in zip(self.waiting.preempted, self.waiting.claims_then, strict=True)
            if request not in crossed
        ]
        left = [request for request in before if request not in crossed]
        weights = {tenant: self.waiting.weight(tenant) for tenant in {request.tenant for request in self.live}}
        for request, then in preempted:
            part = weights[request.tenant] / sum(weights.values())
            is_above = held[request.tenant] > part * self.planner.pages.count
            # What is charged or put back within the plan changes the order.
            later = [o for o in left if claims[o.id] > claims[request.id] and then[o.id] > then[request.id]]
            assert is_above or not later, "a request with a higher claim was preempted"
            assert all(one.tenant != request.tenant for one in later), "a tenant's request with a higher claim was"
            left.remove(request)
        if preempted and not left:
            assert set(self.planner.running) - set(before), "the request with the highest claim was preempted"

    def _check_plan(self, plan: StepPlan, before: list[GenerationRequest], claims: dict[str, Claim]) -> None:
        waiting, running = self.waiting, self.planner.running
        tokens = len(plan.decodes) + sum(count for _, count in plan.chunks)
        assert 0 < tokens <= self.budget
        assert all(count > 0 for _, count in plan.chunks)
        assert len(set(map(id, plan.requests()))) == len(plan.requests()), "a request is planned twice"
        assert all(request in running for request in plan.requests())
        assert set(map(id, plan.entered)) == {id(r) for r in running if r not in before or r in waiting.preempted}
        assert set(map(id, plan.grown)) <= set(map(id, plan.decodes))
        for request in before:
            if request.is_decoding and request not in waiting.preempted:
                assert request in plan.decodes, "a decode does not run in this step"
        assert all(request.state is RequestState.RUNNING for request in running)
        waits = waiting.queue.requests()
        assert all(request.row < 0 and not request.pages and not request.computed for request in waits)
        survivors = [request for request in before if request not in waiting.preempted]
        # The highest claim gets on: as a decode always, in a prefill unless others before it use the tokens up.
        if survivors and (first := min(survivors, key=lambda one: claims[one.id])).is_decoding:
            assert first in plan.decodes
        if survivors and tokens < self.budget:
            assert all(request in plan.requests() for request in survivors)
        assert all(len(request.pages) * PAGE_SIZE >= len(request.tokens) for request in plan.requests())

    def _write(self, ran: list[tuple[GenerationRequest, int]]) -> None:
        places: set[tuple[int, int]] = set()
        for request, count in ran:
            for position in range(request.computed, request.computed + count):
                page, offset = request.pages[position // PAGE_SIZE], position % PAGE_SIZE
                assert is_writable(self.planner.pages, page), "a shared or published page is written"
                assert (page, offset) not in places, "two tokens at one place"
                places.add((page, offset))
                self.content[page, offset] = self._cell(request, position)

    def _read(self, ran: list[tuple[GenerationRequest, int]]) -> None:
        for request, count in ran:
            for position in range(request.computed + count):
                place = request.pages[position // PAGE_SIZE], position % PAGE_SIZE
                assert self.content[place] == self._cell(request, position), "a request reads what is not its history"

    def _cell(self, request: GenerationRequest, position: int) -> Cell:
        hashes = self.hashes.setdefault(request.id, [])
        while len(hashes) <= position:
            hashes.append(hash((hashes[-1] if hashes else 0, request.tokens[len(hashes)])))
        return request.prefix_key, request.rotary_side, hashes[position]


def world(
    pages: int,
    *,
    budget: int = 64,
    rows: int = 8,
    threshold: int | None = None,
    most_static: int = 0,
    still_loading: Callable[[GenerationRequest], bool] = lambda request: False,
) -> World:
    waiting = Waiting(still_loading)

    def side(length: int) -> int:
        return int(threshold is not None and length > threshold)

    planner = StepPlanner(
        PagePool(pages),
        waiting,
        max_batch_tokens=budget,
        max_sequences=rows,
        rotary_side=None if threshold is None else side,
    )
    waiting.running = planner.running
    return World(planner, waiting, budget, side, most_static)


def ask(
    name: str, tokens: list[int], new: int = 8, tenant: str = "a", prefix_key: str | None = None
) -> GenerationRequest:
    return GenerationRequest(
        principal=Principal(tenant),
        id=name,
        tokens=list(tokens),
        prompt_tokens=len(tokens),
        limit=len(tokens) + new,
        prefix_key=prefix_key,
    )
