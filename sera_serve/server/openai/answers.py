"""What the answers of completions and chat have in common: names, choices, usage, and log-probabilities as JSON.

Log-probabilities are encoded as the tokens come. An answer of many tokens with twenty alternatives each would otherwise
keep the event loop for seconds.
"""

from __future__ import annotations

import codecs
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import pydantic_core
from fastapi import Response

from sera_serve.engine import BASE_TENANT, GenerationResult, GenerationStream, Principal, TokenLogprobs
from sera_serve.random_bytes import random_hex
from sera_serve.server.long_answers import Write
from sera_serve.server.openai.fields import GenerationFields
from sera_serve.server.openai.token_texts import TokenTexts
from sera_serve.server.sse import EventWriter, encode_event

# JSON has no infinity. OpenAI's API gives this number to tokens that are as good as impossible.
_LEAST_LOGPROB = -9999.0
# Log-probabilities of so many tokens are one piece. Of one each, two million take the event loop for two seconds.
_JOINED = 1024


@dataclass(frozen=True)
class Head:
    """The fields that every object of one answer has.

    Attributes:
        id: Name of the answer.
        model: What the request named.
        base: Name of the base.
        created: Seconds since 1970.
    """

    id: str
    model: str
    base: str
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, prefix: str, model: str, base: str) -> Head:
        """Make the head of a new answer."""
        return cls(f"{prefix}-{random_hex(12)}", model, base)

    def fields(self, kind: str, stream: GenerationStream) -> dict[str, Any]:
        """Return the fields of an object."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": fingerprint(stream, self.base),
        }


def fingerprint(stream: GenerationStream | None, base: str) -> str:
    """Return what answers: the version of the stream's adapter, or the base by its name, also where nothing runs."""
    return base if stream is None or stream.adapter is None else f"{stream.adapter}@v{stream.version}"


def to_json(value: Any) -> str:
    """Return compact JSON."""
    # A tenth of the standard library's time: a stream has two for each token.
    return pydantic_core.to_json(value).decode()


def with_member(json_object: str, name: str, value: str) -> str:
    """Add a member, whose value is JSON already, to a JSON object that has members."""
    return f'{json_object[:-1]},"{name}":{value}}}'


def with_choices(content: dict[str, Any], choices: Sequence[str]) -> str:
    """Return the JSON of an object with its choices, which are JSON already."""
    return with_member(to_json(content), "choices", f"[{','.join(choices)}]")


def pieces_with_logprobs(choice: str, logprobs: Iterator[str] | None) -> Iterator[str]:
    """Yield the JSON of a choice with the member `logprobs`, null where there are none."""
    yield f'{choice[:-1]},"logprobs":'
    yield from ("null",) if logprobs is None else logprobs
    yield "}"


def _taken(rows: list[str]) -> Iterator[str]:
    """Yield the rows with commas between them, many at a time, and empty the list meanwhile."""
    rows.reverse()
    while rows:
        block = rows[: -_JOINED - 1 : -1]
        del rows[-_JOINED:]
        yield ",".join(block)
        if rows:
            yield ","


def usage(results: Sequence[GenerationResult], choices: int, principal: Principal) -> dict[str, Any]:
    """Return the usage of an answer. A prompt counts once, however many choices it has.

    Cached tokens tell what was asked before. Prompts share the cache with those of the same tenant alone. Without a
    key, prompts of the base share it with everyone who knows the salt, so their number is not told.

    Args:
        results: `choices` results for each prompt, in order.
        choices: Choices of a prompt.
        principal: Who asks.
    """
    prompts = [results[first : first + choices] for first in range(0, len(results), choices)]
    prompt_tokens = sum(group[0].prompt_tokens for group in prompts)
    completion_tokens = sum(result.completion_tokens for result in results)
    content: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    if principal.tenant != BASE_TENANT:
        # Choices share the prompt's pages with one another. The least number is what was there before all of them.
        cached = sum(min(result.cached_tokens for result in group) for group in prompts)
        content["prompt_tokens_details"] = {"cached_tokens": cached}
    return content


class ChoiceAnswer:
    """What a stream and a whole answer have in common. `kind` and `chunk_kind` are what they have as `object`."""

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, body: GenerationFields, head: Head, principal: Principal) -> None:
        self.body = body
        self.principal = principal
        self._head = head

    def usage(self, results: Sequence[GenerationResult]) -> dict[str, Any]:
        """The usage of the whole answer."""
        return usage(results, self.body.choices, self.principal)

    def chunk(self, stream: GenerationStream) -> dict[str, Any]:
        """The fields of an event, beside its choices and usage."""
        return self._head.fields(self.chunk_kind, stream)

    async def whole(
        self,
        stream: GenerationStream,
        choices: Iterable[Iterable[str]],
        results: Sequence[GenerationResult],
        write: Write,
    ) -> Response:
        """The whole answer.

        Args:
            stream: Its first one.
            choices: The pieces of the JSON of each choice. Log-probabilities may have 100 MB.
            results: Of all streams.
            write: Joins the pieces.
        """
        return Response(await write(self._pieces(stream, choices, results)), media_type="application/json")

    def _pieces(
        self, stream: GenerationStream, choices: Iterable[Iterable[str]], results: Sequence[GenerationResult]
    ) -> Iterator[str]:
        yield f'{to_json(self._head.fields(self.kind, stream))[:-1]},"choices":['
        for number, pieces in enumerate(choices):
            if number:
                yield ","
            yield from pieces
        yield f'],"usage":{to_json(self.usage(results))}}}'


AnswerT = TypeVar("AnswerT", bound=ChoiceAnswer)


class ChoiceEvents(EventWriter, Generic[AnswerT]):
    """Writes a stream of an answer with choices. Each event has a part of one choice."""

    def __init__(self, answer: AnswerT) -> None:
        self.answer = answer

    def end(self, streams: Sequence[GenerationStream]) -> bytes:
        """The usage, if it was asked for, and the end."""
        last = super().end(streams)
        if not self.answer.body.sends_usage:
            return last
        results = [stream.result for stream in streams if stream.result is not None]
        content = self.answer.chunk(streams[0]) | {"choices": [], "usage": self.answer.usage(results)}
        return encode_event(content) + last

    def event(self, stream: GenerationStream, choice: str) -> bytes:
        """The event of a part of a choice, which is JSON already."""
        content = self.answer.chunk(stream)
        if self.answer.body.sends_usage:
            content["usage"] = None
        return f"data: {with_choices(content, [choice])}\n\n".encode()


class CompletionLogprobLists:
    """The four lists of log-probabilities of one text, as JSON."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0
        self._tokens: list[str] = []
        self._logprobs: list[str] = []
        self._top: list[str] = []
        self._offsets: list[str] = []

    def add(self, rows: Sequence[TokenLogprobs], prompt: str | None = None) -> None:
        """Add tokens. `prompt` is the text that they are from, if they are a prompt's."""
        texts = self._texts
        drop_space = prompt is not None and self._adds_space(rows, prompt)
        for row in rows:
            self._tokens.append(json.dumps(texts.name_of(row.token)))
            self._offsets.append(str(self._offset))
            data = texts.bytes_of(row.token)
            # Special tokens are not in the text, unless a prompt has them as text.
            hidden = texts.is_special(row.token) and not (
                prompt is not None and prompt.startswith(data.decode("utf-8", "replace"), self._offset)
            )
            if not hidden:
                text = self._decoder.decode(data)
                if drop_space and text.startswith(" "):
                    text, drop_space = text[1:], False
                self._offset += len(text)
            if row.logprob is None:
                self._logprobs.append("null")
                self._top.append("null")
                continue
            self._logprobs.append(str(_finite(row.logprob)))
            top = {texts.name_of(token): _finite(logprob) for token, logprob in row.top}
            top.setdefault(texts.name_of(row.token), _finite(row.logprob))
            self._top.append(to_json(top))

    def _adds_space(self, rows: Sequence[TokenLogprobs], prompt: str) -> bool:
        """Whether the tokens of a prompt begin with one space more than the prompt, as SentencePiece's do."""
        spaces = 0
        for row in rows:
            text = self._texts.bytes_of(row.token).decode("utf-8", "replace")
            if self._texts.is_special(row.token):
                if prompt.startswith(text):
                    return False
                continue
            spaces += len(text) - len(text.lstrip(" "))
            if text.strip(" "):
                break
        return spaces == len(prompt) - len(prompt.lstrip(" ")) + 1

    def take(self) -> Iterator[str]:
        """Yield the JSON of what was added since the last call, in pieces. Offsets go on."""
        yield '{"tokens":['
        yield from _taken(self._tokens)
        yield '],"token_logprobs":['
        yield from _taken(self._logprobs)
        yield '],"top_logprobs":['
        yield from _taken(self._top)
        yield '],"text_offset":['
        yield from _taken(self._offsets)
        yield "]}"

    def start_after(self, characters: int) -> None:
        """Begin the offsets after so many characters that have no tokens here."""
        self._offset = characters


class ChatLogprobList:
    """The log-probabilities of one message, as JSON."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._rows: list[str] = []

    def add(self, rows: Sequence[TokenLogprobs]) -> None:
        """Add tokens."""
        for row in rows:
            top = [self._row(token, logprob) for token, logprob in row.top]
            content = self._row(row.token, row.logprob or 0.0)
            content["top_logprobs"] = top
            self._rows.append(to_json(content))

    def take(self) -> Iterator[str]:
        """Yield the JSON of what was added since the last call, in pieces."""
        yield '{"content":['
        yield from _taken(self._rows)
        yield '],"refusal":null}'

    def take_rows(self) -> str:
        """Return the rows alone, with commas between them."""
        rows = ",".join(self._rows)
        self._rows.clear()
        return rows

    def _row(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._texts.bytes_of(token)
        return {"token": self._texts.name_of(token), "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
