"""The rows of a call: which adapters a classification or an embedding names, and the tokens of its inputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TypeAlias

from adapters_store import ImageSpec, ResolvedAdapter
from sera_serve.base import FrozenBase, ImageInput, ModelInputs, Pooling
from sera_serve.engine.references import AdapterReferences, naming
from sera_serve.engine.request import AdapterChoice
from sera_serve.engine.tasks.classify import RowGroup
from sera_serve.errors import InvalidRequest, PromptTooLong, UnsupportedTask

# Probabilities in one answer. A few times more would keep the event loop for half a second.
_MAX_PROBABILITIES = 1 << 18
# Inputs times adapters: as many rows as a call with one adapter may have.
_MAX_PAIRS = 1024
# Tokens in which spans are looked for. Each may be a span of its own in the answer.
_MAX_TAGGED = 1 << 15
# Numbers in one answer: 16 MiB of float32 in JSON take a second of encoding, in pieces.
_MAX_VECTOR_NUMBERS = 1 << 21
# What an answer takes until it is written, its JSON included: each row, and in it each number of a vector, each
# probability but for the name of its label, or each token, which may be a span.
_ROW_BYTES, _NUMBER_BYTES, _PROBABILITY_BYTES, _TAGGED_BYTES = 300, 28, 90, 400

Inputs: TypeAlias = Sequence[str | tuple[str, str] | ImageInput]
Texts: TypeAlias = Sequence[str | tuple[str, str]]
EmbeddingInputs: TypeAlias = Sequence[str | Sequence[int] | ImageInput]
TextsOrTokens: TypeAlias = Sequence[str | Sequence[int]]


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

    def image_specs(self, adapters: Sequence[ResolvedAdapter]) -> list[ImageSpec]:
        """The preprocessing of each adapter of a classification of images.

        Raises:
            UnsupportedTask: An adapter classifies texts.
            InvalidRequest: An adapter's images do not fit the base.
        """
        specs = []
        for adapter in adapters:
            if adapter.image is None:
                raise UnsupportedTask(
                    f"adapter {adapter.adapter!r} is for {adapter.task}, and takes texts; send texts, or name an "
                    "adapter for image-classify",
                    param="inputs",
                )
            self._check_size(adapter.image, "adapter")
            specs.append(adapter.image)
        return specs

    def _check_size(self, spec: ImageSpec, param: str) -> None:
        tower = self._base.image_tower
        if tower is not None and (spec.height, spec.width) != (tower.height, tower.width):
            raise InvalidRequest(
                f"the adapter's images have {spec.height} x {spec.width} pixels, and the base reads {tower.height} x "
                f"{tower.width}; train the adapter on this base again",
                param=param,
            )

    def classification(self, adapters: Sequence[ResolvedAdapter], inputs: Texts) -> list[RowGroup]:
        """The rows of each adapter. An input is tokenized once, and again only for adapters that cut it shorter.

        For an adapter that finds spans, an input that is longer than a row has several: its windows.

        Raises:
            UnsupportedTask: An adapter classifies images, or the base classifies no texts.
            InvalidRequest: An input has no tokens.
        """
        for adapter in adapters:
            if adapter.image is not None or self._base.image_tower is not None:
                raise UnsupportedTask(
                    f"adapter {adapter.adapter!r} is for {adapter.task} on a base for images, and takes no texts; send "
                    'objects {"image": "<base64>"}',
                    param="inputs",
                )
        finders = [adapter for adapter in adapters if adapter.task == "token-classify"]
        if finders:
            self._check_spans(finders[0], inputs)
        by_limit = self._by_limit({self._limit(adapter) for adapter in adapters if adapter not in finders}, inputs)
        windows: dict[int, list[ModelInputs]] = {}
        groups, tagged = [], 0
        for adapter in adapters:
            limit = self._limit(adapter)
            if adapter not in finders:
                groups.append(RowGroup(adapter, by_limit[limit]))
                continue
            if limit not in windows:
                windows[limit] = self._windows(inputs, limit, tagged)
            tagged += sum(map(len, windows[limit]))
            _check_tagged(tagged)
            groups.append(RowGroup(adapter, windows[limit]))
        return groups

    def _limit(self, adapter: ResolvedAdapter) -> int:
        """Tokens of a row of an adapter."""
        limit = self._base.max_length
        return min(adapter.max_length or limit, limit)

    def _by_limit(self, limits: set[int], inputs: Texts) -> dict[int, list[ModelInputs]]:
        """The rows of all inputs, cut to each of some limits."""
        if not limits:
            return {}
        tokenize = self._base.preprocessor.rows
        longest = max(limits)
        by_limit = {longest: tokenize(inputs, longest)}
        for limit in limits - {longest}:
            rows = list(by_limit[longest])
            too_long = [index for index, row in enumerate(rows) if len(row) > limit]
            cut = tokenize([inputs[index] for index in too_long], limit)
            for index, row in zip(too_long, cut, strict=True):
                rows[index] = row
            by_limit[limit] = rows
        return by_limit

    def _windows(self, inputs: Texts, limit: int, tagged: int) -> list[ModelInputs]:
        """The rows of all inputs for spans; `tagged` tokens of the request are counted already."""
        rows: list[ModelInputs] = []
        for found in self._base.preprocessor.windows([value for value in inputs if isinstance(value, str)], limit):
            rows += found
            tagged += sum(map(len, found))
            # Before the next text is tokenized.
            _check_tagged(tagged)
        return rows

    def _check_spans(self, adapter: ResolvedAdapter, inputs: Inputs) -> None:
        """Refuse what has no characters to count."""
        if not self._base.preprocessor.has_offsets:
            raise UnsupportedTask(
                f"adapter {adapter.adapter!r} is for token-classify, and the tokenizer of base {self._base.name!r} "
                "does not tell which characters a token stands for; serve a base with a fast tokenizer",
                param="adapter",
            )
        pair = next((index for index, value in enumerate(inputs) if not isinstance(value, str)), None)
        if pair is not None:
            raise InvalidRequest(
                f"input {pair} is a sentence pair, and adapter {adapter.adapter!r} finds spans in one text; send the "
                "texts as two inputs",
                param=f"inputs[{pair}]",
            )

    def embedder(
        self, adapter: AdapterChoice | None, count: int, pooling: Pooling | None = None
    ) -> ResolvedAdapter | None:
        """The adapter of an embedding of `count` inputs, of any task; raises as `AdapterReferences.resolve`.

        Raises:
            InvalidRequest: The vectors are too many, or the base does not pool so.
        """
        width = self._base.embedding_size
        if count * width > _MAX_VECTOR_NUMBERS:
            raise InvalidRequest(
                f"{count} vectors of {width} numbers are more than {_MAX_VECTOR_NUMBERS} numbers; "
                f"send at most {_MAX_VECTOR_NUMBERS // width} inputs in one request",
                param="input",
            )
        if pooling is not None and self._base.kind == "dual":
            raise InvalidRequest(
                f"pooling is {pooling}, and base {self._base.name!r} has its own, which both towers were trained with; "
                "leave pooling out",
                param="pooling",
            )
        if pooling == "last_token" and self._base.kind == "vision":
            raise InvalidRequest("pooling last_token is not for images; use cls or mean", param="pooling")
        return None if adapter is None else self._references.resolve(adapter, None)

    def answer_bytes(self, groups: Sequence[RowGroup], embeds: bool) -> int:
        """The memory that the results of these rows take at most, with their JSON; `embeds` where they are vectors."""
        nbytes = 0
        for group in groups:
            # As JSON has them.
            names = [len(json.dumps(label)) for label in group.adapter.labels or ()] if group.adapter else []
            row_bytes = _ROW_BYTES + _PROBABILITY_BYTES * len(names) + sum(names)
            if embeds:
                row_bytes = _ROW_BYTES + _NUMBER_BYTES * self._base.embedding_size
            elif group.adapter is not None and group.adapter.task == "token-classify":
                row_bytes = _ROW_BYTES
                nbytes += sum(map(len, group.rows)) * (_TAGGED_BYTES + max(names))
            nbytes += len(group.rows) * row_bytes
        return nbytes

    def embedding_spec(self, adapter: ResolvedAdapter | None) -> ImageSpec:
        """The preprocessing of an embedding of images: the adapter's, or the base's own without one.

        Raises:
            InvalidRequest: The adapter's images do not fit the base.
        """
        if adapter is not None and adapter.image is not None:
            self._check_size(adapter.image, "model")
            return adapter.image
        assert self._base.image_spec is not None
        return self._base.image_spec

    def check_embedded(self, inputs: EmbeddingInputs) -> None:
        """Check, before an image is decoded, that the base reads the other inputs of an embedding.

        Raises:
            UnsupportedTask: An input is no image, and the base reads no text.
        """
        if self._base.reads_text:
            return
        for index, value in enumerate(inputs):
            if not isinstance(value, ImageInput):
                place = f"input[{index}]"
                raise UnsupportedTask(
                    f"{place} is no image, and base {self._base.name!r} takes images and no text; send objects "
                    '{"image": "<base64>"}, or ask a server of a base that reads text',
                    param=place,
                )

    def embedding(
        self, adapter: ResolvedAdapter | None, inputs: TextsOrTokens, numbers: Sequence[int] | None = None
    ) -> list[RowGroup]:
        """The rows of an embedding. No input is cut, but texts for an adapter of retrieval, as in its training.

        Args:
            adapter: None is the base model alone.
            inputs: Texts and lists of tokens.
            numbers: The place of each input in the request, for errors; None where there are no other inputs.

        Raises:
            PromptTooLong: An input has more tokens than the base's context.
            InvalidRequest: An input has no tokens, or a token outside the vocabulary.
        """
        context, preprocessor = self._base.max_length, self._base.preprocessor
        numbers = range(len(inputs)) if numbers is None else numbers
        is_cut = adapter is not None and adapter.task == "retrieve"
        # Before anything is tokenized. Of a text that is cut, only the part that decides its row is tokenized.
        most = preprocessor.max_characters(context)
        texts: list[str] = []
        token_lists: list[Sequence[int]] = []
        for index, value in zip(numbers, inputs, strict=True):
            if isinstance(value, str):
                if len(value) > most and not is_cut:
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
        if texts and adapter is not None and is_cut:
            rows = preprocessor.rows(texts, min(adapter.max_length or context, context), "input", numbers=numbers)
        elif texts:
            # One token beyond the context tells that the input is too long.
            rows = preprocessor.rows(texts, context + 1, "input", numbers=numbers)
        else:
            rows = [self._tokens(index, tokens) for index, tokens in zip(numbers, token_lists, strict=True)]
        for index, row in zip(numbers, rows, strict=True):
            if len(row) > context:
                raise _too_long(index, f"more than {context}", context)
        return [RowGroup(adapter, rows)]

    def _tokens(self, index: int, tokens: Sequence[int]) -> ModelInputs:
        place = f"input[{index}]"
        if self._base.kind == "dual" and not self._base.preprocessor.end_tokens & set(tokens):
            raise InvalidRequest(
                f"{place} has no end token, whose state is the vector of a text; send texts, or end the tokens with "
                f"{', '.join(map(str, sorted(self._base.preprocessor.end_tokens)))}",
                param=place,
            )
        try:
            return ModelInputs.of(self._base.preprocessor.prompt(None, tokens))
        except InvalidRequest as error:
            # LangChain's client sends the tokens of a model of OpenAI's, unless it is told not to.
            reason = error.message.replace("token_ids", f"the token ids of {place}", 1)
            remedy = "send texts (LangChain's OpenAIEmbeddings: check_embedding_ctx_length=False)"
            raise InvalidRequest(f"{reason}; {remedy}", param=place) from error


def _check_tagged(tagged: int) -> None:
    if tagged > _MAX_TAGGED:
        raise InvalidRequest(
            f"the inputs have more than {_MAX_TAGGED} tokens to look for spans in, the overlaps of windows included; "
            "send fewer or shorter inputs in one request",
            param="inputs",
        )


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
