"""A request: what a client asks, for whom, and in which state the request is.

The states, and the only edges between them (`TRANSITIONS`):

    WAITING ---> LOADING ---> WAITING      its adapter is brought to the device; others go before it meanwhile
    WAITING ---> RUNNING                   the loop runs it, under the lease of its adapter
    RUNNING ---> PREEMPTED                 its pages are needed by a request with a higher claim
    PREEMPTED -> LOADING ---> PREEMPTED    its lease was given back meanwhile
    PREEMPTED -> RUNNING                   its keys and values are computed again
    any -------> FINISHED                  with a `FinishReason`

The scheduler owns the state: it alone calls `move` and `finish`, under its lock. Other threads may read the state.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, Protocol

from adapters_store import ResolvedAdapter
from sera_kernels import NO_ADAPTER, ShapeClasses
from sera_serve.base import ModelInputs
from sera_serve.residency import Lease, PrefetchHint

# The tenant of requests without an adapter; no adapter's tenant can begin with "_".
BASE_TENANT = "_base"

Task = Literal["generate", "classify"]
Priority = Literal["low", "normal", "high"]
# A later one goes first.
PRIORITIES: tuple[Priority, ...] = ("low", "normal", "high")


@dataclass(frozen=True)
class Principal:
    """Who a request acts for. The HTTP layer decides it, and the engine only reads it.

    Attributes:
        tenant: Who is charged, limited and counted.
        key_id: The key that the request was sent with, or None where the server asks for no key.
        scopes: What the request may do.
    """

    tenant: str
    key_id: str | None = None
    scopes: frozenset[str] = frozenset({"infer", "publish", "train"})


BASE_PRINCIPAL = Principal(BASE_TENANT)
"""Of a request to the base model on a server that asks for no key."""


@dataclass(frozen=True)
class GenerateParams:
    """What a client asks of a generation; the caller has checked the ranges.

    Attributes:
        adapter: Reference such as `tenant/name` or `tenant/name@v3`; None is the base model.
        prompt: Text to continue; exactly one of `prompt` and `token_ids` is set.
        token_ids: Tokens to continue, taken as they are.
        max_new_tokens: The most tokens to generate.
        temperature: 0 is greedy.
        top_p: Sample among the likeliest tokens whose probabilities reach it; 1 is all.
        top_k: Sample among this many likeliest tokens; 0 is all.
        seed: Makes a sampled request repeatable; None draws one.
        stop: Strings that end the text; the text does not contain them.
        priority: Order among the waiting requests of one tenant; other tenants are unaffected.
        timeout_s: Seconds from the request's arrival to its end; None is without limit.
        cache_salt: Requests under different salts share no cached pages of prompts; requests of one salt and adapter
            do, and of one salt to the base model.
        logprobs: Return the log-probability of each generated token and of this many likeliest ones; None is none.
        prompt_logprobs: The same for the tokens of the prompt.
    """

    adapter: str | None = None
    prompt: str | None = None
    token_ids: list[int] | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    priority: Priority = "normal"
    timeout_s: float | None = None
    cache_salt: str | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the model before temperature and noise, adapters included.

    Attributes:
        token: The token at this position.
        logprob: Its log-probability; None for a prompt's first token, which nothing comes before.
        top: The likeliest tokens and their log-probabilities, likeliest first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class LabelScores:
    """The likeliest label of one input, and the probability of each label."""

    label: str
    probabilities: dict[str, float]


class RequestState(enum.Enum):
    """Where a request is; the file's docstring has the diagram."""

    WAITING = enum.auto()
    LOADING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED = enum.auto()


TRANSITIONS: Mapping[RequestState, frozenset[RequestState]] = {
    RequestState.WAITING: frozenset({RequestState.LOADING, RequestState.RUNNING, RequestState.FINISHED}),
    RequestState.LOADING: frozenset({RequestState.WAITING, RequestState.PREEMPTED, RequestState.FINISHED}),
    RequestState.RUNNING: frozenset({RequestState.PREEMPTED, RequestState.FINISHED}),
    RequestState.PREEMPTED: frozenset({RequestState.LOADING, RequestState.RUNNING, RequestState.FINISHED}),
    RequestState.FINISHED: frozenset(),
}


class FinishReason(enum.Enum):
    """Why a request is finished."""

    STOP = "stop"
    """An end token or a stop string came."""
    LENGTH = "length"
    """It has as many tokens as it asked for."""
    COMPLETED = "completed"
    """Each of its rows is classified."""
    CANCELLED = "cancelled"
    """Its client no longer waits for it."""
    EXPIRED = "expired"
    """It was not finished by its deadline, or not started in the time that the settings allow."""
    SHED = "shed"
    """It gave way to a tenant with fewer requests."""
    FAILED = "failed"
    """Its adapter could not be loaded, its step failed, or the engine stopped."""

    @property
    def is_served(self) -> bool:
        """Whether the request got what it asked for."""
        return self in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.COMPLETED)


class IllegalTransition(RuntimeError):
    """A request was moved along an edge that does not exist."""


class Reader(Protocol):
    """The client's side of a request."""

    def notify(self) -> bool:
        """Tell the reader, from any thread, that the request has changed; False if its event loop is closed."""


@dataclass(eq=False, kw_only=True)
class Request:
    """One unit that the scheduler runs, from its arrival to its end.

    A client's call is one request. A call that is too large for one step has child requests, which run on their own;
    their `parent` stands for the call: it is counted by admission, and never queued.

    Attributes:
        principal: Who it acts for.
        id: Name in answers and logs.
        priority: The higher goes first, among requests of the same tenant only.
        prompt_tokens: Tokens that its tenant is charged for when it starts.
        num_rows: Rows of the batch that it takes.
        adapter: What its reference resolved to; None is the base model.
        parent: The call that it is a part of, or None.
        reader: Told of every change, or None.
        arrived: Seconds, `time.monotonic`.
        state: See the file's docstring.
        finish_reason: Why it is finished; None before.
        error: What its client is told, where it was not served.
        started_at: When it first ran; None before.
        order: Place in the order of arrival; -1 until it is queued.
        admitted: Whether the admission controller counts it.
        lease: The right to use its adapter; held while it runs, and at times while it waits.
        hint: Keeps its adapter near while it waits.
        loading: The lease that it waits for.
    """

    principal: Principal
    id: str = ""
    priority: int = 0
    prompt_tokens: int = 0
    num_rows: int = 1
    adapter: ResolvedAdapter | None = None
    parent: Request | None = None
    reader: Reader | None = None
    arrived: float = field(default_factory=time.monotonic)

    state: RequestState = field(default=RequestState.WAITING, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    error: Exception | None = field(default=None, init=False)
    started_at: float | None = field(default=None, init=False)
    order: int = field(default=-1, init=False)
    admitted: bool = field(default=False, init=False)
    lease: Lease | None = field(default=None, init=False)
    hint: PrefetchHint | None = field(default=None, init=False)
    loading: Future[Lease] | None = field(default=None, init=False)

    @property
    def tenant(self) -> str:
        """Who is charged for it."""
        return self.principal.tenant

    @property
    def digest(self) -> str | None:
        """The adapter that it needs on the device; None is the base model."""
        return None if self.adapter is None else self.adapter.digest

    @property
    def rank(self) -> tuple[int, int]:
        """Place among its tenant's requests; the lowest goes first."""
        return -self.priority, self.order

    @property
    def is_queued(self) -> bool:
        """Whether it waits for its turn."""
        return self.state in (RequestState.WAITING, RequestState.LOADING, RequestState.PREEMPTED)

    @property
    def is_finished(self) -> bool:
        """Whether nothing happens to it any more."""
        return self.state is RequestState.FINISHED

    @property
    def waited_s(self) -> float:
        """Seconds from its arrival until it started; 0 before that."""
        return 0.0 if self.started_at is None else self.started_at - self.arrived

    def move(self, state: RequestState) -> None:
        """Go to another state.

        Raises:
            IllegalTransition: There is no such edge.
        """
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransition(f"request {self.id!r} cannot go from {self.state.name} to {state.name}")
        self.state = state

    def finish(self, reason: FinishReason, error: Exception | None = None) -> None:
        """Go to FINISHED, with what its client is told."""
        if self.is_finished:
            raise IllegalTransition(f"request {self.id!r} is finished already")
        # Before the state: a reader that sees FINISHED reads them without a lock.
        self.finish_reason, self.error = reason, error
        self.move(RequestState.FINISHED)

    def notify(self) -> bool:
        """Tell the reader that something has changed; False if nobody reads any more."""
        return self.reader is None or self.reader.notify()


@dataclass(eq=False, kw_only=True)
class GenerationRequest(Request):
    """A request for tokens, and its place in the paged cache. Set by the loop's thread alone once it runs.

    Attributes:
        tokens: The prompt, then what was generated.
        limit: Length of `tokens` at which it ends.
        end_tokens: Tokens that end it.
        temperature, top_k, top_p, seed: Sampling, as in `GenerateParams`.
        logprobs, prompt_logprobs: As in `GenerateParams`.
        prefix_key: Requests of one key share the cached pages of prompts that begin alike; with None it shares with
            no other, because its waiting time would tell what others have asked.
        adapter_from: Position of the first token that uses the adapter; tokens before it use the base model.
        computed: Tokens whose keys and values are in the pool.
        cached_tokens: Prompt tokens that were found in the prefix cache when it first ran.
        pages: Its pages, in order; a full page that is shared is never written.
        page_keys: Chain keys of its first full pages, as far as they are known.
        row: Row of the loop's tables, or -1 while it does not run.
        rotary_side: The side of its base's rotary threshold that its keys were computed for.
        token_logprobs: For each generated token, if asked for.
        prompt_token_logprobs: For each prompt token, if asked for.
        first_token_s: Seconds from its arrival to its first token; None before that.
    """

    tokens: list[int] = field(default_factory=list)
    limit: int = 0
    end_tokens: frozenset[int] = frozenset()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prefix_key: str | None = None
    adapter_from: int = 0

    computed: int = field(default=0, init=False)
    cached_tokens: int = field(default=0, init=False)
    pages: list[int] = field(default_factory=list, init=False)
    page_keys: list[bytes] = field(default_factory=list, init=False)
    row: int = field(default=-1, init=False)
    rotary_side: int = field(default=0, init=False)
    token_logprobs: list[TokenLogprobs] = field(default_factory=list, init=False)
    prompt_token_logprobs: list[TokenLogprobs] = field(default_factory=list, init=False)
    first_token_s: float | None = field(default=None, init=False)

    @property
    def is_decoding(self) -> bool:
        """Whether exactly one token is left to run: the next one is sampled from it."""
        return self.computed == len(self.tokens) - 1

    @property
    def has_truncation(self) -> bool:
        """Whether sampling leaves out any token."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)

    @property
    def shape_classes(self) -> ShapeClasses:
        """The kinds of shapes of its adapter, while it runs."""
        return ShapeClasses() if self.lease is None else self.lease.placement.adapter.classes

    @property
    def adapter_slot(self) -> int:
        """Slot of its adapter on the device while it runs."""
        return NO_ADAPTER if self.lease is None else self.lease.slot


@dataclass(eq=False, kw_only=True)
class ClassificationRequest(Request):
    """Rows of one call that go into the batch together: as many as one pass may take.

    Attributes:
        rows: The inputs.
        positions: Place of each row in the call.
        scores: Of each row; None until it is classified.
    """

    rows: list[ModelInputs] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    scores: list[LabelScores | None] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.scores = [None] * len(self.rows)
