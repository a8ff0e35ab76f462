"""One generation request: what is asked, and the stream of what comes out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Literal

from sera_serve.engine.detokenizer import Detokenizer
from sera_serve.engine.sequences import SequenceUpdate
from sera_serve.errors import DeadlineExceeded, EngineUnavailable

Priority = Literal["low", "normal", "high"]
# The later goes first.
PRIORITIES: tuple[Priority, ...] = ("low", "normal", "high")


@dataclass(frozen=True)
class GenerateParams:
    """A generation request, its ranges already checked by the caller.

    Attributes:
        adapter: Reference such as `tenant/name` or `tenant/name@v3`; None is the bare base.
        prompt: Text to continue; exactly one of it and `token_ids` is set.
        token_ids: Tokens to continue, taken as they are.
        max_new_tokens: The most tokens to generate.
        temperature: 0 is greedy.
        top_p: Sample among the likeliest tokens whose probabilities reach it; 1 is all.
        top_k: Sample among this many likeliest tokens; 0 is all.
        seed: Makes a sampled request repeatable; None draws one.
        stop: Strings that end the text; they are left out of it.
        priority: Which of the tenant's waiting requests go first; other tenants' are unaffected.
        timeout_s: Seconds from its arrival within which it must be finished; None is without end.
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


@dataclass(frozen=True)
class TokenDelta:
    """What one step added; the text may be empty while it is held back."""

    text: str
    token_ids: list[int]


@dataclass(frozen=True)
class GenerationResult:
    """The whole outcome of a request.

    Attributes:
        cached_tokens: Prompt tokens that were not computed again, because an earlier prompt of this tenant's adapter
            began alike.
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


def deadline_exceeded() -> DeadlineExceeded:
    """What a request is told whose time is over."""
    return DeadlineExceeded("timeout_s ran out; ask for less, or give it more time", param="timeout_s")


class GenerationStream(AsyncIterator[TokenDelta]):
    """The deltas of one request, in order; `result` is there once they are exhausted.

    Whoever holds a stream exhausts it or calls `aclose`, at any stage: only then are its place in the batch and its
    adapter given back. A slow reader holds nothing but the tokens: what comes meanwhile is one delta.

    Attributes:
        result: The outcome, once there is one.
        cached_tokens: Prompt tokens found in the cache; the engine sets it before the first token.
        waited_s: Seconds from the request's arrival until it entered the batch.
        first_token_s: Seconds from its arrival to its first token, or None before that.
    """

    def __init__(
        self,
        request_id: str,
        adapter: str | None,
        version: int | None,
        prompt_tokens: int,
        end_tokens: frozenset[int],
        detokenizer: Detokenizer,
        cancel: Callable[[], None],
    ) -> None:
        """Prepare, for a request of which nothing is known yet but that it was accepted."""
        self.id = request_id
        self.adapter = adapter
        self.version = version
        self.result: GenerationResult | None = None
        self._prompt_tokens = prompt_tokens
        self._end_tokens = end_tokens
        self._detokenizer = detokenizer
        self._cancel = cancel
        self.waited_s = 0.0
        self.first_token_s: float | None = None
        self.cached_tokens = 0
        # The latest alone: it has all tokens so far.
        self._update: SequenceUpdate | None = None
        self._news = asyncio.Event()
        self._deadline: asyncio.TimerHandle | None = None
        self._expired = False
        self._tokens: list[int] = []
        self._closed = False

    def deliver(self, update: SequenceUpdate) -> None:
        """Take news from the engine; called on the event loop."""
        if not self._expired:
            self._update = update
            self._news.set()

    def end_at(self, deadline: float) -> None:
        """Cancel the request at a time of the running event loop, whether or not anybody reads by then."""
        self._deadline = asyncio.get_running_loop().call_at(deadline, self._expire)

    async def __anext__(self) -> TokenDelta:
        """The next delta.

        Raises:
            EngineUnavailable: The engine failed this request.
            DeadlineExceeded: Its time is over; what it has got so far was in the deltas before.
        """
        if self._closed or self.result is not None:
            raise StopAsyncIteration
        await self._news.wait()
        update = self._update
        if update is None or (self._expired and len(update.tokens) == len(self._tokens)):
            self._close()
            raise deadline_exceeded()
        if not self._expired:
            self._news.clear()
        if update.error is not None:
            self._close()
            raise EngineUnavailable(f"generation failed: {update.error}; the request may be sent again")
        return self._advance(update)

    async def aclose(self) -> None:
        """Cancel what is left; a no-op on a finished stream."""
        if not self._closed and self.result is None:
            self._cancel()
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

    def _advance(self, update: SequenceUpdate) -> TokenDelta:
        text = ""
        taken = []
        for token in update.tokens[len(self._tokens) :]:
            self._tokens.append(token)
            taken.append(token)
            if token in self._end_tokens:
                break
            text += self._detokenizer.push(token)
            if self._detokenizer.stopped:
                break
        ended_by_token = bool(self._tokens) and self._tokens[-1] in self._end_tokens
        if update.ended or ended_by_token or self._detokenizer.stopped:
            if not update.ended:
                self._cancel()
            text += self._detokenizer.flush()
            self._finish("stop" if ended_by_token or self._detokenizer.stopped else "length")
        return TokenDelta(text, taken)

    def _expire(self) -> None:
        if self._closed or self.result is not None or (self._update is not None and self._update.ended):
            return
        self._expired = True
        self._cancel()
        self._news.set()

    def _close(self) -> None:
        self._closed = True
        if self._deadline is not None:
            self._deadline.cancel()

    def _finish(self, reason: Literal["stop", "length"]) -> None:
        self.result = GenerationResult(
            id=self.id,
            adapter=self.adapter,
            version=self.version,
            text=self._detokenizer.text,
            token_ids=self._tokens,
            finish_reason=reason,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=len(self._tokens),
            cached_tokens=self.cached_tokens,
        )
        self._close()
