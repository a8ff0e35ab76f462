"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Response

from sera_serve.engine import GenerationResult, GenerationStream, Principal, TokenDelta
from sera_serve.server.accounting import Account
from sera_serve.server.deps import ContextOf
from sera_serve.server.long_answers import Write
from sera_serve.server.openai.answers import (
    ChatLogprobList,
    ChoiceAnswer,
    ChoiceEvents,
    Head,
    pieces_with_logprobs,
    to_json,
    with_member,
)
from sera_serve.server.openai.chat_schemas import ChatCompletion, ChatRequest
from sera_serve.server.openai.errors import OpenAIRoute, translated_errors
from sera_serve.server.openai.texts import ChatPrompt, Conversation, Texts, TextsOf, adapter_of
from sera_serve.server.openai.tool_calls import Call, ToolCallParser, constraint_of_calls, parser_of_calls
from sera_serve.server.openapi import stream_of
from sera_serve.server.sse import Admit, EventStream, collect

router = APIRouter(route_class=OpenAIRoute, tags=["openai"])

# The field that holds the prompt is called messages here.
_translated = partial(translated_errors, "messages")


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses={200: {"content": stream_of()}},
)
async def chat_completions(body: ChatRequest, context: ContextOf, texts: TextsOf) -> Response:
    """Answer a conversation, in the form of OpenAI's API."""
    adapter = adapter_of(body.model, context.engine)
    account = context.open_account(context.principal(adapter), body.priority)
    principal = account.principal
    conversation = Conversation(
        messages=body.messages,
        tools=(body.tools or ()) if body.has_tools else (),
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        variables=body.chat_template_kwargs,
    )
    work = texts.executor.run_in_turn(principal.tenant, texts.chat_prompt, conversation, adapter, "generate")
    prompt = await context.finish(work)
    params = body.params(
        prompt.adapter,
        account.priority,
        prompt=prompt.text,
        # The template has written them.
        add_special_tokens=False,
        max_new_tokens=body.most_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        constraint=constraint_of_calls(body, prompt.template.call_format),
    )
    admit = partial(context.engine.generate_choices, params, principal, context.received_at)
    head = Head.of("chatcmpl", body.model, context.engine.base.name)
    answer = ChatAnswer(body, head, principal, prompt, texts)
    if body.stream:
        return EventStream(admit, ChatEvents(answer), account, _translated)
    with _translated():
        return await context.finish(_complete(answer, admit, account, context.written))


class ChatAnswer(ChoiceAnswer):
    """What a stream and a whole answer have in common: the calls and the log-probabilities of each choice's text."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, body: ChatRequest, head: Head, principal: Principal, prompt: ChatPrompt, texts: Texts) -> None:
        super().__init__(body, head, principal)
        self._parsers: list[ToolCallParser] | None = None
        if body.has_tools:
            self._parsers = [parser_of_calls(body, prompt.template.call_format) for _ in range(body.choices)]
        self._logprobs = [ChatLogprobList(texts.tokens) for _ in range(body.choices)] if body.logprobs else None

    def pieces(self, index: int, text: str) -> list[str | Call]:
        """The content and the calls that a piece of a choice's text adds."""
        if self._parsers is None:
            return [text] if text else []
        return self._parsers[index].push(text)

    def rest(self, index: int) -> list[str | Call]:
        """The content and the calls at the end of a choice's text."""
        return [] if self._parsers is None else self._parsers[index].end()

    def add_logprobs(self, index: int, delta: TokenDelta) -> None:
        """Take the log-probabilities of a choice's tokens."""
        if self._logprobs is not None:
            self._logprobs[index].add(delta.logprobs)

    def logprobs(self, index: int) -> Iterator[str] | None:
        """The JSON of the log-probabilities since the last call, in pieces, or None if they were not asked for."""
        return None if self._logprobs is None else self._logprobs[index].take()

    def finish_reason(self, index: int, result: GenerationResult) -> str:
        """Why a choice has ended."""
        called = self._parsers is not None and bool(self._parsers[index].calls)
        return "tool_calls" if called and result.finish_reason == "stop" else result.finish_reason


class ChatEvents(ChoiceEvents[ChatAnswer]):
    """Writes a stream of chat completions. A call comes as a whole."""

    def __init__(self, answer: ChatAnswer) -> None:
        super().__init__(answer)
        self._called: dict[int, int] = {}

    def begin(self, streams: Sequence[GenerationStream]) -> bytes:
        """The role of each choice."""
        delta = {"role": "assistant", "content": ""}
        return b"".join(self._event(stream, index, delta) for index, stream in enumerate(streams))

    def delta(self, index: int, stream: GenerationStream, delta: TokenDelta) -> bytes:
        """What a piece of text adds."""
        self.answer.add_logprobs(index, delta)
        deltas = self._deltas(index, self.answer.pieces(index, delta.text))
        pieces = self.answer.logprobs(index)
        logprobs = None if pieces is None else "".join(pieces)
        if logprobs is not None and not deltas:
            # The text is held back. Its tokens are known already.
            deltas = [{"content": ""}]
        events = b""
        for each in deltas:
            events += self._event(stream, index, each, logprobs)
            logprobs = None
        return events

    def final(self, index: int, stream: GenerationStream, result: GenerationResult) -> bytes:
        """What was held back, and why the choice has ended."""
        events = [self._event(stream, index, delta) for delta in self._deltas(index, self.answer.rest(index))]
        events.append(self._event(stream, index, {}, None, self.answer.finish_reason(index, result)))
        return b"".join(events)

    def _deltas(self, index: int, pieces: Sequence[str | Call]) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for piece in pieces:
            if isinstance(piece, str):
                deltas.append({"content": piece})
                continue
            place = self._called.get(index, 0)
            self._called[index] = place + 1
            deltas.append({"tool_calls": [{"index": place, **_call(piece)}]})
        return deltas

    def _event(
        self,
        stream: GenerationStream,
        index: int,
        delta: dict[str, Any],
        logprobs: str | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        choice = to_json({"index": index, "delta": delta, "finish_reason": finish_reason})
        return self.event(stream, with_member(choice, "logprobs", logprobs or "null"))


async def _complete(answer: ChatAnswer, admit: Admit, account: Account, write: Write) -> Response:
    streams, results = await collect(admit, account, answer.add_logprobs)
    choices = (_choice(answer, index, result) for index, result in enumerate(results))
    return await answer.whole(streams[0], choices, results, write)


def _choice(answer: ChatAnswer, index: int, result: GenerationResult) -> Iterator[str]:
    """The pieces of the JSON of a whole choice."""
    pieces = answer.pieces(index, result.text) + answer.rest(index)
    content = "".join(piece for piece in pieces if isinstance(piece, str))
    calls = [_call(piece) for piece in pieces if isinstance(piece, Call)]
    message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else "")}
    message["refusal"] = None
    if calls:
        message["tool_calls"] = calls
    choice = {"index": index, "message": message, "finish_reason": answer.finish_reason(index, result)}
    return pieces_with_logprobs(to_json(choice), answer.logprobs(index))


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
