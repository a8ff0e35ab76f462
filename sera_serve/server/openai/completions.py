"""`POST /v1/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Response

from sera_serve.engine import GenerateParams, GenerationResult, GenerationStream, Principal, TokenDelta
from sera_serve.server.accounting import Account
from sera_serve.server.deps import ContextOf
from sera_serve.server.openai.answers import (
    CompletionLogprobLists,
    Head,
    collect,
    to_json,
    translated,
    usage,
    with_member,
)
from sera_serve.server.openai.completion_schemas import Completion, CompletionRequest, Prompt
from sera_serve.server.openai.errors import OpenAIRoute, translated_errors
from sera_serve.server.openai.texts import Texts, TextsOf, adapter_of, check_token_count
from sera_serve.server.openapi import stream_of
from sera_serve.server.sse import Admit, EventStream, EventWriter, encode_event

router = APIRouter(route_class=OpenAIRoute, tags=["openai"])

_KIND = "text_completion"


@router.post(
    "/v1/completions",
    response_model=Completion,
    responses={200: {"content": stream_of(Completion)}},
)
async def completions(body: CompletionRequest, context: ContextOf, texts: TextsOf) -> Response:
    """Continue one or several prompts, in the form of OpenAI's API."""
    adapter = adapter_of(body.model, context.engine)
    account = context.open_account(context.principal(adapter), body.priority)
    principal = account.principal
    echo = bool(body.echo)
    prompts: list[GenerateParams] = []
    for prompt in body.prompt:
        params = body.params(
            adapter,
            prompt=prompt if isinstance(prompt, str) else None,
            token_ids=None if isinstance(prompt, str) else prompt,
            # The engine always generates a token. That of an echo alone is left out.
            max_new_tokens=1 if body.max_tokens == 0 else body.max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if echo else None,
        )
        prompts.append(account.params(params))
    admit = translated(partial(context.engine.generate_prompts, prompts, principal, context.received_at), "prompt")
    head = Head.of("cmpl", body.model, context.engine.base.name)
    echoed: list[str] = []
    if echo:
        for prompt in body.prompt:
            if not isinstance(prompt, str):
                check_token_count(prompt, context.engine, "prompt")
        work = texts.executor.run_in_turn(principal.tenant, _prompt_texts, texts, body.prompt)
        echoed = await context.finish(work)
    if body.stream:
        events = CompletionEvents(body, head, principal, echoed, texts)
        return EventStream(admit, events, account, translated_errors)
    answer = _complete(body, admit, account, head, principal, echoed, texts)
    return await context.finish(answer)


class CompletionEvents(EventWriter):
    """Writes a stream of completions. Each event has a part of one choice."""

    def __init__(
        self, body: CompletionRequest, head: Head, principal: Principal, prompts: Sequence[str], texts: Texts
    ) -> None:
        """Write for a request. `prompts` has the texts of the prompts if they are echoed."""
        self._body = body
        self._head = head
        self._principal = principal
        self._prompts = prompts
        self._texts = texts
        self._lists: dict[int, CompletionLogprobLists] = {}

    def begin(self, streams: Sequence[GenerationStream]) -> bytes:
        """The prompts, if they are echoed."""
        if not self._prompts:
            return b""
        n = self._body.choices
        return b"".join(self._event(stream, index, self._prompts[index // n]) for index, stream in enumerate(streams))

    def delta(self, index: int, stream: GenerationStream, delta: TokenDelta) -> bytes:
        """The text that was added."""
        if self._body.max_tokens == 0:
            return b""
        logprobs = None
        if self._body.logprobs is not None:
            lists = self._lists.get(index)
            if lists is None:
                lists = self._lists[index] = CompletionLogprobLists(self._texts.tokens)
            lists.add(delta.logprobs)
            logprobs = lists.take()
        elif not delta.text:
            return b""
        return self._event(stream, index, delta.text, logprobs)

    def final(self, index: int, stream: GenerationStream, result: GenerationResult) -> bytes:
        """Why the text has ended."""
        reason = "length" if self._body.max_tokens == 0 else result.finish_reason
        return self._event(stream, index, "", finish_reason=reason)

    def end(self, streams: Sequence[GenerationStream]) -> bytes:
        """The usage, if it was asked for, and the end."""
        last = super().end(streams)
        if not self._body.sends_usage:
            return last
        results = [stream.result for stream in streams if stream.result is not None]
        content = self._head.fields(_KIND, streams[0]) | {"choices": []}
        return encode_event(content | {"usage": _usage(self._body, results, self._principal)}) + last

    def _event(
        self,
        stream: GenerationStream,
        index: int,
        text: str,
        logprobs: str | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        content = self._head.fields(_KIND, stream)
        if self._body.sends_usage:
            content["usage"] = None
        choice = _choice(index, text, logprobs, finish_reason)
        return f"data: {with_member(to_json(content), 'choices', f'[{choice}]')}\n\n".encode()


async def _complete(
    body: CompletionRequest,
    admit: Admit,
    account: Account,
    head: Head,
    principal: Principal,
    prompts: Sequence[str],
    texts: Texts,
) -> Response:
    lists: dict[int, CompletionLogprobLists] = {}
    late: dict[int, list[TokenDelta]] = {}

    def take(index: int, delta: TokenDelta) -> None:
        if body.logprobs is None or body.max_tokens == 0:
            return
        if prompts:
            # The prompt's own come before them, and only at the end.
            late.setdefault(index, []).append(delta)
            return
        if index not in lists:
            lists[index] = CompletionLogprobLists(texts.tokens)
        lists[index].add(delta.logprobs)

    streams, results = await collect(admit, account, take)
    if prompts and body.logprobs is not None:
        for index, result in enumerate(results):
            prompt = prompts[index // body.choices]
            deltas = late.pop(index, [])
            lists[index] = await texts.executor.run_in_turn(principal.tenant, _echoed, texts, prompt, result, deltas)
    choices = []
    for index, result in enumerate(results):
        text, reason = ("", "length") if body.max_tokens == 0 else (result.text, result.finish_reason)
        if prompts:
            text = prompts[index // body.choices] + text
        logprobs = lists[index].take() if index in lists else None
        choices.append(_choice(index, text, logprobs, reason))
    content = with_member(to_json(head.fields(_KIND, streams[0])), "choices", f"[{','.join(choices)}]")
    content = with_member(content, "usage", to_json(_usage(body, results, principal)))
    return Response(content, media_type="application/json")


def _choice(index: int, text: str, logprobs: str | None, finish_reason: str | None) -> str:
    content = to_json({"index": index, "text": text, "finish_reason": finish_reason})
    return with_member(content, "logprobs", logprobs or "null")


def _usage(body: CompletionRequest, results: Sequence[GenerationResult], principal: Principal) -> dict[str, Any]:
    content = usage(results, body.choices, principal)
    if body.max_tokens == 0:
        content |= {"completion_tokens": 0, "total_tokens": content["prompt_tokens"]}
    return content


def _prompt_texts(texts: Texts, prompts: Sequence[Prompt]) -> list[str]:
    """The texts of prompts, for an echo."""
    return [prompt if isinstance(prompt, str) else texts.decode(prompt) for prompt in prompts]


def _echoed(
    texts: Texts, prompt: str, result: GenerationResult, deltas: Sequence[TokenDelta]
) -> CompletionLogprobLists:
    """The lists of a prompt and of the text after it."""
    lists = CompletionLogprobLists(texts.tokens)
    lists.add(result.prompt_logprobs, prompt)
    lists.start_after(len(prompt))
    for delta in deltas:
        lists.add(delta.logprobs)
    return lists
