"""The answers that one call asks for: its parameters checked, a request for each answer, and when each may start."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress

from sera_serve.engine.request import (
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MIN_REPETITION_PENALTY,
    PRIORITIES,
    GenerateParams,
    GenerationRequest,
    Principal,
)
from sera_serve.engine.stream import EventReader, GenerationStream
from sera_serve.errors import EngineUnavailable, InvalidRequest
from sera_serve.random_bytes import random_hex, random_seed

# Each takes some 20 bytes, and its JSON over 100 until the answer is sent.
_MAX_LOGPROBS = 1 << 21


def check_options(params: GenerateParams, vocabulary: int, most_answers: int, prompts: int = 1) -> None:
    """Check what the HTTP layer's ranges cannot: fields against each other, and against the base.

    Args:
        params: What a client asks.
        vocabulary: Tokens that the base has.
        most_answers: The most requests that one tenant may have in flight.
        prompts: Prompts of the call, each with `params.n` answers.

    Raises:
        InvalidRequest: A token is outside the vocabulary, there are too many answers or entries, or `min_tokens` is
            more than `max_new_tokens`.
    """
    for field, tokens in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        wrong = next((token for token in tokens if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise InvalidRequest(
                f"token {wrong} of {field} is not in the vocabulary; send ids of 0 to {vocabulary - 1}", param=field
            )
    if len(params.logit_bias) > MAX_LOGIT_BIAS:
        raise InvalidRequest(
            f"logit_bias has {len(params.logit_bias)} entries; send at most {MAX_LOGIT_BIAS}", param="logit_bias"
        )
    if params.max_new_tokens is not None and params.min_tokens > params.max_new_tokens:
        raise InvalidRequest(
            f"min_tokens {params.min_tokens} is more than max_new_tokens {params.max_new_tokens}; lower min_tokens",
            param="min_tokens",
        )
    if params.repetition_penalty < MIN_REPETITION_PENALTY:
        raise InvalidRequest(
            f"repetition_penalty must be at least {MIN_REPETITION_PENALTY}; 1 changes nothing",
            param="repetition_penalty",
        )
    most = min(MAX_CHOICES, most_answers)
    if not 1 <= params.n <= most:
        raise InvalidRequest(f"n is {params.n}; send 1 to {most}", param="n")
    if prompts * params.n > most:
        raise InvalidRequest(
            f"{prompts} prompts with n {params.n} make {prompts * params.n} answers; ask for at most {most}",
            param="prompt",
        )


def check_logprobs(params: GenerateParams, prompt_tokens: Sequence[int], context: int) -> None:
    """Check that the log-probabilities of a call fit memory, whatever is generated.

    Args:
        params: What a client asks.
        prompt_tokens: Tokens of each prompt.
        context: The most tokens of a prompt and one answer.

    Raises:
        InvalidRequest: They are too many.
    """
    of_prompt = logprobs_of_prompts(params, sum(prompt_tokens))
    of_answers = 0
    if params.logprobs is not None:
        most = (
            context - tokens if params.max_new_tokens is None else params.max_new_tokens for tokens in prompt_tokens
        )
        of_answers = (params.logprobs + 1) * sum(most) * params.n
    if of_prompt + of_answers > _MAX_LOGPROBS:
        raise InvalidRequest(
            f"up to {of_prompt + of_answers} log-probabilities are asked for, and {_MAX_LOGPROBS} are the most; ask "
            "for fewer at each token, fewer answers, or fewer tokens",
            param="logprobs" if of_answers > of_prompt else "prompt_logprobs",
        )


def logprobs_of_prompts(params: GenerateParams, tokens: int) -> int:
    """How many log-probabilities the prompts of a call have, of so many tokens. An echo has them in each answer."""
    return 0 if params.prompt_logprobs is None else (params.prompt_logprobs + 1) * tokens * params.n


def choice_requests(
    params: GenerateParams, principal: Principal, end_tokens: frozenset[int]
) -> list[GenerationRequest]:
    """A request for each answer, without its prompt and adapter.

    They differ in their seeds: the first one's is that of the call, and the others' are derived from it.

    Args:
        params: Checked by `check_options`.
        principal: Who asks.
        end_tokens: The base's own.
    """
    name = f"gen-{random_hex(8)}"
    seed = random_seed() if params.seed is None else params.seed
    stop_tokens = frozenset(params.stop_token_ids)
    ends = stop_tokens if params.ignore_eos else stop_tokens | end_tokens
    return [
        GenerationRequest(
            principal=principal,
            id=name if index == 0 else f"{name}-{index}",
            priority=PRIORITIES.index(params.priority),
            params=params,
            seed=derived_seed(seed, index),
            end_tokens=ends,
            stop_tokens=stop_tokens,
            base_end_tokens=end_tokens,
        )
        for index in range(params.n)
    ]


def derived_seed(seed: int, index: int) -> int:
    """The seed of one answer, 31 bits: the call's own for the first."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


class ChoiceGroup:
    """Starts the answers to one prompt so that the prompt is computed once.

    The first answer is submitted alone. When it has its first token, the full pages of the prompt are in the prefix
    cache, and the others are submitted: they find them there. Where the first one ends before that, the next one takes
    its place. The event loop alone uses this object; each stream tells it of news of its request.
    """

    def __init__(
        self,
        streams: Sequence[GenerationStream],
        submit: Callable[[list[GenerationRequest]], None],
        shares: bool,
        reader: EventReader,
    ) -> None:
        """Submit the first answer, or all of them.

        Args:
            streams: Not submitted yet.
            submit: Lets requests wait for their turn.
            shares: Whether the others wait for what the first one computes.
            reader: Told of all news of the requests too.

        Raises:
            EngineUnavailable: The engine has stopped.
        """
        self._submit = submit
        self._reader = reader
        requests = [stream.request for stream in streams]
        first = requests[:1] if shares else requests
        self._leader, self._held = requests[0], requests[len(first) :]
        for stream in streams:
            stream.on_news = self._advance
        submit(first)

    def _advance(self) -> None:
        """Submit the answers that need not wait any more."""
        self._reader.wake()
        while self._held:
            # Its reader may have closed one that waits.
            self._held = [request for request in self._held if not request.is_finished]
            if self._leader.first_token_s is not None:
                ready, self._held = self._held, []
            elif self._leader.is_finished:
                ready, self._held = self._held[:1], self._held[1:]
                self._leader = ready[0] if ready else self._leader
            else:
                return
            # Where the engine has stopped, it has told each request so.
            with suppress(EngineUnavailable):
                self._submit(ready)
