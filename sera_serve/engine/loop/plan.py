"""The plan of a step: which tokens of which requests run, and who gives pages up. Pure logic, without torch."""

from __future__ import annotations

import secrets
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sera_serve.engine.loop.pages import PAGE_SIZE, PagePool, chain_key, root_key
from sera_serve.engine.request import GenerationRequest

# Steps after which a request that found too few pages may try again, even if none came free.
_STEPS_SHORT = 16
# The least of what `max_sequences` says for the logits of prompts: with a few, a prompt would take hundreds of steps.
_LEAST_PROMPT_LOGITS = 64


class Candidates(Protocol):
    """The waiting requests, as the planner sees them; the scheduler is one."""

    def first(self) -> GenerationRequest | None:
        """The request whose turn it is."""

    def start(self, request: GenerationRequest) -> bool:
        """Move it into the batch; False if its adapter is not on the device, and another request is first now."""

    def make_ready(self, request: GenerationRequest) -> bool:
        """Hold its adapter on the device while it waits; False as `start`."""

    def preempt(self, request: GenerationRequest) -> None:
        """Put a running request back."""

    def priority_key(self, request: GenerationRequest) -> tuple[float, tuple[int, int]]:
        """Its place in the fair order; the lowest goes first."""

    def weight(self, tenant: str) -> float:
        """The tenant's part of the batch, in relation to others'."""


@dataclass
class StepPlan:
    """One step.

    Attributes:
        decodes: Requests with one token to run.
        chunks: Requests with more tokens to run, and how many of these run now.
        entered: Those of the chunks that have just got their row and the pages of their tokens.
        grown: Those of the decodes that have just got one page more.
    """

    decodes: list[GenerationRequest] = field(default_factory=list)
    chunks: list[tuple[GenerationRequest, int]] = field(default_factory=list)
    entered: list[GenerationRequest] = field(default_factory=list)
    grown: list[GenerationRequest] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of the step."""
        return len(self.decodes) + sum(count for _, count in self.chunks)

    @property
    def prompt_logits(self) -> int:
        """Tokens of the step whose logits are wanted for the log-probabilities of prompts."""
        return sum(count for request, count in self.chunks if request.wants_prompt_logprobs)

    def requests(self) -> list[GenerationRequest]:
        """All requests of the step."""
        return [*self.decodes, *(request for request, _ in self.chunks)]

    def remove(self, requests: Sequence[GenerationRequest]) -> None:
        """Take requests out of the step that it has ended, or that have yielded their pages."""
        self.decodes = [request for request in self.decodes if request not in requests]
        self.chunks = [(request, count) for request, count in self.chunks if request not in requests]
        self.entered = [request for request in self.entered if request not in requests]
        self.grown = [request for request in self.grown if request not in requests]


@dataclass
class _ShortOfPages:
    """The first waiting request, for which the last plan had too few pages, how many were there, and steps since."""

    newcomer: GenerationRequest
    available: int
    steps: int = 0


class StepPlanner:
    """Plans steps: every decode, then chunks of prompts within the token budget, then newcomers that find pages.

    Invariants:
    * A running request has the pages of all its tokens.
    * Every decode runs in every step, because fewer requests run than a step has tokens.
    * A request that needs a page and finds none takes the pages of a request that is later in the fair order: of the
      last one of a tenant that has more than its share of the pages, else of the last of all. The first in the order
      always goes on, and no request enters that could not run alone: so there is always progress.
    * Where every row is taken, a waiting request of a tenant that has less than its share of the rows takes the row of
      the last request among the tenants that have more: one row a step. Rows of one tenant alone are never taken.
    * Where pages are short, the first waiting request, if it has not run yet and its tenant has less than its share of
      them, takes the pages of later requests among the tenants that have more. Else the rows that it waits for would
      grow into every page that comes free.
    * A newcomer leaves a page for every fourth running request, which will soon need one. A preempted request leaves a
      page for each: it would else be preempted again before it has paid for its recomputation.
    """

    def __init__(
        self,
        pages: PagePool,
        candidates: Candidates,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        rotary_side: Callable[[int], int] | None = None,
    ) -> None:
        """Plan for an empty batch.

        Args:
            pages: The pool; this object's own from now on.
            candidates: The waiting requests.
            max_batch_tokens: The most tokens of one step; longer prompts are prefilled in chunks.
            max_sequences: The most requests of one step. It has the logits of as many tokens of prompts at most, or of
                64, and of one for each further prompt.
            rotary_side: The side of the base's rotary threshold for a number of tokens; None: it has no threshold.
        """
        self.pages = pages
        self.running: list[GenerationRequest] = []
        self._candidates = candidates
        self._budget = max_batch_tokens
        self.num_rows = max(1, min(max_sequences, max_batch_tokens - 1))
        self._rows = list(range(self.num_rows - 1, -1, -1))
        self._rotary_side = rotary_side
        self._short: _ShortOfPages | None = None
        # Nobody outside can compute a key, and so learn from a collision what others have asked.
        self._secret = secrets.token_bytes(32)

    def plan(self, runs_static: Callable[[StepPlan], bool]) -> StepPlan | None:
        """The next step, or None if there is nothing to run.

        Args:
            runs_static: Whether all of a step would run on static buffers. Once such a step has a prompt, a newcomer
                that would make it a packed step waits for the next one: two static steps take less time.
        """
        plan = StepPlan()
        if self._rotary_side is not None:
            for request in [r for r in self.running if self._rotary_side(len(r.tokens)) != r.rotary_side]:
                # Its keys were computed with the other frequencies.
                self._preempt(request)
        promised = None if self._rows else self._free_row()
        self._plan_decodes(plan)
        budget = self._budget - len(plan.decodes)
        for request in self.running:
            if budget and not request.is_decoding:
                budget -= self._plan_chunk(plan, request, budget)
        self._short = None
        while budget and self._rows:
            newcomer = promised or self._candidates.first()
            if newcomer is None or (newcomer is not promised and self._waits_for_static(plan, newcomer, runs_static)):
                break
            promised = None
            if not self._admit(plan, newcomer):
                self._short = _ShortOfPages(newcomer, self.pages.available())
                break
            if newcomer.row >= 0:
                budget -= self._plan_chunk(plan, newcomer, budget)
        return plan if plan.decodes or plan.chunks else None

    def plan_ahead(
        self,
        plan: StepPlan,
        leaving: Collection[GenerationRequest],
        runs_on_device: Callable[[StepPlan], bool],
    ) -> StepPlan | None:
        """The step after `plan`, which gives each of its requests a token that is not known yet; None if it must wait.

        It has the requests of `plan`, each with one token more, but those that will be finished then, and newcomers
        with their whole prompts. It waits where somebody would have to yield a row or a page, where the first newcomer
        cannot join it, or where a request reaches the rotary threshold. It does not wait for a newcomer that has just
        found too few pages, as long as none has come free.

        Args:
            plan: The step under way. Its chunks end their prompts.
            leaving: Requests of the step that end after it.
            runs_on_device: Whether a step can be launched ahead.
        """
        ahead = StepPlan(decodes=[r for r in plan.requests() if len(r.tokens) + 1 < r.limit and r not in leaving])
        ahead.grown = [r for r in ahead.decodes if len(r.tokens) == len(r.pages) * PAGE_SIZE]
        if not ahead.decodes or len(ahead.grown) > self.pages.available() or not runs_on_device(ahead):
            return None
        if self._rotary_side is not None and any(
            self._rotary_side(len(r.tokens) + 1) != r.rotary_side for r in ahead.decodes
        ):
            return None
        waits = self._candidates.first()
        if waits is not None and self._rows:
            if not self._enters_ahead(ahead, waits, len(ahead.grown), runs_on_device) and not self._stays_short(waits):
                return None
        elif waits is not None and self._yields_row(waits) is not None:
            return None
        for request in ahead.grown:
            request.pages += self.pages.take(1)
        while (
            self._rows
            and (newcomer := self._candidates.first()) is not None
            and self._enters_ahead(ahead, newcomer, 0, runs_on_device)
        ):
            if not self._admit(ahead, newcomer):
                break
            if newcomer.row >= 0:
                self._plan_chunk(ahead, newcomer, self._budget)
        return ahead

    def _waits_for_static(
        self, plan: StepPlan, newcomer: GenerationRequest, runs_static: Callable[[StepPlan], bool]
    ) -> bool:
        """Whether a newcomer is left to the next step, because this one has prompts and is static without it."""
        return bool(plan.chunks) and runs_static(plan) and not self._joins(plan, newcomer, runs_static)

    def _enters_ahead(
        self,
        plan: StepPlan,
        newcomer: GenerationRequest,
        taken: int,
        runs_on_device: Callable[[StepPlan], bool],
    ) -> bool:
        """Whether a newcomer can enter without anybody's pages; `taken` are promised. Cached pages are not counted."""
        if not self._joins(plan, newcomer, runs_on_device):
            return False
        return self.pages.available() >= taken + -(-len(newcomer.tokens) // PAGE_SIZE) + self._spare(newcomer)

    def _joins(self, plan: StepPlan, newcomer: GenerationRequest, runs: Callable[[StepPlan], bool]) -> bool:
        """Whether a step runs as `runs` says, with all tokens of a newcomer that the prefix cache does not have."""
        if self._rotary_side is not None and self._rotary_side(len(newcomer.tokens)):
            return False
        found = self._find(newcomer)
        newcomer.computed = len(found) * PAGE_SIZE
        wider = StepPlan(plan.decodes, [*plan.chunks, (newcomer, len(newcomer.tokens) - newcomer.computed)])
        joins = wider.tokens <= self._budget and runs(wider)
        newcomer.computed = 0
        self.pages.release(found)
        return joins

    def _stays_short(self, newcomer: GenerationRequest) -> bool:
        """Whether a newcomer would find too few pages again. After some steps it may try, for the order changes."""
        short = self._short
        if short is None or short.newcomer is not newcomer or self.pages.available() > short.available:
            return False
        short.steps += 1
        return short.steps <= _STEPS_SHORT

    def advance(self, request: GenerationRequest, tokens: int) -> None:
        """Note that so many more tokens are in the pool, and let others find the pages that are full now."""
        before, request.computed = request.computed, request.computed + tokens
        if request.prefix_key is not None:
            for page in range(before // PAGE_SIZE, request.computed // PAGE_SIZE):
                self.pages.publish(request.pages[page], self._key(request, page))

    def remove(self, request: GenerationRequest) -> None:
        """Take a running request out of the batch; between two steps."""
        self.running.remove(request)
        self.pages.release(request.pages)
        request.pages = []
        self._rows.append(request.row)
        request.row = -1

    def check_invariants(self) -> None:
        """Raise RuntimeError where rows, pages and requests do not agree."""
        rows = [request.row for request in self.running]
        if sorted([*self._rows, *rows]) != list(range(self.num_rows)):
            raise RuntimeError("a row is lost or held twice")
        self.pages.check_invariants(request.pages for request in self.running)
        for request in self.running:
            if len(request.pages) * PAGE_SIZE < len(request.tokens) - 1 or request.computed >= len(request.tokens):
                raise RuntimeError(f"request {request.id!r} lacks pages, or has nothing to run")

    def _free_row(self) -> GenerationRequest | None:
        """Let a running request yield its row to the first waiting one whose adapter is there, if that has a right.

        Returns:
            The waiting one. The row is its own: the one that yields may be before it in the order now, and would take
            the row back.
        """
        while (newcomer := self._candidates.first()) is not None:
            victim = self._yields_row(newcomer)
            if victim is None:
                return None
            # What yields is computed again: it must not be in vain.
            if self._candidates.make_ready(newcomer):
                self._preempt(victim)
                return newcomer
        return None

    def _yields_row(self, newcomer: GenerationRequest) -> GenerationRequest | None:
        """The running request that yields its row to the first waiting one, or None if that has to wait for an end.

        Otherwise a tenant's many long answers, which began together, would hold every row until they end together.
        """
        held = Counter(request.tenant for request in self.running)
        share = self._shares({*held, newcomer.tenant}, self.num_rows)
        if held[newcomer.tenant] + 1 > share[newcomer.tenant]:
            return None
        above = [request for request in self.running if held[request.tenant] > share[request.tenant]]
        return max(above, key=self._candidates.priority_key, default=None)

    def _yield_pages(self, plan: StepPlan, newcomer: GenerationRequest, needed: int) -> list[GenerationRequest] | None:
        """The running requests that yield their pages to a new one, or None if it has to wait for ends.

        They are later in the order than the newcomer, so that the first goes on, and have not entered in this very
        step. With as many pages as it needs, none yields: it leaves none for those that run.
        """
        if all(request.tenant == newcomer.tenant for request in self.running):
            return None
        place = self._candidates.priority_key
        yielding: list[GenerationRequest] = []
        while True:
            left = [request for request in self.running if request not in yielding]
            held = _held_pages(left)
            share = self._shares({*held, newcomer.tenant}, self.pages.count)
            if held[newcomer.tenant] + needed > share[newcomer.tenant]:
                return None
            above = (r for r in left if held[r.tenant] > share[r.tenant] and r not in plan.entered)
            last = max(above, key=place, default=newcomer)
            is_later = place(last) > place(newcomer)
            free = self.pages.available() + self.pages.freed(request.pages for request in yielding)
            if free >= needed and (yielding or is_later):
                return yielding
            if not is_later:
                return None
            yielding.append(last)

    def _loses_pages(self, order: Sequence[GenerationRequest]) -> GenerationRequest:
        """The request that is preempted for the first of these, which are in the fair order; itself if it is alone."""
        held = _held_pages(self.running)
        share = self._shares(held, self.pages.count)
        above = (request for request in reversed(order[1:]) if held[request.tenant] > share[request.tenant])
        return next(above, order[-1])

    def _shares(self, tenants: Collection[str], total: int) -> dict[str, float]:
        """What each of these tenants may hold of a total, by their weights."""
        weights = {tenant: self._candidates.weight(tenant) for tenant in tenants}
        unit = total / sum(weights.values())
        return {tenant: unit * weight for tenant, weight in weights.items()}

    def _plan_decodes(self, plan: StepPlan) -> None:
        """Plan every decode; where pages are short, requests are preempted for it."""
        decodes = [request for request in self.running if request.is_decoding]
        growing = sum(self._needs_page(request) for request in decodes)
        if growing <= self.pages.available():
            for request in decodes:
                self._plan_decode(plan, request)
            return
        # In the fair order: a preempted request comes after all requests that are planned.
        order = sorted(self.running, key=self._candidates.priority_key)
        at = 0
        while at < len(order):
            request = order[at]
            while request.is_decoding and self._needs_page(request) and not self.pages.available():
                victim = self._loses_pages(order[at:])
                order.remove(victim)
                self._preempt(victim)
                if len(order) == at:
                    return
            if request.is_decoding:
                self._plan_decode(plan, request)
            at += 1

    def _plan_decode(self, plan: StepPlan, request: GenerationRequest) -> None:
        if self._needs_page(request):
            request.pages += self.pages.take(1)
            plan.grown.append(request)
        plan.decodes.append(request)

    @staticmethod
    def _needs_page(request: GenerationRequest) -> bool:
        return request.computed == len(request.pages) * PAGE_SIZE

    def _plan_chunk(self, plan: StepPlan, request: GenerationRequest, budget: int) -> int:
        tokens = min(budget, len(request.tokens) - request.computed)
        if request.wants_prompt_logprobs:
            # The logits of every token stay while they are read, and memory is counted for those of as many requests.
            most = max(self.num_rows, _LEAST_PROMPT_LOGITS)
            tokens = min(tokens, max(1, most - plan.prompt_logits))
        plan.chunks.append((request, tokens))
        return tokens

    def _admit(self, plan: StepPlan, request: GenerationRequest) -> bool:
        """Start the first waiting request if there are pages for it; False if the batch has to wait for pages."""
        if self._rotary_side is not None and (side := self._rotary_side(len(request.tokens))) != request.rotary_side:
            request.rotary_side, request.page_keys = side, []
        found = self._find(request)
        needed = -(-len(request.tokens) // PAGE_SIZE) - len(found)
        is_new = request.started_at is None
        yielding: list[GenerationRequest] | None = []
        if self.pages.available() < needed + self._spare(request):
            yielding = self._yield_pages(plan, request, needed) if is_new else None
        if yielding is None:
            self.pages.release(found)
            return False
        if not self._candidates.start(request):
            self.pages.release(found)
            return True
        for other in yielding:
            self._preempt(other)
        plan.remove(yielding)
        request.pages = found + self.pages.take(needed)
        request.computed = len(found) * PAGE_SIZE
        if is_new:
            request.cached_tokens = request.computed
        request.row = self._rows.pop()
        self.running.append(request)
        plan.entered.append(request)
        return True

    def _spare(self, request: GenerationRequest) -> int:
        """Pages that a newcomer leaves to those that run."""
        return len(self.running) // 4 if request.started_at is None else len(self.running)

    def _find(self, request: GenerationRequest) -> list[int]:
        """Pages of the prefix cache that hold the request's first tokens. Its last token is always computed."""
        found: list[int] = []
        if request.prefix_key is None:
            return found
        if request.wants_prompt_logprobs:
            # A token whose keys are found is not computed, and has no log-probability.
            return found
        for page in range((len(request.tokens) - 1) // PAGE_SIZE):
            hit = self.pages.find(self._key(request, page))
            if hit is None:
                break
            found.append(hit)
        return found

    def _preempt(self, request: GenerationRequest) -> None:
        self.remove(request)
        request.computed = 0
        self._candidates.preempt(request)

    def _key(self, request: GenerationRequest, page: int) -> bytes:
        keys = request.page_keys
        while len(keys) <= page:
            start = len(keys) * PAGE_SIZE
            if keys:
                parent = keys[-1]
            else:
                parent = root_key(request.prefix_key or "", self._secret, request.rotary_side, request.adapter_from)
            keys.append(chain_key(parent, request.tokens[start : start + PAGE_SIZE], self._secret))
        return keys[page]


def _held_pages(requests: Sequence[GenerationRequest]) -> Counter[str]:
    """Pages of each tenant; a page that several of its requests share is one."""
    pages: defaultdict[str, set[int]] = defaultdict(set)
    for request in requests:
        pages[request.tenant].update(request.pages)
    return Counter({tenant: len(own) for tenant, own in pages.items()})
