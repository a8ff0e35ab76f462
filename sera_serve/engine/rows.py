"""The rows of a call: which adapters a classification or an embedding names, and the tokens of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from adapters_store import ResolvedAdapter
from sera_serve.base import FrozenBase, ModelInputs
from sera_serve.engine.references import AdapterReferences, naming
from sera_serve.engine.request import AdapterChoice
from sera_serve.engine.tasks.classify import RowGroup
from sera_serve.errors import InvalidRequest, PromptTooLong

# Probabilities in one answer. A few times more would keep the event loop for half a second.
_MAX_PROBABILITIES = 1 << 18
# Inputs times adapters: as many rows as a call with one adapter may have.
_MAX_PAIRS = 1024
# Numbers in one answer: 16 MiB of float32 in JSON take a second of encoding, in pieces.
_MAX_VECTOR_NUMBERS = 1 << 21

Inputs: TypeAlias = Sequence[str | tuple[str, str]]
EmbeddingInputs: TypeAlias = Sequence[str | list[int]]


class RowMaker:
    """Makes the rows of calls to one base. Every method blocks, and may be called from any thread."""

    def __init__(self, base: FrozenBase, references: AdapterReferences) -> None:
        self._base = base
        self._references = references

    def classifier(self, adapter: AdapterChoice, count: int) -> list[ResolvedAdapter]:
        """The adapter of a classification of `count` inputs; raises as `AdapterReferences.resolve` does."""
        resolved = [self._references.resolve(adapter, "classify")]
        _check_answer(resolved, count)
        return resolved

    def classifiers(self, adapters: Sequence[str], count: int) -> list[ResolvedAdapter]:
        """The same for several adapters, each of which gets every input; an error names the adapter's place."""
        if len(adapters) * count > _MAX_PAIRS:
            raise InvalidRequest(
                f"{len(adapters)} adapters with {count} inputs each make more than {_MAX_PAIRS} rows; send at most "
                f"{_MAX_PAIRS // len(adapters)} inputs in one request",
                param="inputs",
            )
        resolved = []
        for index, adapter in enumerate(adapters):
            with naming(f"adapters[{index}]"):
                resolved.append(self._references.resolve(adapter, "classify"))
        _check_answer(resolved, count)
        return resolved

    def classification(self, adapters: Sequence[ResolvedAdapter], inputs: Inputs) -> list[RowGroup]:
        """The rows of each adapter. An input is tokenized once, and again only for adapters that cut it shorter."""
        limits = [adapter.max_length or self._base.max_length for adapter in adapters]
        longest = max(limits)
        by_limit = {longest: self._base.preprocessor.rows(inputs, longest)}
        for limit in set(limits) - {longest}:
            rows = list(by_limit[longest])
            too_long = [index for index, row in enumerate(rows) if len(row) > limit]
            cut = self._base.preprocessor.rows([inputs[index] for index in too_long], limit)
            for index, row in zip(too_long, cut, strict=True):
                rows[index] = row
            by_limit[limit] = rows
        return [RowGroup(adapter, by_limit[limit]) for adapter, limit in zip(adapters, limits, strict=True)]

    def embedder(self, adapter: AdapterChoice | None, count: int) -> ResolvedAdapter | None:
        """The adapter of an embedding of `count` inputs, of any task; raises as `AdapterReferences.resolve`."""
        if count * self._base.hidden_size > _MAX_VECTOR_NUMBERS:
            raise InvalidRequest(
                f"{count} vectors of {self._base.hidden_size} numbers are more than {_MAX_VECTOR_NUMBERS} numbers; "
                f"send at most {_MAX_VECTOR_NUMBERS // self._base.hidden_size} inputs in one request",
                param="input",
            )
        return None if adapter is None else self._references.resolve(adapter, None)

    def embedding(self, adapter: ResolvedAdapter | None, inputs: EmbeddingInputs) -> list[RowGroup]:
        """The rows of an embedding: no input is cut.

        Raises:
            PromptTooLong: An input has more tokens than the base's context.
            InvalidRequest: An input has no tokens, or a token outside the vocabulary.
        """
        context, preprocessor = self._base.max_length, self._base.preprocessor
        # Before anything is tokenized.
        most = preprocessor.max_characters(context)
        texts: list[str] = []
        token_lists: list[list[int]] = []
        for index, value in enumerate(inputs):
            if isinstance(value, str):
                if len(value) > most:
                    raise PromptTooLong(
                        f"input {index} has {len(value)} characters; the context of {context} tokens holds at most "
                        f"{most}; shorten the input",
                        param=f"input[{index}]",
                    )
                texts.append(value)
            else:
                if len(value) > context:
                    raise _too_long(index, str(len(value)), context)
                token_lists.append(value)
        if texts:
            # One token beyond the context tells that the input is too long.
            rows = preprocessor.rows(texts, context + 1, field="input")
        else:
            rows = [self._tokens(index, tokens) for index, tokens in enumerate(token_lists)]
        for index, row in enumerate(rows):
            if len(row) > context:
                raise _too_long(index, f"more than {context}", context)
        return [RowGroup(adapter, rows)]

    def _tokens(self, index: int, tokens: list[int]) -> ModelInputs:
        place = f"input[{index}]"
        try:
            return ModelInputs(self._base.preprocessor.prompt(None, tokens))
        except InvalidRequest as error:
            raise InvalidRequest(error.message.replace("token_ids", place, 1), param=place) from error


def _check_answer(adapters: Sequence[ResolvedAdapter], count: int) -> None:
    labels = sum(len(adapter.labels or ()) for adapter in adapters)
    if count * labels > _MAX_PROBABILITIES:
        raise InvalidRequest(
            f"{count} inputs with {labels} labels each make more than {_MAX_PROBABILITIES} probabilities; send at "
            f"most {_MAX_PROBABILITIES // labels} inputs in one request",
            param="inputs",
        )


def _too_long(index: int, tokens: str, context: int) -> PromptTooLong:
    return PromptTooLong(
        f"input {index} has {tokens} tokens; the context of the base has {context}; shorten the input",
        param=f"input[{index}]",
    )
