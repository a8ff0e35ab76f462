"""`POST /v1/completions`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Response

from sera_serve.engine import GenerationResult, GenerationStream, Principal, TokenDelta
from sera_serve.server.accounting import Account
from sera_serve.server.deps import ContextOf
from sera_serve.server.long_answers import Write
from sera_serve.server.openai.answers import (
    ChoiceAnswer,
    ChoiceEvents,
    CompletionLogprobLists,
    Head,
    pieces_with_logprobs,
    to_json,
)
from sera_serve.server.openai.completion_schemas import Completion, CompletionRequest, Prompt
from sera_serve.server.openai.errors import OpenAIRoute, translated_errors
from sera_serve.server.openai.texts import Texts, TextsOf, adapter_of, check_token_count
from sera_serve.server.openapi import stream_of
from sera_serve.server.sse import Admit, EventStream, collect

router = APIRouter(route_class=OpenAIRoute, tags=["openai"])


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
    params = [
        body.params(
            adapter,
            account.priority,
            prompt=prompt if isinstance(prompt, str) else None,
            token_ids=None if isinstance(prompt, str) else prompt,
            # The engine always generates a token. That of an echo alone is left out.
            max_new_tokens=1 if body.max_tokens == 0 else body.max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if echo else None,
        )
        for prompt in body.prompt
    ]
    admit = partial(context.engine.generate_prompts, params, principal, context.received_at)
    echoed: list[str] = []
    if echo:
        for place, prompt in _places(body.prompt):
            if not isinstance(prompt, str):
                check_token_count(prompt, context.engine, place)
        work = texts.executor.run_in_turn(principal.tenant, _prompt_texts, texts, body.prompt)
        echoed = await context.finish(work)
    head = Head.of("cmpl", body.model, context.engine.base.name)
    answer = CompletionAnswer(body, head, principal, echoed, texts)
    if body.stream:
        return EventStream(admit, CompletionEvents(answer), account, translated_errors)
    return await context.finish(_complete(answer, admit, account, context.written))


class CompletionAnswer(ChoiceAnswer):
    """What a stream and a whole answer have in common: the prompts, where they are echoed, and the choices."""

    kind = chunk_kind = "text_completion"

    def __init__(
        self, body: CompletionRequest, head: Head, principal: Principal, echoed: Sequence[str], texts: Texts
    ) -> None:
        super().__init__(body, head, principal)
        self.echoed = echoed
        self.has_logprobs = body.logprobs is not None
        self.is_echo_alone = body.max_tokens == 0
        self.texts = texts

    def prompt(self, index: int) -> str:
        """The text before that of a choice."""
        return self.echoed[index // self.body.choices] if self.echoed else ""

    def choice(
        self, index: int, text: str, logprobs: Iterator[str] | None = None, finish_reason: str | None = None
    ) -> Iterator[str]:
        """The JSON of a choice, or of a part of it, in pieces."""
        content = to_json({"index": index, "text": text, "finish_reason": finish_reason})
        return pieces_with_logprobs(content, logprobs)

    def finish_reason(self, result: GenerationResult) -> str:
        """Why a choice has ended."""
        return "length" if self.is_echo_alone else result.finish_reason

    def usage(self, results: Sequence[GenerationResult]) -> dict[str, Any]:
        """The usage of the whole answer."""
        content = super().usage(results)
        if self.is_echo_alone:
            content |= {"completion_tokens": 0, "total_tokens": content["prompt_tokens"]}
        return content

    def new_lists(self) -> CompletionLogprobLists:
        """The log-probabilities of a choice, empty so far."""
        return CompletionLogprobLists(self.texts.tokens)


class CompletionEvents(ChoiceEvents[CompletionAnswer]):
    """Writes a stream of completions."""

    def __init__(self, answer: CompletionAnswer) -> None:
        super().__init__(answer)
        self._lists = defaultdict[int, CompletionLogprobLists](answer.new_lists)

    def begin(self, streams: Sequence[GenerationStream]) -> bytes:
        """The prompts, if they are echoed."""
        if not self.answer.echoed:
            return b""
        choices = ["".join(self.answer.choice(index, self.answer.prompt(index))) for index in range(len(streams))]
        return b"".join(map(self.event, streams, choices))

    def delta(self, index: int, stream: GenerationStream, delta: TokenDelta) -> bytes:
        """The text that was added."""
        if self.answer.is_echo_alone:
            return b""
        logprobs = None
        if self.answer.has_logprobs:
            self._lists[index].add(delta.logprobs)
            logprobs = self._lists[index].take()
        elif not delta.text:
            return b""
        return self.event(stream, "".join(self.answer.choice(index, delta.text, logprobs)))

    def final(self, index: int, stream: GenerationStream, result: GenerationResult) -> bytes:
        """Why the text has ended."""
        return self.event(stream, "".join(self.answer.choice(index, "", None, self.answer.finish_reason(result))))


async def _complete(answer: CompletionAnswer, admit: Admit, account: Account, write: Write) -> Response:
    lists = defaultdict[int, CompletionLogprobLists](answer.new_lists)
    late = defaultdict[int, list[TokenDelta]](list)

    def take(index: int, delta: TokenDelta) -> None:
        if not answer.has_logprobs or answer.is_echo_alone:
            return
        if answer.echoed:
            # The prompt's own come before them, and only at the end.
            late[index].append(delta)
        else:
            lists[index].add(delta.logprobs)

    streams, results = await collect(admit, account, take)
    if answer.echoed and answer.has_logprobs:
        executor, tenant = answer.texts.executor, answer.principal.tenant
        for index, result in enumerate(results):
            lists[index] = await executor.run_in_turn(tenant, _echoed, answer, index, result, late.pop(index, []))

    def choice(index: int, result: GenerationResult) -> Iterator[str]:
        text = answer.prompt(index) + ("" if answer.is_echo_alone else result.text)
        logprobs = lists[index].take() if index in lists else None
        return answer.choice(index, text, logprobs, answer.finish_reason(result))

    choices = (choice(index, result) for index, result in enumerate(results))
    return await answer.whole(streams[0], choices, results, write)


def _prompt_texts(texts: Texts, prompts: Sequence[Prompt]) -> list[str]:
    """The texts of prompts, for an echo."""
    return [prompt if isinstance(prompt, str) else texts.decode(prompt, place) for place, prompt in _places(prompts)]


def _places(prompts: Sequence[Prompt]) -> Iterator[tuple[str, Prompt]]:
    """Each prompt with its name in errors, which is the engine's too."""
    for index, prompt in enumerate(prompts):
        yield (f"prompt[{index}]" if len(prompts) > 1 else "prompt"), prompt


def _echoed(
    answer: CompletionAnswer, index: int, result: GenerationResult, deltas: Sequence[TokenDelta]
) -> CompletionLogprobLists:
    """The lists of a choice's prompt and of the text after it."""
    lists = answer.new_lists()
    prompt = answer.prompt(index)
    lists.add(result.prompt_logprobs, prompt)
    lists.start_after(len(prompt))
    for delta in deltas:
        lists.add(delta.logprobs)
    return lists
