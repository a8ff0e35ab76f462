"""Accounts: what each request may use and has used, for the metrics, the log, and the quotas of its tenant."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from fastapi import Request
from starlette.datastructures import State

from sera_serve.access import Quota, Quotas, Rates, rate_headers
from sera_serve.engine import (
    ClassifyResult,
    EmbedResult,
    GenerationStream,
    Principal,
    Priority,
)
from sera_serve.server.metrics import ServerMetrics
from sera_serve.server.usage_metrics import InputKind, UsageCounts


@dataclass(slots=True, eq=False)
class RequestRecord:
    """What one HTTP request did, for its line in the log. Filled while the request is served.

    Attributes:
        tenant: Whom it acted for; None where it was refused before that was known.
        adapter: The adapter that served it, or the reference that it asked for; None is the base model, or none.
        version: Of the adapter that served it.
        prompt_tokens: Tokens of all its prompts that entered a batch.
        completion_tokens: Generated tokens, also those of answers that did not finish.
        inputs: Inputs classified or made into vectors.
        generations: Generations that entered a batch.
        waited_s: The longest wait for a batch.
        first_token_s: The longest wait for a first token, from the request's arrival; None without a token.
        opened_at: When the waits begin (`time.monotonic`): the account was opened.
        load_began: When the first adapter of the request began to load (`time.monotonic`); None if none had to.
        load_s: Seconds that this load took.
        code: Of the error that answered it, or ended its stream.
    """

    tenant: str | None = None
    adapter: str | None = None
    version: int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    inputs: int = 0
    generations: int = 0
    waited_s: float | None = None
    first_token_s: float | None = None
    opened_at: float | None = None
    load_began: float | None = None
    load_s: float = 0.0
    code: str | None = None


class Meter:
    """What a tenant may use in a minute, for one request. Used on the event loop alone."""

    def __init__(self, rates: Rates, tenant: str, quota: Quota) -> None:
        self.quota = quota
        self._rates = rates
        self._tenant = tenant

    def charge(self, tokens: int) -> None:
        """Charge tokens that were computed."""
        self._rates.charge_tokens(self._tenant, self.quota, tokens)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers of a response that tell what the tenant may still use."""
        if self.quota.requests_per_minute is None and self.quota.tokens_per_minute is None:
            return []
        return rate_headers(self._rates.state(self._tenant, self.quota))


class Account:
    """Counts the work of one request. Used on the event loop alone.

    Attributes:
        principal: Who the request acts for, with the tenant's limit of requests in flight.
        priority: The request's priority.
    """

    def __init__(
        self,
        metrics: ServerMetrics,
        meter: Meter,
        principal: Principal,
        priority: Priority,
        record: RequestRecord,
        generating: dict[str, set[Account]],
    ) -> None:
        """Count for a principal.

        Args:
            metrics: Count everything.
            meter: Charges the tenant.
            principal: Who the request acts for.
            priority: The request's priority.
            record: Filled for the log.
            generating: The accounts of generations under way, by tenant.
        """
        self._metrics = metrics
        self._meter = meter
        self._record = record
        record.tenant = principal.tenant
        record.opened_at = time.monotonic()
        most = meter.quota.requests_in_flight
        self.principal = principal if most is None else replace(principal, max_in_flight=most)
        self.priority = priority
        # A request of several generations is one request.
        self._adapters_counted: set[str | None] = set()
        self._counted: set[GenerationStream] = set()
        self._generating = generating
        self._computing: Sequence[GenerationStream] = ()
        self._charged = 0

    def submitted(self, generations: Sequence[GenerationStream]) -> None:
        """Take the generations of the request, which may run from now on. Within `computing`, once."""
        self._computing = generations

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Charge the tokens of generations: at the end of the block, and whenever the tenant's next request comes.

        At the end all that ran are counted, whatever became of them.
        """
        tenant = self.principal.tenant
        self._generating.setdefault(tenant, set()).add(self)
        try:
            yield
        finally:
            self.settle()
            for generation in self._computing:
                if generation.has_started:
                    self.count_generation(generation)
            accounts = self._generating[tenant]
            accounts.discard(self)
            if not accounts:
                del self._generating[tenant]

    def settle(self) -> None:
        """Charge what the generations have computed since the last call."""
        computed = sum(generation.computed_tokens for generation in self._computing)
        # Less than before is possible: a generation that was interrupted finds its tokens in the prefix cache.
        if computed > self._charged:
            self._meter.charge(computed - self._charged)
            self._charged = computed

    def count_generation(self, generation: GenerationStream) -> None:
        """Count a generation that has ended, or is about to be closed: its times, adapter and tokens. Once."""
        if generation in self._counted:
            return
        self._counted.add(generation)
        tokens = generation.tokens_used
        self._observe_load(generation.load_began, generation.load_s)
        self._observe_waits(generation.waited_s, generation.first_token_s)
        self._metrics.count_tokens(tokens)
        self._metrics.usage.tenant(self.principal.tenant).add_tokens(*tokens)
        self._served(generation.adapter, generation.version).add_tokens(*tokens)
        self._record.prompt_tokens += tokens.prompt
        self._record.completion_tokens += tokens.completion

    def count_classified(self, results: Sequence[ClassifyResult]) -> None:
        """Count one finished classification: its results by adapter."""
        self._count_rows("classified", [(result, len(result.results), result.prompt_tokens) for result in results])

    def charge_rows(self, tokens: int) -> None:
        """Charge the tokens of rows that entered a batch, whether or not their call is answered."""
        self._meter.charge(tokens)

    def count_embedded(self, result: EmbedResult) -> None:
        """Count one finished embedding."""
        self._count_rows("embedded", [(result, len(result.vectors), sum(result.prompt_tokens))])

    def count_refusal(self, code: str) -> None:
        """Count a generation that was refused or ended after its stream had begun; see `ServerMetrics`."""
        self._metrics.count_refusal(code)

    def _observe_load(self, began: float | None, seconds: float) -> None:
        """Record when an adapter began to load for the request, and how long that took; None if it was there."""
        record = self._record
        if began is not None and (record.load_began is None or began < record.load_began):
            record.load_began, record.load_s = began, seconds

    def _observe_waits(self, waited_s: float, first_token_s: float | None) -> None:
        """Record how long a generation waited for the batch, and for its first token if there was one."""
        self._metrics.observe_waits(waited_s, first_token_s)
        usage = self._metrics.usage.tenant(self.principal.tenant)
        usage.waits.add(waited_s)
        record = self._record
        if not record.generations:
            usage.requests += 1
        record.generations += 1
        record.waited_s = max(waited_s, record.waited_s or 0.0)
        if first_token_s is not None:
            usage.first_tokens.add(first_token_s)
            record.first_token_s = max(first_token_s, record.first_token_s or 0.0)

    def _count_rows(self, kind: InputKind, served: Sequence[tuple[ClassifyResult | EmbedResult, int, int]]) -> None:
        """Count one call of rows: for each adapter its result, its inputs and its tokens."""
        for result, inputs, tokens in served:
            self._served(result.adapter, result.version).add_rows(kind, inputs, tokens)
            self._observe_load(result.load_began, result.load_s)
        waited_s = served[0][0].waited_s
        all_inputs, all_tokens = sum(inputs for _, inputs, _ in served), sum(tokens for _, _, tokens in served)
        self._metrics.count_rows(kind, all_inputs, waited_s)
        usage = self._metrics.usage.tenant(self.principal.tenant)
        usage.requests += 1
        usage.waits.add(waited_s)
        usage.add_rows(kind, all_inputs, all_tokens)
        self._record.inputs += all_inputs
        self._record.prompt_tokens += all_tokens
        self._record.waited_s = waited_s

    def _served(self, adapter: str | None, version: int | None) -> UsageCounts:
        """Note that an adapter served the request, and return the adapter's usage. Its requests count it once."""
        usage = self._metrics.usage.adapter(adapter, version)
        if adapter not in self._adapters_counted:
            if not self._adapters_counted:
                self._record.adapter, self._record.version = adapter, version
            self._adapters_counted.add(adapter)
            usage.requests += 1
        return usage


class Accounting:
    """Opens the account of each request for inference. Used on the event loop alone."""

    def __init__(self, metrics: ServerMetrics, quotas: Quotas) -> None:
        """Count in `metrics`, and hold tenants to `quotas`."""
        self.rates = Rates()
        self._metrics = metrics
        self._quotas = quotas
        self._generating: dict[str, set[Account]] = {}

    def enter(self, state: State, tenant: str) -> Meter:
        """Charge a request to its tenant, once. Its response then tells what is left, whatever it will be.

        Args:
            state: Of the request.
            tenant: Who the request acts for.

        Raises:
            RateLimitExceeded: The tenant has used its requests or tokens of this minute.
        """
        known: Meter | None = getattr(state, "meter", None)
        if known is not None:
            return known
        quota = self._quotas.of(tenant)
        meter = Meter(self.rates, tenant, quota)
        # `RequestLifecycle` asks it for headers.
        state.meter = meter
        if quota.tokens_per_minute is not None:
            for account in self._generating.get(tenant, ()):
                account.settle()
        self.rates.admit(tenant, quota)
        return meter

    def open(self, request: Request, principal: Principal, asked: Priority | None) -> Account:
        """Open the account of a request, and charge the request itself if that was not done yet.

        Args:
            request: The request.
            principal: Who it acts for.
            asked: The priority that the request names, or None.

        Raises:
            RateLimitExceeded: As `enter`.
            PriorityNotAllowed: The request asks for a higher priority than the tenant may.
        """
        meter = self.enter(request.state, principal.tenant)
        priority = self._quotas.priority(principal.tenant, asked)
        return Account(self._metrics, meter, principal, priority, request.state.record, self._generating)
