"""Requests as tokens, checked against the base's vocabulary and context."""

from __future__ import annotations

import copy
import threading

from sera_serve.base import FrozenBase
from sera_serve.engine.generation import GenerateParams
from sera_serve.errors import InvalidRequest, PromptTooLong

# A longer one takes milliseconds, in which an event loop would do nothing else.
_LONG_CHARACTERS = 4000


def is_long(params: GenerateParams) -> bool:
    """Whether `prompt_tokens` takes long enough to be called on a thread of its own."""
    return len(params.prompt or "") > _LONG_CHARACTERS or len(params.token_ids or ()) > _LONG_CHARACTERS


def prompt_tokens(base: FrozenBase, params: GenerateParams, context: int) -> list[int]:
    """The tokens to continue.

    Args:
        base: Its tokenizer reads `params.prompt`; `params.token_ids` are taken as they are.
        params: The request.
        context: The most tokens of prompt and answer together.

    Raises:
        InvalidRequest: No tokens, or one outside the vocabulary.
        PromptTooLong: Prompt and new tokens exceed the context.
    """
    if params.token_ids is not None:
        tokens, field = params.token_ids, "token_ids"
        vocabulary = base.model.config.get_text_config().vocab_size
        if any(not 0 <= token < vocabulary for token in tokens):
            raise InvalidRequest(f"token_ids must lie in 0 to {vocabulary - 1}", param="token_ids")
    else:
        tokens, field = base.tokenizer(params.prompt or "")["input_ids"], "prompt"
    if not tokens:
        raise InvalidRequest(f"{field} has no tokens; send at least one", param=field)
    if len(tokens) + params.max_new_tokens > context:
        raise PromptTooLong(
            f"{len(tokens)} prompt tokens and max_new_tokens {params.max_new_tokens} exceed the context of "
            f"{context}; shorten the prompt or ask for at most {max(0, context - len(tokens))}",
            param=field,
        )
    return list(tokens)


class ClassifyTokens:
    """Tokenizes texts for classification; thread-safe.

    Truncation is a state of the tokenizer, which may not change while another thread uses it: hence a copy of its own,
    and a lock.
    """

    def __init__(self, base: FrozenBase) -> None:
        self._tokenizer = copy.deepcopy(base.tokenizer)
        self._lock = threading.Lock()

    def __call__(self, inputs: list[str], max_length: int) -> list[list[int]]:
        """The tokens of each input, cut to `max_length` as in training; raises InvalidRequest where one has none."""
        with self._lock:
            rows: list[list[int]] = self._tokenizer(inputs, truncation=True, max_length=max_length)["input_ids"]
        for index, tokens in enumerate(rows):
            if not tokens:
                raise InvalidRequest(f"input {index} has no tokens; send some text", param=f"inputs[{index}]")
        return rows


def end_tokens(base: FrozenBase) -> list[int]:
    """Tokens that end a text, from the generation config or else the tokenizer; may be empty."""
    end = base.model.generation_config.eos_token_id
    if end is None:
        end = base.tokenizer.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)
