"""`POST /v1/responses`, without state: the conversation comes with the request, and no answer is kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from fastapi import APIRouter, Response

from sera_serve.engine import GenerationResult, GenerationStream, Principal, TokenDelta
from sera_serve.random_bytes import random_hex
from sera_serve.server.accounting import Account
from sera_serve.server.deps import ContextOf
from sera_serve.server.errors import renamed_fields
from sera_serve.server.openai.answers import ChatLogprobList, fingerprint, to_json, usage, with_member
from sera_serve.server.openai.errors import OpenAIRoute, translated_errors
from sera_serve.server.openai.response_schemas import ResponseObject, ResponseRequest
from sera_serve.server.openai.texts import ChatPrompt, Conversation, Texts, TextsOf, adapter_of
from sera_serve.server.openai.tool_calls import Call, constraint_of_calls, parser_of_calls
from sera_serve.server.openapi import stream_of
from sera_serve.server.sse import Admit, EventStream, EventWriter, collect

router = APIRouter(route_class=OpenAIRoute, tags=["openai"])

# Fields of the shared code by their names in this route.
_NAMES = {
    "prompt": "input",
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
    "response_format": "text.format",
    "response_format.json_schema.schema": "text.format.schema",
}
_EMPTY_PART = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}

Event = tuple[str, str]
"""An event's type, and the JSON of an object with its other members."""


@router.post(
    "/v1/responses",
    response_model=ResponseObject,
    responses={200: {"content": stream_of()}},
)
async def responses(body: ResponseRequest, context: ContextOf, texts: TextsOf) -> Response:
    """Answer a conversation, in the form of OpenAI's newer API."""
    adapter = adapter_of(body.model, context.engine)
    account = context.open_account(context.principal(adapter), body.priority)
    principal = account.principal
    tools = [tool.as_tool() for tool in body.tools or ()]
    conversation = Conversation(
        messages=body.messages(), tools=tools if body.has_tools else (), variables=body.chat_template_kwargs
    )
    with _translated():
        work = texts.executor.run_in_turn(principal.tenant, texts.chat_prompt, conversation, adapter, "generate")
        prompt = await context.finish(work)
        constraint = constraint_of_calls(body, prompt.template.call_format)
    params = body.params(
        prompt.adapter,
        account.priority,
        prompt=prompt.text,
        # The template has written them.
        add_special_tokens=False,
        max_new_tokens=body.max_output_tokens,
        logprobs=(body.top_logprobs or 0) if body.has_logprobs else None,
        constraint=constraint,
    )
    admit = partial(context.engine.generate_choices, params, principal, context.received_at)
    answer = ResponseAnswer(body, principal, prompt, texts, context.engine.base.name)
    if body.stream:
        return EventStream(admit, ResponseEvents(answer), account, _translated)
    with _translated():
        return await context.finish(_complete(answer, admit, account))


@contextmanager
def _translated() -> Iterator[None]:
    """Turn refusals of the engine and the store into those of this interface, with the names of this route."""
    with renamed_fields(_NAMES), translated_errors():
        yield


class Output:
    """The items of one answer, and the events that tell of them: messages and calls, in the order of the text."""

    def __init__(self) -> None:
        self._items: list[str] = []
        self._message: str | None = None
        self._text: list[str] = []
        self._rows: list[str] = []

    @property
    def items(self) -> str:
        """The JSON of the finished items."""
        return f"[{','.join(self._items)}]"

    def add(self, pieces: Sequence[str | Call], rows: str = "") -> Iterator[Event]:
        """Add content and calls.

        Args:
            pieces: What is added.
            rows: JSON of the log-probabilities of what is added, with commas between them. There are then no calls.
        """
        if rows and not pieces:
            # The text is held back. Its tokens are known already.
            pieces = [""]
        for piece in pieces:
            if isinstance(piece, Call):
                yield from self._close("completed")
                yield from self._call(piece)
                continue
            if self._message is None:
                yield from self._open()
            self._text.append(piece)
            if rows:
                self._rows.append(rows)
            content = with_member(to_json(self._place() | {"delta": piece}), "logprobs", f"[{rows}]")
            yield "response.output_text.delta", content
            rows = ""

    def end(self, is_complete: bool) -> Iterator[Event]:
        """End the answer. An answer without any text is an empty message."""
        if self._message is None and not self._items:
            yield from self._open()
        yield from self._close("completed" if is_complete else "incomplete")

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message, "output_index": len(self._items), "content_index": 0}

    def _open(self) -> Iterator[Event]:
        self._message = f"msg_{random_hex(24)}"
        item = {"id": self._message, "type": "message", "status": "in_progress", "role": "assistant", "content": []}
        yield "response.output_item.added", to_json({"output_index": len(self._items), "item": item})
        yield "response.content_part.added", to_json(self._place() | {"part": _EMPTY_PART})

    def _close(self, status: str) -> Iterator[Event]:
        if self._message is None:
            return
        text, place = "".join(self._text), self._place()
        item = to_json({"id": self._message, "type": "message", "status": status, "role": "assistant"})
        part = to_json({"type": "output_text", "text": text, "annotations": []})
        # Log-probabilities are large. They come with the deltas and with the whole answer, and not between.
        brief_part = with_member(part, "logprobs", "[]")
        yield "response.output_text.done", to_json(place | {"text": text, "logprobs": []})
        yield "response.content_part.done", with_member(to_json(place), "part", brief_part)
        index = to_json({"output_index": len(self._items)})
        yield "response.output_item.done", with_member(index, "item", with_member(item, "content", f"[{brief_part}]"))
        whole = with_member(part, "logprobs", f"[{','.join(self._rows)}]")
        self._items.append(with_member(item, "content", f"[{whole}]"))
        self._message = None
        self._text.clear()
        self._rows.clear()

    def _call(self, call: Call) -> Iterator[Event]:
        index = len(self._items)
        item = {"id": f"fc_{random_hex(24)}", "type": "function_call", "status": "in_progress"}
        item |= {"call_id": call.id, "name": call.name, "arguments": ""}
        yield "response.output_item.added", to_json({"output_index": index, "item": item})
        place = {"item_id": item["id"], "output_index": index}
        yield "response.function_call_arguments.delta", to_json(place | {"delta": call.arguments})
        done = place | {"name": call.name, "arguments": call.arguments}
        yield "response.function_call_arguments.done", to_json(done)
        item |= {"status": "completed", "arguments": call.arguments}
        yield "response.output_item.done", to_json({"output_index": index, "item": item})
        self._items.append(to_json(item))


class ResponseAnswer:
    """What a stream and a whole answer have in common: the request, and the items of the answer."""

    def __init__(
        self, body: ResponseRequest, principal: Principal, prompt: ChatPrompt, texts: Texts, base: str
    ) -> None:
        self.output = Output()
        self._id = f"resp_{random_hex(24)}"
        self._created = int(time.time())
        self._body = body
        self._base = base
        self._principal = principal
        self._repeated = to_json(_repeated(body))
        self._logprobs = ChatLogprobList(texts.tokens) if body.has_logprobs else None
        self._parser = parser_of_calls(body, prompt.template.call_format) if body.has_tools else None

    def add_logprobs(self, index: int, delta: TokenDelta) -> None:
        """Take the log-probabilities of the answer's tokens."""
        if self._logprobs is not None:
            self._logprobs.add(delta.logprobs)

    def add(self, text: str) -> Iterator[Event]:
        """Add a piece of the text, and the log-probabilities that were taken."""
        rows = "" if self._logprobs is None else self._logprobs.take_rows()
        pieces = ([text] if text else []) if self._parser is None else self._parser.push(text)
        return self.output.add(pieces, rows)

    def end(self, result: GenerationResult) -> Iterator[Event]:
        """End the text."""
        if self._parser is not None:
            yield from self.output.add(self._parser.end())
        yield from self.output.end(result.finish_reason != "length")

    def response(
        self,
        stream: GenerationStream | None,
        result: GenerationResult | None = None,
        failure: dict[str, Any] | None = None,
    ) -> tuple[str, str]:
        """Return (status, JSON) of the whole answer: as it ended, as it failed, or else as it begins.

        Args:
            stream: The stream of its text, if there is one.
            result: How it ended.
            failure: `code` and `message` of its failure.
        """
        status, reason, tokens = "in_progress", None, None
        if failure is not None:
            status = "failed"
        elif result is not None:
            status, tokens = "completed", self._usage(result)
            if result.finish_reason == "length":
                status, reason = "incomplete", {"reason": "max_output_tokens"}
        content = {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "model": self._body.model,
            "system_fingerprint": fingerprint(stream, self._base),
            "error": failure,
            "incomplete_details": reason,
            "usage": tokens,
        }
        whole = with_member(to_json(content), "output", self.output.items)
        return status, f"{whole[:-1]},{self._repeated[1:]}"

    def _usage(self, result: GenerationResult) -> dict[str, Any]:
        tokens = usage([result], 1, self._principal)
        return {
            "input_tokens": tokens["prompt_tokens"],
            # Clients expect the number. It is 0 where it would tell one client about another.
            "input_tokens_details": tokens.get("prompt_tokens_details", {"cached_tokens": 0}),
            "output_tokens": tokens["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": tokens["total_tokens"],
        }


class ResponseEvents(EventWriter):
    """Writes a stream of named events. Each has the next `sequence_number`. A call comes as a whole."""

    def __init__(self, answer: ResponseAnswer) -> None:
        self._answer = answer
        self._stream: GenerationStream | None = None
        self._sent = 0

    def begin(self, streams: Sequence[GenerationStream]) -> bytes:
        """The answer as it begins."""
        (self._stream,) = streams
        response = f'{{"response":{self._answer.response(self._stream)[1]}}}'
        return self._events([("response.created", response), ("response.in_progress", response)])

    def delta(self, index: int, stream: GenerationStream, delta: TokenDelta) -> bytes:
        """What a piece of text adds."""
        self._answer.add_logprobs(index, delta)
        return self._events(self._answer.add(delta.text))

    def final(self, index: int, stream: GenerationStream, result: GenerationResult) -> bytes:
        """What was held back, and the whole answer."""
        events = self._events(self._answer.end(result))
        status, response = self._answer.response(stream, result)
        return events + self._events([(f"response.{status}", f'{{"response":{response}}}')])

    def end(self, streams: Sequence[GenerationStream]) -> bytes:
        """Nothing: the whole answer was the last event."""
        return b""

    def failed(self, content: dict[str, Any]) -> bytes:
        """The answer as it failed."""
        failure = {"code": content["error"]["code"], "message": content["error"]["message"]}
        status, response = self._answer.response(self._stream, failure=failure)
        return self._events([(f"response.{status}", f'{{"response":{response}}}')])

    def _events(self, events: Iterator[Event] | Sequence[Event]) -> bytes:
        written = []
        for name, content in events:
            head = f'"type":"{name}","sequence_number":{self._sent}'
            written.append(f"event: {name}\ndata: {{{head},{content[1:]}\n\n")
            self._sent += 1
        return "".join(written).encode()


async def _complete(answer: ResponseAnswer, admit: Admit, account: Account) -> Response:
    (stream,), (result,) = await collect(admit, account, answer.add_logprobs)
    for _ in answer.add(result.text):
        pass
    for _ in answer.end(result):
        pass
    return Response(answer.response(stream, result)[1], media_type="application/json")


def _repeated(body: ResponseRequest) -> dict[str, Any]:
    """The fields of the request that an answer repeats, and those that have one value alone."""
    text_format: dict[str, Any] = {"type": "text"}
    if body.text is not None and body.text.format is not None:
        text_format = body.text.format.model_dump(by_alias=True, exclude_none=True)
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "top_logprobs": body.top_logprobs or 0,
        "text": {"format": text_format},
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "tool_choice": (
            {"type": "function", "name": body.forced_function}
            if body.forced_function is not None
            else body.tool_choice or "auto"
        ),
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "metadata": body.metadata or {},
        "user": body.user,
        "store": False,
        "background": False,
        "truncation": "disabled",
        "previous_response_id": None,
        "reasoning": None,
    }
