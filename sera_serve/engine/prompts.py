"""The tokens of a generation's prompt, checked against the context before a long text is tokenized and after."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from sera_serve.base.preprocess import Preprocessor
from sera_serve.engine.request import GenerateParams
from sera_serve.errors import PromptTooLong
from sera_serve.loop_turns import LoopTurns
from sera_serve.threads import BoundedExecutor


class PromptMaker:
    """Makes tokens of prompts: of short ones on the event loop, of long ones on threads, in turn by tenant.

    256 texts of 2,000 characters that came at once kept the loop for a second: they take turns. On the threads, they
    would wait for the long texts of their tenant.
    """

    def __init__(
        self, preprocessor: Preprocessor, tokenizing: BoundedExecutor, turns: Callable[[], LoopTurns], context: int
    ) -> None:
        """Prepare.

        Args:
            preprocessor: The base's.
            tokenizing: Threads for long prompts.
            turns: Those of the running event loop.
            context: Most tokens of a prompt and its answer together.
        """
        self._preprocessor = preprocessor
        self._tokenizing = tokenizing
        self._turns = turns
        self._context = context

    async def tokens(self, params: GenerateParams, tenant: str) -> array[int]:
        """The prompt's tokens, int32.

        Raises:
            PromptTooLong: The prompt, or what is to follow it, does not fit the context.
            InvalidRequest: An empty prompt, or a token id outside the vocabulary.
        """
        preprocessor, context = self._preprocessor, self._context
        if params.token_ids is not None:
            self._check_context(len(params.token_ids), params)
        elif params.prompt is not None and len(params.prompt) > (most := preprocessor.max_characters(context)):
            # Before the text is tokenized, which takes a second and some hundred bytes a character.
            raise PromptTooLong(
                f"the prompt has {len(params.prompt)} characters; the context of {context} tokens holds at most "
                f"{most}, if each is the longest token of {preprocessor.longest_token} characters; shorten the prompt",
                param="prompt",
            )
        arguments = params.prompt, params.token_ids, params.add_special_tokens
        if preprocessor.is_long(params.prompt, params.token_ids):
            tokens = await self._tokenizing.run_in_turn(tenant, preprocessor.prompt, *arguments)
        else:
            await self._turns().short_turn(tenant)
            tokens = preprocessor.prompt(*arguments)
        self._check_context(len(tokens), params)
        return array("i", tokens)

    def _check_context(self, tokens: int, params: GenerateParams) -> None:
        room = max(0, self._context - tokens)
        param = "prompt" if params.token_ids is None else "token_ids"
        if params.max_new_tokens is not None and params.max_new_tokens > room:
            raise PromptTooLong(
                f"{tokens} prompt tokens and max_new_tokens {params.max_new_tokens} exceed the context of "
                f"{self._context}; shorten the prompt or ask for at most {room}",
                param=param,
            )
        if max(1, params.min_tokens) > room:
            raise PromptTooLong(
                f"{tokens} prompt tokens leave room for {room} more in the context of {self._context}, and at "
                f"least {max(1, params.min_tokens)} are to be generated; shorten the prompt or lower min_tokens",
                param=param,
            )
