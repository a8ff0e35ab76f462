"""A request: what a client asks, for whom, and in which state the request is.

The states, and the only edges between them (`TRANSITIONS`):

    WAITING ---> LOADING ---> WAITING      its adapter is brought to the device; others go before it meanwhile
    WAITING ---> RUNNING                   the loop runs it, under the lease of its adapter
    RUNNING ---> PREEMPTED                 its pages or its row go to another request
    PREEMPTED -> LOADING ---> PREEMPTED    its lease was given back meanwhile
    PREEMPTED -> RUNNING                   its keys and values are computed again
    any -------> FINISHED                  with a `FinishReason`

The scheduler owns the state: it alone calls `move` and `finish`, under its lock. Other threads may read the state.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import or_
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from adapters_store import ResolvedAdapter
from adapters_store import Task as AdapterTask
from sera_kernels import ShapeClasses
from sera_serve.base import ModelInputs, Pooling
from sera_serve.engine.answer_tokens import AnswerTokens
from sera_serve.engine.constraint import ConstraintSpec, TokenConstraint
from sera_serve.engine.results import RowResult, TokenLogprobs
from sera_serve.engine.tenant_memory import LogprobRoom
from sera_serve.residency import Lease, PrefetchHint

MAX_LOGIT_BIAS = 1024
"""The most tokens that a request may give a bias."""

MIN_REPETITION_PENALTY = 0.01
"""The least repetition penalty: the quotient of a logit and it stays finite."""

MAX_CHOICES = 128
"""The most answers to one prompt."""

# The tenant of requests without an adapter; no adapter's tenant can begin with "_".
BASE_TENANT = "_base"

Task = Literal["generate", "classify"]
"""What a runner of the engine does."""
SERVED_AS: dict[AdapterTask, Task | None] = {
    "generate": "generate",
    "classify": "classify",
    "regress": "classify",
    "token-classify": "classify",
    "image-classify": "classify",
    "retrieve": None,
}
"""The runner that an adapter's head or text is for, by its task; None has embeddings alone, which any adapter has."""
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
        max_in_flight: The most requests of the tenant in flight, or None: the engine's own limit alone.
    """

    tenant: str
    key_id: str | None = None
    scopes: frozenset[str] = frozenset({"infer", "publish", "train"})
    max_in_flight: int | None = None


BASE_PRINCIPAL = Principal(BASE_TENANT)
"""Of a request to the base model on a server that asks for no key."""


@dataclass(frozen=True)
class WeightedAdapter:
    """One part of a combination: an adapter's reference, and the factor of its update."""

    adapter: str
    weight: float


AdapterChoice: TypeAlias = str | Sequence[WeightedAdapter]
"""One adapter by its reference, or the weighted sum of several."""


@dataclass(frozen=True)
class GenerateParams:
    """What a client asks of a generation; the caller has checked the ranges.

    Attributes:
        adapter: Reference such as `tenant/name` or `tenant/name@v3`, or several with weights; None is the base model.
        prompt: Text to continue; exactly one of `prompt` and `token_ids` is set.
        token_ids: Tokens to continue, taken as they are.
        add_special_tokens: Whether the tokenizer adds its special tokens to `prompt`; a chat template has written its
            own.
        max_new_tokens: The most tokens to generate; None is as many as the context has room for.
        temperature: 0 is greedy.
        top_p: Sample among the likeliest tokens whose probabilities reach it; 1 is all.
        top_k: Sample among this many likeliest tokens; 0 is all.
        min_p: Sample among the tokens with at least this part of the highest probability; 0 is all.
        presence_penalty: Subtracted once from the logit of each token that was generated before; -2 to 2.
        frequency_penalty: Subtracted for each time that the token was generated before; -2 to 2.
        repetition_penalty: Divides the positive logits of tokens of the prompt or the output, and multiplies negative
            ones; above 0, and 1 changes nothing.
        logit_bias: By token id, added to the logit before the penalties; at most `MAX_LOGIT_BIAS` entries of -100 to
            100.
        seed: Makes a sampled request repeatable; None draws one.
        stop: Strings that end the text; the text does not contain them.
        stop_token_ids: Tokens that end the text, beside the model's own end tokens; the tokens contain them.
        ignore_eos: Whether the model's end tokens do not end the text.
        min_tokens: As many tokens are generated before an end token or a stop may end the text.
        n: Independent answers to one prompt; see `ServingEngine.generate_choices`.
        constraint: What the text must conform to, or None.
        priority: Order among the waiting requests of one tenant; other tenants are unaffected.
        timeout_s: Seconds from the request's arrival to its end; None is without limit.
        cache_salt: Requests under different salts share no cached pages of prompts; requests of one salt and adapter
            do, and of one salt to the base model.
        logprobs: Return the log-probability of each generated token and of this many likeliest ones; None is none.
        prompt_logprobs: The same for the tokens of the prompt.
    """

    adapter: AdapterChoice | None = None
    prompt: str | None = None
    token_ids: list[int] | None = None
    add_special_tokens: bool = True
    max_new_tokens: int | None = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    min_tokens: int = 0
    n: int = 1
    constraint: ConstraintSpec | None = None
    priority: Priority = "normal"
    timeout_s: float | None = None
    cache_salt: str | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class EmbeddingSpec:
    """How a row's hidden states become one vector.

    Attributes:
        pooling: None is the adapter's own pooling, and without one the base's.
        normalize: Whether the vector is scaled to length 1.
    """

    pooling: Pooling | None = None
    normalize: bool = True


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
    """Each of its rows has its result."""
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
        load_began: When it first waited for a lease that was not granted at once; None before.
        load_s: Seconds of that wait: for room on the device, and for the load.
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
    load_began: float | None = field(default=None, init=False)
    load_s: float = field(default=0.0, init=False)

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

    @property
    def shape_classes(self) -> ShapeClasses:
        """The kinds of shapes of its adapter, while it runs."""
        return ShapeClasses() if self.lease is None else self.lease.placement.adapter.classes

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
        # Read once: the event loop takes the reader away.
        reader = self.reader
        return reader is None or reader.notify()


@dataclass(eq=False, kw_only=True)
class GenerationRequest(Request):
    """A request for tokens, and its place in the paged cache. Set by the loop's thread alone once it runs.

    Attributes:
        tokens: The prompt, then what was generated; see `AnswerTokens`.
        limit: Length of `tokens` at which it ends.
        end_tokens: Tokens that end it: the model's own, unless they are ignored, and the client's.
        stop_tokens: Those of the end tokens that the client named.
        base_end_tokens: The model's own, whether or not they are ignored: they end what a constraint allows.
        params: What its call asks.
        seed: Of its sampling; that of the call for the first answer.
        constraint: Which tokens may come next, or None; it has accepted the generated tokens.
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
        logprob_room: What its call's log-probabilities may take, where any are asked for.
        first_token_s: Seconds from its arrival to its first token; None before that.
    """

    tokens: list[int] | AnswerTokens = field(default_factory=list)
    limit: int = 0
    end_tokens: frozenset[int] = frozenset()
    stop_tokens: frozenset[int] = frozenset()
    base_end_tokens: frozenset[int] = frozenset()
    params: GenerateParams = field(default_factory=GenerateParams)
    seed: int = 0
    constraint: TokenConstraint | None = None
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
    logprob_room: LogprobRoom | None = field(default=None, init=False)
    first_token_s: float | None = field(default=None, init=False)

    def finish(self, reason: FinishReason, error: Exception | None = None) -> None:
        """Go to FINISHED. The constraint's memory, which may be much, does not wait for the reader."""
        super().finish(reason, error)
        self.constraint = None

    @property
    def is_decoding(self) -> bool:
        """Whether exactly one token is left to run: the next one is sampled from it."""
        return self.computed == len(self.tokens) - 1

    @property
    def has_truncation(self) -> bool:
        """Whether sampling leaves out any token."""
        params = self.params
        return params.temperature > 0 and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)

    @property
    def generated(self) -> int:
        """How many tokens were generated."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def bars_end(self) -> bool:
        """Whether the next token must not be an end token."""
        return self.params.min_tokens > 0 and self.generated < self.params.min_tokens

    @cached_property
    def has_penalties(self) -> bool:
        """Whether tokens that were there before are less likely."""
        params = self.params
        return bool(params.presence_penalty or params.frequency_penalty) or params.repetition_penalty != 1

    @property
    def has_bias_now(self) -> bool:
        """Whether something is added to the scores of the next token."""
        return self._has_bias or self.bars_end

    @property
    def adjusts_now(self) -> bool:
        """Whether the scores of the next token are others than the model's."""
        return self.has_penalties or self._has_bias or self.bars_end

    @property
    def needs_logits(self) -> bool:
        """Whether its next step has to hand on logits, beside a token."""
        return self.params.logprobs is not None or self.adjusts_now

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether a token of the prompt still has to get its log-probability."""
        return self.params.prompt_logprobs is not None and len(self.prompt_token_logprobs) < self.prompt_tokens

    @cached_property
    def _has_bias(self) -> bool:
        return bool(self.params.logit_bias) or self.constraint is not None

    @cached_property
    def bias_entries(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The tokens of `logit_bias` and their values."""
        bias, count = self.params.logit_bias, len(self.params.logit_bias)
        return np.fromiter(bias.keys(), np.int64, count), np.fromiter(bias.values(), np.float32, count)


@dataclass(eq=False, kw_only=True)
class ClassificationRequest(Request):
    """Rows of one call that go into the batch together: as many as one pass may take.

    Attributes:
        rows: The inputs.
        positions: Place of each row in the call.
        embedding: How the rows become vectors; None gives scores of labels.
        results: Of each row; None until it has run.
    """

    rows: list[ModelInputs] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    embedding: EmbeddingSpec | None = None
    results: list[RowResult | None] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.results = [None] * len(self.rows)


def classes_of(requests: Iterable[Request]) -> ShapeClasses:
    """The kinds of shapes of the requests' adapters, while they run."""
    return reduce(or_, {request.shape_classes for request in requests}, ShapeClasses())
