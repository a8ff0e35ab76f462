"""From the engine's thread to a client's event loop: news, text, and the stream of a generation's tokens."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from sera_serve.engine.request import FinishReason, GenerationRequest
from sera_serve.engine.results import TokenLogprobs
from sera_serve.engine.stop_strings import StopSearch
from sera_serve.errors import DeadlineExceeded, EngineUnavailable
from sera_serve.loop_turns import LoopTurns

# Tokens of one delta, each with its log-probabilities counted as so many more. Many more would keep the event loop. A
# server holds one event of each slow reader: that of 1,024 tokens with 20 log-probabilities each has a megabyte.
_MAX_DELTA = 1024
# Tokens of a prompt that are decoded with the first new ones. All tokens of a long prompt would keep the event loop.
_CONTEXT = 64
# Tokens that may wait for the rest of a character, which has four bytes at most. All that wait are decoded again with
# each new one.
_MOST_PENDING = 16
_MAX_BYTES = 4


class Mailbox:
    """Wakes readers on one event loop: those of one step in one call, because each call crosses threads.

    Attributes:
        loop: The event loop.
        turns: Who may work for long on it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.turns = LoopTurns()
        self._readers: deque[EventReader] = deque()
        self._called = False

    def post(self, reader: EventReader) -> bool:
        """Have `reader.wake` called on the loop; False if the loop is closed."""
        if self.loop.is_closed():
            return False
        self._readers.append(reader)
        if not self._called:
            self._called = True
            try:
                self.loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # closed just now
                return False
        return True

    def _deliver(self) -> None:
        # Before the readers are taken: a post from now on calls again, if in vain.
        self._called = False
        while self._readers:
            self._readers.popleft().wake()


class EventReader:
    """Lets a coroutine wait for news of its requests."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._news = asyncio.Event()

    def notify(self) -> bool:
        """Any thread: there is news; False if the event loop is closed."""
        return self._mailbox.post(self)

    def wake(self) -> None:
        """On the event loop: there is news."""
        self._news.set()

    async def wait(self) -> None:
        """Return when there was news since the last call. The caller then looks at its requests."""
        await self._news.wait()
        self._news.clear()


class Detokenizer:
    """Turns tokens into text as they come: cut at stop strings, and emitted once it can no longer change.

    Text is held back while it may begin a stop string, or a character whose other bytes have not come yet.

    Attributes:
        text: The text emitted so far.
        found: The stop string that was found, or None; the text ends before it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: list[str], min_tokens: int = 0
    ) -> None:
        """Begin after a prompt.

        Args:
            tokenizer: The base's.
            prompt: Its tokens decide whether the first new one begins with a space.
            stop: Strings that end the text.
            min_tokens: In the text of so many tokens no stop string is looked for.
        """
        self._backend = tokenizer.backend_tokenizer
        # Tokens before the pending ones, and those that no text has come of yet.
        self._context = list(prompt[-_CONTEXT:])
        self._pending: list[int] = []
        self._stream = self._new_stream()
        # A token that is skipped waits for no character: it leaves the text as it is.
        self._skipped = _special_tokens(tokenizer)
        self._search = StopSearch(stop)
        self._exempt = min_tokens
        self._held = ""
        self.text = ""
        self.found: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self.found is not None

    def push(self, token: int) -> str:
        """Take one token; returns the text that can no longer change, maybe empty."""
        added = "" if token in self._skipped else self._decoded(token)
        before = len(self._held)
        self._held += added
        if self._exempt:
            self._exempt -= 1
            return self.flush()
        cut = self._search.push(added)
        if cut is not None:
            at, self.found = cut
            self._held = self._held[: before + at]
            return self.flush()
        return self._emit(len(self._held) - self._search.held)

    def flush(self) -> str:
        """End of the sequence: returns what was held back."""
        return self._emit(len(self._held))

    def _decoded(self, token: int) -> str:
        """The text that a token adds to that of the tokens before it."""
        self._pending.append(token)
        try:
            piece = self._stream.step(self._backend, token)
        except Exception:  # noqa: BLE001 - the only class that tokenizers raises, where earlier text has changed
            is_lost = True
        else:
            is_lost = piece is None and len(self._pending) >= _MOST_PENDING
        if is_lost:
            piece = self._text(self._pending)
        if piece and not piece.endswith("\ufffd"):
            self._context = self._pending
        if piece is not None:
            self._pending = []
        if is_lost:
            self._stream = self._new_stream()
        return piece or ""

    def _new_stream(self) -> DecodeStream:
        """A stream after the context: a text's first token may lose its space."""
        # A context that ends within a character would come out again with the rest of it.
        ends = (self._context[: len(self._context) - cut] for cut in range(_MAX_BYTES))
        whole = next((ids for ids in ends if not self._text(ids).endswith("\ufffd")), [])
        return DecodeStream(ids=whole, skip_special_tokens=True)

    def _text(self, ids: list[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=True)
        return text

    def _emit(self, length: int) -> str:
        emitted, self._held = self._held[:length], self._held[length:]
        self.text += emitted
        return emitted


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that `skip_special_tokens` leaves out."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return frozenset(token for token, content in added.items() if content.special)


@dataclass(frozen=True)
class TokenDelta:
    """What was added since the last delta; the text may be empty while it is held back.

    Attributes:
        logprobs: For each of `token_ids`, if asked for.
    """

    text: str
    token_ids: list[int]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class GenerationResult:
    """The whole outcome of a request.

    Attributes:
        cached_tokens: Prompt tokens whose keys and values were in the prefix cache.
        logprobs: For each of `token_ids`, if asked for.
        stop_reason: The stop string, or the id among `stop_token_ids`, that ended it; None where it ended otherwise.
        prompt_logprobs: For each token of the prompt, if asked for.
    """

    id: str
    adapter: str | None
    version: int | None
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    stop_reason: str | int | None = None


class TokensUsed(NamedTuple):
    """Tokens of one generation, finished or not.

    Attributes:
        prompt: Tokens of the prompt.
        cached_prompt: Those of them whose keys and values were in the prefix cache.
        completion: Tokens generated; of a finished one those of its answer.
    """

    prompt: int
    cached_prompt: int
    completion: int


def deadline_exceeded() -> DeadlineExceeded:
    """The error of a request whose time is over."""
    return DeadlineExceeded("timeout_s ran out; ask for less, or give it more time", param="timeout_s")


class GenerationStream(EventReader, AsyncIterator[TokenDelta]):
    """The deltas of one request, in order; `result` is there once they are exhausted.

    Whoever holds a stream exhausts it or calls `aclose`, at any stage: only then are its place in the batch and its
    adapter given back. A slow reader holds nothing but the tokens: the next delta has the tokens that came meanwhile,
    up to 1,024 of them. Log-probabilities count as tokens.

    Attributes:
        request: The request; the engine's threads change it.
        result: The outcome, once there is one.
        on_news: Called on the event loop whenever the request has changed, whether or not anybody reads.
    """

    def __init__(
        self,
        request: GenerationRequest,
        detokenizer: Detokenizer,
        mailbox: Mailbox,
        cancel: Callable[[FinishReason], None],
        interval: int = 1,
    ) -> None:
        """Read a request.

        Args:
            request: Not submitted yet.
            detokenizer: Has the prompt.
            mailbox: Of the running event loop.
            cancel: Has the engine finish the request, for a reason.
            interval: Tokens of a delta, at least, but for the first and the last.
        """
        super().__init__(mailbox)
        self._interval = interval
        self.request = request
        self.result: GenerationResult | None = None
        self.on_news: Callable[[], None] | None = None
        self._detokenizer = detokenizer
        self._cancel = cancel
        self._deadline: asyncio.TimerHandle | None = None
        self._expired = False
        self._token_ids: list[int] = []
        self._closed = False
        request.reader = self

    @property
    def id(self) -> str:
        """Name of the request."""
        return self.request.id

    @property
    def adapter(self) -> str | None:
        """The adapter's name; None is the base model."""
        return self.request.adapter.adapter if self.request.adapter else None

    @property
    def version(self) -> int | None:
        """The adapter's version; None is the base model, or a combination."""
        return self.request.adapter.version or None if self.request.adapter else None

    @property
    def has_started(self) -> bool:
        """Whether the request has run; one of several answers may be refused before that."""
        return self.request.started_at is not None

    @property
    def waited_s(self) -> float:
        """Seconds from the request's arrival until it ran."""
        return self.request.waited_s

    @property
    def first_token_s(self) -> float | None:
        """Seconds from the request's arrival to its first token, or None before that."""
        return self.request.first_token_s

    @property
    def tokens_used(self) -> TokensUsed:
        """Tokens of the prompt and of the answer so far."""
        request = self.request
        completion = request.generated if self.result is None else self.result.completion_tokens
        return TokensUsed(request.prompt_tokens, request.cached_tokens, completion)

    @property
    def computed_tokens(self) -> int:
        """Tokens of the prompt and of the answer so far, without those that the prefix cache had; 0 before it runs."""
        request = self.request
        return max(0, len(request.tokens) - request.cached_tokens) if self.has_started else 0

    @property
    def load_began(self) -> float | None:
        """When the request's adapter began to load for it (`time.monotonic`); None if it was on the device."""
        return self.request.load_began

    @property
    def load_s(self) -> float:
        """Seconds that the load took."""
        return self.request.load_s

    def wake(self) -> None:
        """On the event loop: there is news."""
        if self._has_delta():
            super().wake()
        if self.on_news is not None:
            self.on_news()
        if self._closed:
            self._part()

    def end_at(self, deadline: float) -> None:
        """Cancel the request at a time of the running event loop, whether or not anybody reads by then."""
        if not self._closed:
            self._deadline = asyncio.get_running_loop().call_at(deadline, self._expire)

    async def __anext__(self) -> TokenDelta:
        """The next delta.

        Raises:
            AdapterOverflow, BaseOverflow: The logits are infinite or not a number.
            InvalidRequest: The constraint allows no token.
            EngineUnavailable: The engine failed this request.
            DeadlineExceeded: Its time is over; the deltas before had the tokens that it got.
            TenantOverloaded: It waited, for the first time or again, and gave way to a tenant with fewer requests. Or
                its form, or its log-probabilities, need more memory than those of its tenant may take.
            StoreError, AdapterTooLarge: It waited, for the first time or again, and its adapter was deleted, cannot be
                read, or finds no room among pinned ones.
        """
        if self._closed:
            raise StopAsyncIteration
        request = self.request
        seen = request.prompt_tokens + len(self._token_ids)
        while not self._has_delta():
            await self.wait()
        # The state before the tokens: a request that is finished gets no more of them.
        finished = request.is_finished
        most = _MAX_DELTA if request.params.logprobs is None else _MAX_DELTA // (2 + request.params.logprobs)
        end = min(len(request.tokens), seen + most)
        if request.error is not None:
            self._close()
            # A failure of the engine says that it ended what had begun. All else is the request's own refusal, which it
            # gets as any other request does, though it has run: it may wait again, and its adapter be gone by then.
            if not self.has_started or type(request.error) is not EngineUnavailable:
                raise request.error
            raise EngineUnavailable(f"generation failed: {request.error}; the request may be sent again")
        if end == seen and self._expired:
            self._close()
            raise deadline_exceeded()
        if finished and not self._expired and request.finish_reason is FinishReason.CANCELLED:
            self._close()
            raise StopAsyncIteration
        return self._advance(seen, end, finished and not self._expired and end == len(request.tokens))

    async def aclose(self) -> None:
        """Cancel what is left; a no-op on a finished stream."""
        if not self._closed:
            self._cancel(FinishReason.CANCELLED)
        self._close()

    async def collect(self) -> GenerationResult:
        """Exhaust the stream and return the result; cancelling this cancels the request."""
        try:
            async for _ in self:
                pass
        finally:
            await self.aclose()
        if self.result is None:
            raise EngineUnavailable("the request was closed before it finished")
        return self.result

    def _has_delta(self) -> bool:
        """Whether there is enough for a delta, or nothing more to wait for."""
        if self._expired or self.request.is_finished:
            return True
        seen = len(self._token_ids)
        return self.request.generated - seen >= (self._interval if seen else 1)

    def _advance(self, seen: int, end: int, finished: bool) -> TokenDelta:
        """The delta of `request.tokens[seen:end]`, cut where a stop string ends it."""
        request, text, taken = self.request, "", 0
        for token in request.tokens[seen:end]:
            taken += 1
            if token in request.end_tokens:
                break
            text += self._detokenizer.push(token)
            if self._detokenizer.stopped:
                break
        new = list(request.tokens[seen : seen + taken])
        first = len(self._token_ids)
        self._token_ids += new
        at_end_token = bool(new) and new[-1] in request.end_tokens
        if finished or at_end_token or self._detokenizer.stopped:
            if not request.is_finished:
                self._cancel(FinishReason.STOP)
            text += self._detokenizer.flush()
            # A constraint may end it at any token.
            has_stopped = at_end_token or self._detokenizer.stopped or request.finish_reason is FinishReason.STOP
            stop_token = new[-1] if at_end_token and new[-1] in request.stop_tokens else None
            self._finish("stop" if has_stopped else "length", self._detokenizer.found or stop_token)
        return TokenDelta(text, new, tuple(request.token_logprobs[first : first + taken]))

    def _expire(self) -> None:
        if not self._closed and not self.request.is_finished:
            self._expired = True
            self._cancel(FinishReason.EXPIRED)
            self.wake()

    def _close(self) -> None:
        self._closed = True
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._part()

    def _part(self) -> None:
        """Let go of a request that nothing happens to any more.

        Request, stream and the group of its answers refer to each other. As cycles, they would keep the tokens and
        log-probabilities of each answer until the next collection.
        """
        if not self.request.is_finished:
            return
        self.request.reader = None
        on_news, self.on_news = self.on_news, None
        if on_news is not None:
            on_news()

    def _finish(self, reason: Literal["stop", "length"], stop_reason: str | int | None) -> None:
        request, count = self.request, len(self._token_ids)
        self.result = GenerationResult(
            id=request.id,
            adapter=self.adapter,
            version=self.version,
            text=self._detokenizer.text,
            token_ids=self._token_ids,
            finish_reason=reason,
            prompt_tokens=request.prompt_tokens,
            completion_tokens=count,
            cached_tokens=request.cached_tokens,
            logprobs=tuple(request.token_logprobs[:count]),
            prompt_logprobs=tuple(request.prompt_token_logprobs),
            stop_reason=stop_reason,
        )
        self._close()
